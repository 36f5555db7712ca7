"""Reading pictures at places: grids, boxes, deformed windows; against the originals' own Jacobians and draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import assert_within, z_limit
from tiny import ByExport
from torch import Tensor, nn
from torchvision import ops

import adfify
from adfify import Moments
from adfify.errors import InputError, UnsupportedOpsError


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uncertain(mean: Tensor, std: float | None = None, seed: int = 1) -> Moments:
    """Of one std, or of variances between 0.1 and 0.8."""
    draw = torch.Generator().manual_seed(seed)
    generic = 0.1 + 0.7 * torch.rand(mean.shape, generator=draw, dtype=torch.float64)
    return Moments(mean, generic if std is None else torch.full_like(mean, std * std))


def agrees(original: Callable[..., Tensor], inputs: Sequence[Moments], got: Moments, draws: int = 40_000) -> None:
    """In z-scores, of which none may exceed what chance allows to one test in a million."""
    (truth,) = oracles.monte_carlo(lambda *x: (original(*x),), inputs, [got], draws)
    limit = z_limit(2 * got.mean.numel())
    seen = ~truth.rare  # a place that few draws bring into the picture says nothing
    assert seen.float().mean() > 0.7
    assert_within(truth.mean_error, limit * truth.mean_deviation + 1e-9, "mean", seen)
    assert_within(got.variance - truth.variance, limit * truth.variance_deviation + 1e-9, "variance", seen)


def is_linear_map(original: Callable[[Tensor], Tensor], x: Moments, got: Moments) -> None:
    """The variance is that of the original's own Jacobian, squared."""
    (truth,) = oracles.multiaffine(lambda x: (original(x),), [x])
    torch.testing.assert_close(got.mean, truth.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.variance, truth.variance, rtol=1e-9, atol=1e-12)


# Grids


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_a_certain_grid_is_a_linear_map(mode: str, padding: str, align_corners: bool) -> None:
    """Far outside too, where several corners are one element, and their weights add before they are squared."""
    x, grid = uncertain(seeded(2, 2, 4, 3)), 1.4 * seeded(2, 5, 3, 2, seed=2)

    def read(x: Moments) -> Moments:
        return adfify.adfify(Reading(grid, mode, padding, align_corners))(x)  # type: ignore[no-any-return]

    is_linear_map(lambda x: F.grid_sample(x, grid, mode, padding, align_corners), x, read(x))


class Reading(nn.Module):
    def __init__(self, grid: Tensor, mode: str, padding: str, align_corners: bool) -> None:
        super().__init__()
        self.register_buffer("grid", grid)
        self.how = (mode, padding, align_corners)

    def forward(self, x: Tensor) -> Tensor:
        return F.grid_sample(x, self.grid, *self.how)


class At(nn.Module):
    """A picture read at a grid that comes in with it."""

    def __init__(self, mode: str = "bilinear", padding: str = "zeros", align_corners: bool = False) -> None:
        super().__init__()
        self.how = (mode, padding, align_corners)

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid, *self.how)


@pytest.mark.parametrize("std", [1e-3, 0.2, 1.0, 3.0], ids=lambda s: f"std {s:g}")
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_an_uncertain_grid_agrees_with_draws(padding: str, std: float) -> None:
    """Exact for independent coordinates, however far they stray."""
    inputs = [uncertain(seeded(1, 2, 7, 5)), uncertain(0.6 * seeded(1, 4, 3, 2, seed=2), std)]
    model = At(padding=padding)
    agrees(model, inputs, adfify.adfify(model)(*inputs))


def test_a_certain_picture_at_an_uncertain_grid_has_the_variance_of_its_slope() -> None:
    """A picture that is a plane is read exactly: variances so small that E[y^2] - E[y]^2 would be 0."""
    ramp = (3 * torch.arange(6.0)[:, None] + 5 * torch.arange(8.0) + 1e4).double()[None, None]
    grid = Moments(torch.zeros(1, 1, 1, 2).double() + 0.1, torch.full((1, 1, 1, 2), 1e-20).double())
    got = adfify.nn.grid_sampling.grid_sample(ramp, grid, align_corners=False)
    assert got.variance.item() == pytest.approx(1e-20 * ((3 * 6 / 2) ** 2 + (5 * 8 / 2) ** 2), rel=1e-9)


