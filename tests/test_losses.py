"""What image codecs are trained on: weighted distances, the critic, averaged weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmtok.errors import ConfigError, MediaError
from mmtok.training.adversarial import Critic, adaptive_weight
from mmtok.training.averaging import Average
from mmtok.training.losses import PictureLoss, perceptual_distance
from mmtok.training.ssim import ssim
from mmtok.training.usage import CodebookUsage

NONE = dict.fromkeys(("l2", "l1", "ssim", "ms_ssim", "gradient", "perceptual", "alpha", "critic"), 0.0)


def pair(channels: int = 3, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, channels, size, size, generator=g) * 2 - 1
    return (x + 0.1 * torch.randn(x.shape, generator=g)).requires_grad_(), x


def test_each_weight_adds_its_distance():
    y, x = pair()
    by_hand = {
        "l2": (y - x).square().mean(),
        "l1": (y - x).abs().mean(),
        "ssim": 1 - ssim(y, x, 2.0).mean(),
        "gradient": (y.diff(dim=2) - x.diff(dim=2)).abs().mean() + (y.diff(dim=3) - x.diff(dim=3)).abs().mean(),
    }
    for name, value in by_hand.items():
        torch.testing.assert_close(PictureLoss(**{**NONE, name: 2.0})(y, x), 2 * value)
    both = PictureLoss(**{**NONE, "l2": 1.0, "gradient": 0.5})(y, x)
    torch.testing.assert_close(both, by_hand["l2"] + 0.5 * by_hand["gradient"])
    assert float(PictureLoss(**NONE)(y, x)) == 0


def test_every_distance_is_zero_for_equal_pictures_and_pulls_towards_them():
    y, x = pair()
    for name in ("l2", "l1", "ssim", "ms_ssim", "gradient"):
        loss = PictureLoss(**{**NONE, name: 1.0})
        assert abs(float(loss(x, x))) < 1e-6, name
        (step,) = torch.autograd.grad(loss(y, x), y)
        assert loss(y - 1e-2 * step / step.norm(), x).item() < loss(y, x).item(), name


def test_alpha_counts_where_there_is_one():
    y, x = pair(4)
    with_alpha, without = PictureLoss(**{**NONE, "alpha": 1.0}), PictureLoss(**NONE)
    torch.testing.assert_close(with_alpha(y, x) - without(y, x), (y - x)[:, 3].abs().mean())
    assert float(with_alpha(y[:, :3], x[:, :3])) == 0


def test_distances_stay_in_float32_within_autocast():
    y, x = pair()
    loss = PictureLoss(ssim=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(y.bfloat16(), x)
    torch.testing.assert_close(inside, loss(y.bfloat16().float(), x))
    assert inside.dtype == torch.float32


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match=r"PictureLoss.l1: got -1.0, expected at least 0"):
        PictureLoss(l1=-1.0)


def test_perceptual_distance_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(ConfigError, match="pip install lpips"):
        perceptual_distance(torch.device("cpu"))


# --- the critic


def test_the_critic_learns_to_tell_and_the_codec_to_fool_it():
    torch.manual_seed(0)
    critic = Critic(width=8).train()
    real, fake = torch.randn(8, 3, 32, 32).cumsum(3) / 6, torch.randn(8, 3, 32, 32)
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3)
    for _ in range(40):
        loss, on_real, on_fake = critic.own_loss(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(on_real) > 0.3
    assert float(on_fake) < -0.3
    assert float(critic.real) > float(critic.fake)
    y = fake.clone().requires_grad_()
    before = critic.codec_loss(y).item()
    (step,) = torch.autograd.grad(critic.codec_loss(y), y)
    assert critic.codec_loss(y - step / step.norm()).item() < before


def test_one_backward_pass_serves_both_without_mixing_them():
    """What the codec is taught does not reach the critic's weights, nor the other way round."""
    torch.manual_seed(0)
    critic, x = Critic(width=8).eval(), torch.randn(2, 3, 32, 32)
    y = torch.randn(2, 3, 32, 32, requires_grad=True)
    critic.codec_loss(y).backward()
    assert float(y.grad.abs().sum()) > 0
    assert all(p.grad is None for p in critic.parameters())
    y.grad = None
    critic.own_loss(x, y)[0].backward()
    assert y.grad is None
    assert all(p.grad is not None for p in critic.parameters())


def test_the_smallest_pictures_of_losses_and_critic():
    x = torch.rand(1, 3, 41, 41)
    assert PictureLoss(ms_ssim=1.0)(x, x) < 1e-5
    with pytest.raises(MediaError, match="at least 41"):
        PictureLoss(ms_ssim=1.0)(x[..., :40], x[..., :40])
    assert Critic()(x[..., :12, :12]).shape == (1, 1, 1, 1)


def test_hinge_loss_by_hand():
    critic = Critic(width=8).eval()
    x, y = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        a, b = critic(x), critic(y)
        hinge = (F.relu(1 - a).mean() + F.relu(1 + b).mean()) / 2 + 0.001 * (a.square().mean() + b.square().mean())
        torch.testing.assert_close(critic.own_loss(x, y)[0], hinge)


def test_adaptive_weight_makes_the_gradients_equally_large():
    last = torch.randn(4, 3, requires_grad=True)
    x = torch.randn(5, 4)
    first, second = (x @ last).square().mean(), 37 * (x @ last).sin().mean()
    weight = adaptive_weight(first, second, last)
    a, b = (torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (first, second))
    assert math.isclose(float(weight * b), float(a), rel_tol=1e-3)
    assert not weight.requires_grad


# --- averaged weights


def test_the_average_is_the_plain_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = Average(model, 0.9)
    expected = model[0].weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 3))
            model[1].num_batches_tracked += 1
        average.update(step)
        decay = min(0.9, step / (step + 10))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(average.tensors["0.weight"], expected)
    assert "1.num_batches_tracked" not in average.tensors
    before = copy.deepcopy(model.state_dict())
    with average.applied():
        torch.testing.assert_close(model[0].weight.detach(), expected)
        model[1].num_batches_tracked += 1  # what is no weight is not put back
    before["1.num_batches_tracked"] += 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    average.apply()
    torch.testing.assert_close(model[0].weight.detach(), expected)


# --- usage


def test_usage_over_several_batches_by_hand():
    usage = CodebookUsage((4, 40))
    assert usage.figures() == {}
    usage.count(torch.tensor([[[0, 7], [1, 7]]]))
    usage.count(torch.tensor([[[1, 7], [1, 8]], [[1, 8], [0, 8]]]))
    figures = usage.figures()
    share = torch.tensor([2 / 6, 4 / 6], dtype=torch.float64)
    assert figures["usage"] == 0.5
    assert math.isclose(figures["perplexity"], float((-(share * share.log()).sum()).exp()), rel_tol=1e-9)
    assert (figures["dead"], figures["usage_1"], figures["dead_1"]) == (2, 2 / 40, 38)
    assert math.isclose(figures["perplexity_1"], 2, rel_tol=1e-9)
    usage.reset()
    assert usage.figures() == {}


def test_codes_that_are_hardly_ever_drawn_are_dead():
    usage = CodebookUsage((2,))
    usage.count(torch.tensor([[0]] * 99 + [[1]]))
    assert usage.figures()["dead"] == 1
    usage.count(torch.tensor([[1]] * 5))
    assert usage.figures()["dead"] == 0
