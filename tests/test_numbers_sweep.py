"""Every rule over the range of its numbers: means of 0 to 1e4, variances of 0 to 1e8, in four dtypes.

A new rule is swept by being registered. The truth is the rule itself in float64, and at variance 0 the original.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import oracles
import pytest
import timm.layers  # noqa: F401  with these imported, the rules for their classes are in force
import torch
import torchvision.ops  # noqa: F401
from oracles import Trial
from torch import Tensor

import adfify
from adfify import Moments
from adfify.moments import variance_dtype
from adfify.registry import RULES, Uncertain

SCALES = (0.0, -8.0, 1e2, -1e4)  # of generic means, which have either sign
VARIANCES = (1e-30, 1.0, 1e8)
FLOAT32 = torch.finfo(torch.float32)
LEAST = 1e-36  # a hundred times the least normal number of float32: squares and products of slopes pass through it
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def swept() -> list[Trial]:
    """Every rule by its first case: the others differ in sizes and bounds, not in numbers."""
    found: dict[int, Trial] = {}
    for trial in oracles.trials(RULES, adfify.supported()):
        if not trial.rule.certain:
            found.setdefault(id(trial.rule), trial)
    return list(found.values())


each = pytest.mark.parametrize("trial", swept(), ids=lambda trial: trial.name)


def means_at(trial: Trial, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """Means of that scale in the operation's domain."""
    return [x.mean.to(dtype) for x in trial.moments(torch.float64, scale)]


def known(trial: Trial, means: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """What the original is of the means; None where it takes no such numbers, or torch has no kernel for them."""
    try:
        return tuple(trial.original(means[0].dtype)(*means))
    except (NotImplementedError, RuntimeError):
        return None


def given(means: Sequence[Tensor], variance: float) -> list[Moments]:
    return [Moments(m, torch.full_like(m, variance, dtype=variance_dtype(m.dtype))) for m in means]


def in_domain(trial: Trial, variance: float) -> bool:
    """Whether inputs that have to be within bounds are so with this variance: 10 std and more."""

    def holds(spec: Uncertain) -> bool:
        if spec.mask:  # whose variance is that of its mean
            return True
        room = 1.0 if spec.positive else math.inf
        if spec.within is not None:
            room = 0.05 * (spec.within[1] - spec.within[0])
        return 10 * math.sqrt(variance) <= room

    return all(holds(spec) for spec in trial.uncertain())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each
def test_variance_zero_is_the_original_at_every_scale(trial: Trial, dtype: torch.dtype) -> None:
    for scale in SCALES:
        means = means_at(trial, scale, dtype)
        original = known(trial, means)
        if original is None:
            continue
        for got, want in zip(trial.converted(dtype)(*given(means, 0.0)), original, strict=True):
            ordinary = want.isfinite()
            assert torch.equal(got.mean[ordinary], want[ordinary]), scale
            assert not got.variance[ordinary].any(), scale


@each
def test_float32_is_near_float64_with_gradients_that_are_numbers(trial: Trial) -> None:
    wide, plain = trial.converted(torch.float64), trial.converted(torch.float32)
    for scale in SCALES:
        means = means_at(trial, scale, torch.float32)
        doubles = [m.double() for m in means]
        if known(trial, means) is None:
            continue
        for variance in (0.0, *VARIANCES):
            with torch.no_grad():
                exact = wide(*given(doubles, variance))
            inputs = given(means, variance)
            leaves = [part.requires_grad_() for x in inputs for part in x]
            results = plain(*inputs)
            where = f"means of {scale:g}, variance {variance:g}"
            for got, want, ordinary in zip(results, exact, comparable(trial, means, variance), strict=True):
                # An approximation is stated for noise of the size of its inputs; far beyond it has to be a number.
                stated = in_domain(trial, variance) and (trial.rule.exact or variance <= 1)
                check(got, want, ordinary, variance, where, stated)
            check_gradients(results, leaves, where)


@torch.no_grad()
def comparable(trial: Trial, means: Sequence[Tensor], variance: float) -> list[Tensor]:
    """Where the original is finite, and one operation in either dtype.

    rms_norm without an eps takes that of the dtype, and far from 0 torch's own values have few digits.
    """
    draw = torch.Generator().manual_seed(3)
    noisy = [m + math.sqrt(variance) * torch.randn(m.shape, generator=draw) for m in means]
    found = []
    for place in (means, trial_domain(trial, means, noisy)):
        pair = known(trial, place), known(trial, [m.double() for m in place])
        if pair[0] is None or pair[1] is None:
            continue
        found.append([(a - b).abs() <= 0.01 * b.abs() for a, b in zip(*pair, strict=True)])
    return [torch.stack(each).all(0) for each in zip(*found, strict=True)]


def trial_domain(trial: Trial, means: Sequence[Tensor], noisy: Sequence[Tensor]) -> list[Tensor]:
    """Noise is not to take an input out of its domain."""
    specs = trial.uncertain()
    free = [spec.within is None and not spec.positive for spec in specs]
    return [n if f else m for f, m, n in zip(free, means, noisy, strict=True)]


def check(got: Moments, want: Moments, ordinary: Tensor, variance: float, where: str, stated: bool) -> None:
    for part, exact in zip(got, want, strict=True):
        assert not part[ordinary].isnan().any(), f"NaN at {where}"
        assert not exact[ordinary].isnan().any(), f"NaN in float64 at {where}"
        within = ordinary & (exact.abs() < 0.99 * FLOAT32.max)
        assert part[within].isfinite().all(), f"overflow at {where}"
    assert (got.variance[ordinary] >= 0).all(), f"negative at {where}"
    if not stated:
        return
    within = ordinary & (want.variance < 0.99 * FLOAT32.max)
    std, exact = got.variance.double().sqrt()[within], want.variance.double().sqrt()[within]
    # A slope is known by values of the function: to a thousandth of a unit in their last place.
    rounding = 1e-3 * FLOAT32.eps * want.mean.abs().double()[within] * math.sqrt(variance)
    off = (std - exact).abs() - 5e-4 * exact - rounding
    off = torch.where((std - exact).abs() < math.sqrt(LEAST * max(1.0, variance)), -1.0, off)
    if bool((off > 0).any()):
        worst = int(off.argmax())
        raise AssertionError(f"std {std[worst]:.6g} for {exact[worst]:.6g} at {where}, {int((off > 0).sum())} such")


def check_gradients(results: Sequence[Moments], leaves: Sequence[Tensor], where: str) -> None:
    parts = [part for x in results for part in x if part.requires_grad]
    if not parts or not all(part.isfinite().all() for part in parts):
        return
    gradients = torch.autograd.grad(sum(part.sum() for part in parts), leaves, allow_unused=True)
    assert not any(g.isnan().any() for g in gradients if g is not None), f"NaN among the gradients at {where}"
