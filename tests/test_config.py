"""Configs: JSON round trip, the near miss of an unknown key, wrong types, key=value overrides."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtok.audio import SpectralCodecConfig
from mmtok.config import Config
from mmtok.errors import ConfigError
from mmtok.image import ImageVQVAEConfig
from mmtok.training.loop import LoopConfig
from mmtok.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Sample(Config):
    count: int
    rate: float = 0.5
    name: str = "x"
    flag: bool = False
    sizes: tuple[int, ...] = (1, 2)
    limit: int | None = None


samples = st.builds(
    Sample,
    count=st.integers(),
    rate=st.floats(allow_nan=False),
    name=st.text(),
    flag=st.booleans(),
    sizes=st.lists(st.integers()).map(tuple),
    limit=st.none() | st.integers(),
)


@given(samples)
def test_json_round_trip(config):
    back = Sample.from_json(config.to_json())
    assert back == config
    assert type(back.sizes) is tuple
    assert back.to_json() == config.to_json()


@pytest.mark.parametrize(
    "config", [LoopConfig(), ImageVQVAEConfig(), SpectralCodecConfig(), TransformerConfig(vocab_size=64)]
)
def test_every_config_survives_json(config):
    assert type(config).from_json(config.to_json()) == config
    assert config.to_json().endswith("}\n")
    assert list(json.loads(config.to_json())) == [f.name for f in dataclasses.fields(config)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3


def test_unknown_key_names_the_near_miss():
    with pytest.raises(ConfigError, match=r"Sample has no key 'cuont'; did you mean 'count'\?"):
        Sample.from_dict({"cuont": 1})
    with pytest.raises(ConfigError, match="no key 'qqqqqq'; known keys: count, rate, name"):
        Sample.from_dict({"count": 1, "qqqqqq": 1})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("count", "3", "expected int"),
        ("count", 3.0, "expected int"),
        ("count", True, "expected int"),
        ("count", None, "expected int"),
        ("rate", True, "expected float"),
        ("rate", "fast", "expected float"),
        ("flag", 1, "expected bool"),
        ("name", 5, "expected str"),
        ("sizes", 3, "expected a list"),
        ("sizes", [1, "2"], "expected int"),
        ("limit", "none", "expected int"),
    ],
)
def test_wrong_types(key, value, expected):
    with pytest.raises(ConfigError, match=rf"Sample\.{key}: got .*{expected}"):
        Sample.from_dict({"count": 1, key: value})


def test_integers_pass_for_floats_and_lists_for_tuples():
    config = Sample.from_dict({"count": 1, "rate": 2, "sizes": [3]})
    assert type(config.rate) is float
    assert config.sizes == (3,)


def test_missing_key():
    with pytest.raises(ConfigError, match="count"):
        Sample.from_dict({})


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null"])
def test_text_that_is_no_json_object(text):
    with pytest.raises(ConfigError, match="Sample: "):
        Sample.from_json(text)


def test_overrides():
    start = Sample(count=1)
    changed = start.replace(["count=7", "rate=1e-3", "name=a=b", "flag=true", "sizes=[4, 5]", "limit=9"])
    assert changed == Sample(7, 1e-3, "a=b", True, (4, 5), 9)
    assert changed.replace(["limit=null"]).limit is None
    assert start == Sample(count=1)
    assert start.replace([]) == start
    with pytest.raises(ConfigError, match="got 'count', expected key=value"):
        start.replace(["count"])
    with pytest.raises(ConfigError, match="did you mean 'count'"):
        start.replace(["coun=2"])
    with pytest.raises(ConfigError, match=r"Sample\.count: got 'many'"):
        start.replace(["count=many"])


@pytest.mark.parametrize(
    ("config", "text", "said"),
    [
        (LoopConfig(), "steps=0", "steps: got 0, expected at least 1"),
        (LoopConfig(), "save_every=-1", "save_every"),
        (ImageVQVAEConfig(), "downsample=6", "expected a power of two"),
        (ImageVQVAEConfig(), "patch=16", "expected at most downsample"),
        (ImageVQVAEConfig(), "channels=0", "channels: got 0"),
        (SpectralCodecConfig(), "window=1025", "even number"),
        (SpectralCodecConfig(), "hop=2000", "at least one hop"),
        (SpectralCodecConfig(), "levels=0", "levels: got 0"),
        (TransformerConfig(vocab_size=8), "hidden_size=0", "expected more than 0"),
    ],
)
def test_impossible_values(config, text, said):
    with pytest.raises(ConfigError, match=said):
        config.replace([text])


def test_learning_rate_warms_up_and_decays():
    config = LoopConfig(steps=100, warmup=10, lr=1.0)
    rates = [config.lr_at(i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.01 < rates[-1] < 0.02
    assert LoopConfig(warmup=0).lr_at(0) == LoopConfig().lr