def test_a_window_of_the_picture_gives_what_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [uncertain(seeded(2, 3, 16, 12)), uncertain(seeded(2, 5, 3, 2, seed=2), 0.05)]
    by_window = adfify.nn.grid_sampling.grid_sample(*inputs, align_corners=False)
    monkeypatch.setattr("adfify.nn.grid_sampling.concrete", lambda x: False)
    whole = adfify.nn.grid_sampling.grid_sample(*inputs, align_corners=False)
    torch.testing.assert_close(by_window.mean, whole.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_window.variance, whole.variance, rtol=1e-10, atol=1e-12)


def test_chunks_of_places_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [uncertain(seeded(2, 3, 6, 5)), uncertain(seeded(2, 5, 3, 2, seed=2))]
    at_once = adfify.nn.grid_sampling.grid_sample(*inputs, align_corners=False)
    monkeypatch.setattr("adfify.nn.grid_sampling._AT_ONCE", 500)
    by_chunks = adfify.nn.grid_sampling.grid_sample(*inputs, align_corners=False)
    torch.testing.assert_close(by_chunks.variance, at_once.variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("mode", "padding"), [("nearest", "zeros"), ("bicubic", "border"), ("bilinear", "reflection")])
def test_what_an_uncertain_grid_has_no_rule_for_is_a_gap_in_the_plan(mode: str, padding: str) -> None:
    with pytest.raises(UnsupportedOpsError, match="with 'grid' uncertain there is a rule only for") as caught:
        adfify.adfify(At(mode, padding))
    assert "test_places.py" in str(caught.value)


def test_an_uncertain_grid_in_a_volume_is_refused() -> None:
    adf = adfify.adfify(At())
    with pytest.raises(InputError, match="a volume of shape"):
        adf(seeded(1, 1, 3, 3, 3), seeded(1, 2, 2, 2, 3))


class SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.localisation = nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)
        )
        nn.init.normal_(self.localisation[-1].weight, std=0.1, generator=torch.Generator().manual_seed(3))
        self.localisation[-1].bias.data.copy_(torch.tensor([1.0, 0.1, 0, -0.1, 1, 0]))
        self.head = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.localisation(x).view(-1, 2, 3)
        return self.head(F.grid_sample(x, F.affine_grid(theta, x.size(), align_corners=False), align_corners=False))


@pytest.mark.parametrize("engine", ["fx", "export"])
def test_a_spatial_transformer_converts(engine: str) -> None:
    torch.manual_seed(4)
    model = SpatialTransformer().double().eval()
    x = seeded(2, 1, 12, 12)
    adf = adfify.adfify(model if engine == "fx" else ByExport(model), example_inputs=(x,), noise_variance=1e-3)
    mean, variance = adf(Moments(x, torch.zeros_like(x)))
    torch.testing.assert_close(mean, model(x), rtol=1e-12, atol=1e-12)
    assert not variance.any()
    got = adf(x)
    (truth,) = oracles.monte_carlo(lambda x: (model(x),), [uncertain(x, 1e-3**0.5)], [got], 4_000)
    # Neighbours share the error of the grid, which one pass takes as independent.
    assert (got.std.mean() / truth.variance.sqrt().mean() - 1).abs() < 0.1
    joint = adf.joint(x, outputs=[7, 90])
    torch.testing.assert_close(joint.std, truth.variance.sqrt().flatten(1)[:, [7, 90]], rtol=0.1, atol=0)


# Regions

BOXES = torch.tensor([[0, 1.0, 0.5, 9, 7], [1, 3, 2, 4.5, 9], [0, -2, -3, 20, 6], [1, 8, 7, 30, 40]]).double()


