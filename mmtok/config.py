"""Frozen config dataclasses: JSON round trip, and an unknown key is an error that names the near miss."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, TypeVar

from mmtok.errors import ConfigError

C = TypeVar("C", bound="Config")


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of every configuration. Fields are str, int, float, bool, None or tuples of these."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types (tuples become lists)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def to_json(self) -> str:
        """Canonical JSON: keys in order of declaration, two spaces, one final newline."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Build from JSON types.

        Raises:
            ConfigError: an unknown key (with the nearest known one) or a value of the wrong type.
        """
        hints = typing.get_type_hints(cls)
        known = [f.name for f in dataclasses.fields(cls)]
        out: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
                raise ConfigError(f"{cls.__name__} has no key {key!r}; {hint}")
            out[key] = _coerce(cls.__name__, key, value, hints[key])
        try:
            return cls(**out)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error

    @classmethod
    def from_json(cls: type[C], text: str) -> C:
        """Build from JSON text; raises ConfigError as ``from_dict`` does, and when the text is no JSON object."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{cls.__name__}: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{cls.__name__}: got {type(values).__name__}, expected a JSON object")
        return cls.from_dict(values)

    def replace(self: C, assignments: list[str]) -> C:
        """A copy with ``key=value`` strings applied; values are read as JSON, else taken as strings."""
        values = self.to_dict()
        for text in assignments:
            key, sep, raw = text.partition("=")
            if not sep:
                raise ConfigError(f"got {text!r}, expected key=value")
            try:
                values[key] = json.loads(raw)
            except json.JSONDecodeError:
                values[key] = raw
        return type(self).from_dict(values)


def _coerce(owner: str, key: str, value: Any, hint: Any) -> Any:
    """Check ``value`` against a field's type; ints pass for floats and lists for tuples."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _coerce(owner, key, value, next(o for o in options if o is not type(None)))
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{owner}.{key}: got {value!r}, expected a list")
        inner = typing.get_args(hint)[0]
        return tuple(_coerce(owner, key, v, inner) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise ConfigError(f"{owner}.{key}: got {value!r} of type {type(value).__name__}, expected {hint.__name__}")
    return value