class Head(nn.Module):
    """A convolution, and what is read of it within boxes."""

    def __init__(self, pool: nn.Module, boxes: Tensor | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 1)
        self.pool = pool
        self.register_buffer("boxes", BOXES if boxes is None else boxes)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x), self.boxes)


POOLS = [
    ops.RoIAlign((3, 2), 0.5, -1),
    ops.RoIAlign(2, 0.5, 2, aligned=True),
    ops.PSRoIAlign(2, 0.5, -1),
    ops.PSRoIPool(2, 0.5),
]


@pytest.mark.parametrize("engine", ["fx", "export"])
@pytest.mark.parametrize("pool", POOLS, ids=repr)
def test_averages_within_certain_boxes_are_a_linear_map(pool: nn.Module, engine: str) -> None:
    """With one channel before the convolution, the noise of neighbours does not meet: one pass is exact."""
    torch.manual_seed(5)
    model = Head(pool).double().eval()
    x = uncertain(seeded(2, 1, 7, 6))
    adf = adfify.adfify(model if engine == "fx" else ByExport(model), example_inputs=(x.mean,))
    is_linear_map(model, x, adf(x))


@pytest.mark.parametrize("engine", ["fx", "export"])
def test_maxima_within_certain_boxes_agree_with_draws(engine: str) -> None:
    torch.manual_seed(6)
    model = Head(ops.RoIPool((2, 3), 0.5)).double().eval()
    x = uncertain(seeded(2, 1, 7, 6))
    adf = adfify.adfify(model if engine == "fx" else ByExport(model), example_inputs=(x.mean,))
    (truth,) = oracles.monte_carlo(lambda x: (model(x),), [x], [adf(x)], 20_000)
    std = truth.variance.sqrt()
    assert_within(truth.mean_error, 0.01 * std + 5 * truth.mean_deviation, "mean")
    assert_within(adf(x).std - std, 0.01 * std + 5 * truth.std_deviation, "std")


def test_few_boxes_at_a_time_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, boxes = uncertain(seeded(2, 4, 7, 6)), BOXES
    whole = [adfify.nn.torchvision_regions.roi_align(x, boxes, 2), adfify.nn.torchvision_regions.roi_pool(x, boxes, 2)]
    monkeypatch.setattr("adfify.nn.torchvision_regions._AT_ONCE", 1)
    single = [adfify.nn.torchvision_regions.roi_align(x, boxes, 2), adfify.nn.torchvision_regions.roi_pool(x, boxes, 2)]
    for one, other in zip(whole, single, strict=True):
        torch.testing.assert_close(one.variance, other.variance, rtol=1e-12, atol=0)


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = ops.MultiScaleRoIAlign(["fine", "coarse"], 2, 2, canonical_scale=8, canonical_level=2)
        self.boxes = [torch.tensor([[1.0, 2, 6, 5], [2, 3, 15, 16], [0, 0, 9, 9]]).double()]

    def forward(self, x: Tensor) -> Tensor:
        return self.pool({"fine": x, "coarse": x[:, :, ::2, ::2]}, self.boxes, [(16, 16)])


def test_a_pyramid_is_read_at_the_level_of_each_box() -> None:
    x = uncertain(seeded(1, 2, 8, 8))
    is_linear_map(Pyramid(), x, adfify.adfify(Pyramid())(x))


@pytest.mark.parametrize("engine", ["fx", "export"])
def test_uncertain_boxes_are_a_gap_in_the_plan(engine: str) -> None:
    class Uncertain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.roi_align(x, [x[0, 0, :2, :4]], 2)

    with pytest.raises(UnsupportedOpsError, match="is uncertain here, and the rule") as caught:
        adfify.adfify(Uncertain() if engine == "fx" else ByExport(Uncertain()), example_inputs=(seeded(1, 1, 6, 6),))
    assert "test_places.py" in str(caught.value)
