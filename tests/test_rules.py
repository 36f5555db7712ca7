"""Being registered is being tested: every rule, by every target and case, against the oracles of its family.

Nothing here names a rule, except two tables of exceptions, each with its reason, which are themselves checked.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import oracles
import pytest
import timm.layers  # noqa: F401  with these imported, the rules for their classes are in force
import torch
import torchvision.ops  # noqa: F401
from oracles import Trial, assert_within
from torch import Tensor

import adfify
from adfify import Moments
from adfify.errors import InputError
from adfify.moments import variance_dtype
from adfify.nn.dropout import ANALYTIC, SAMPLED
from adfify.registry import FAMILIES, RULES, Case, Rule, target_name


def own_rules(overlay: adfify.registry.Rules) -> list[Rule]:
    beneath = {id(rule) for rule in RULES}
    return [rule for rule in overlay if id(rule) not in beneath]


DEFAULT = oracles.trials(RULES, adfify.supported())
OVERLAID = {
    "sampled": oracles.trials(SAMPLED, own_rules(SAMPLED)),
    "analytic": oracles.trials(ANALYTIC, own_rules(ANALYTIC)),
}
ALL = [*DEFAULT, *OVERLAID["sampled"], *OVERLAID["analytic"]]
RANDOM = [trial for trial in DEFAULT if not trial.rule.certain]


def each(trials: Sequence[Trial]) -> Callable[..., Any]:
    return pytest.mark.parametrize("trial", trials, ids=[trial.name for trial in trials])


def once(trials: Sequence[Trial]) -> list[Trial]:
    """For what depends on the rule alone: its first target will do, with every case.

    That the other targets are the same operation is seen at variance zero, bit for bit.
    """
    return [trial for trial in trials if trial.target is trial.rule.targets[0] and not trial.rule.certain]


def seeded(operation: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """The same draws, for an operation that draws, every time; Moments as a tuple."""

    def call(*values: Any) -> tuple[Any, ...]:
        torch.manual_seed(5)
        return tuple(operation(*values))

    return call


# The registry itself


@pytest.mark.parametrize("rule", [*adfify.supported(), *own_rules(SAMPLED), *own_rules(ANALYTIC)], ids=lambda r: r.name)
def test_a_rule_says_what_it_is(rule: Rule) -> None:
    for target in rule.targets:
        assert oracles.cases_of(rule, target), f"{target_name(target)} has no case, so nothing tests it"
    assert rule.source, "where does it come from?"
    assert rule.family in FAMILIES
    assert rule.exact or rule.tolerance > 0 or rule.family == "custom", "neither exact nor with a tolerance"
    assert not (rule.exact and rule.tolerance), "exact, and yet with a tolerance"


# As this file is imported: other tests register rules of their own.
REGISTERED = [*RULES, *own_rules(SAMPLED), *own_rules(ANALYTIC)]


def test_the_walk_is_complete() -> None:
    tried = {(id(trial.rule), trial.target) for trial in ALL}
    assert tried == {(id(rule), target) for rule in REGISTERED for target in rule.targets}
    assert {"adfify.nn.timm_layers", "adfify.nn.torchvision_ops"} <= {trial.rule.apply.__module__ for trial in DEFAULT}


# Against the truth


def numbers(case: Case) -> list[float]:
    """The case's own numbers and their negatives: a function may have its kinks there."""
    given = (*case.args, *case.kwargs.values(), *case.init.values())
    plain = [float(value) for value in given if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return sorted({*plain, *[-value for value in plain]})


def elementwise_grid(tail: Sequence[int], kinks: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Means -10 to 10 std about 0 and about every kink, and variances: [std, mean, *tail]."""
    std = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 1.0, 3.0], dtype=torch.float64)[:, None, None]
    z = torch.arange(-10, 11, dtype=torch.float64)
    centres = torch.tensor(sorted({0.0, *kinks}), dtype=torch.float64)[:, None]
    mean = (centres + z * torch.where(std > 0, std, 1.0)).flatten(1)
    shape = (*mean.shape, *tail)
    flat = (*mean.shape, *[1] * len(tail))
    mean, variance = mean.reshape(flat).expand(shape), (std * std)[:, :, 0].reshape(-1, *[1] * (len(flat) - 1))
    return mean.contiguous(), variance.expand(shape).contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@each([trial for trial in RANDOM if trial.rule.exact and trial.rule.family == "elementwise"])
def test_exact_elementwise_rule_agrees_with_quadrature(trial: Trial, dtype: torch.dtype) -> None:
    """Errors of mean and std in units of the largest std that this input std gives, plus rounding.

    A closed form is held to its own std, however small; a quadrature rule is allowed 3e-4 of the largest.
    """
    (shape,), original = trial.shapes(), trial.original(torch.float64)
    kinks = oracles.kinks_of(original, shape[1:], numbers(trial.case))
    mean, variance = (part.to(dtype) for part in elementwise_grid(shape[1:], kinks))
    (got,) = trial.converted(dtype)(Moments(mean.flatten(0, 1), variance.flatten(0, 1)))
    got = Moments(got.mean.double().reshape(mean.shape), got.variance.double().reshape(mean.shape))
    mean, std = mean.double(), variance.double().sqrt()
    flat = oracles.quadrature(original, Moments(mean.flatten(0, 1), std.square().flatten(0, 1)), kinks)
    want = Moments(flat.mean.reshape(mean.shape), flat.variance.reshape(mean.shape))

    eps = torch.finfo(dtype).eps
    numeric = "quadrature" in trial.rule.source
    unit = want.std.amax(1, keepdim=True) if numeric else want.std
    relative = 3e-4 if numeric else max(64 * eps, 1e-12)
    # A unit in the last place of the mean is that much of a std, and 10 std away the density changes 10 times as much.
    moved = 10 * torch.where(std > 0, eps * mean.abs() / std, 0.0)
    magnitude = mean.abs() + want.mean.abs()
    assert_within(got.std - want.std, (relative + moved) * unit + eps * want.mean.abs(), "std")
    assert_within(got.mean - want.mean, 0.1 * (relative + moved) * unit + 4 * eps * magnitude, "mean")
    assert (got.variance[0] == 0).all()


@each([trial for trial in RANDOM if trial.rule.exact and trial.rule.family not in ("elementwise", "step")])
def test_exact_rule_agrees_with_the_differences_of_the_original(trial: Trial) -> None:
    inputs = trial.moments()
    truth = oracles.multiaffine(trial.original(torch.float64), inputs)
    for got, want in zip(trial.converted(torch.float64)(*inputs), truth, strict=True):
        # A cast to a narrower dtype rounds.
        slack = 4 * torch.finfo(got.dtype).eps if got.dtype != torch.float64 else 1e-9
        torch.testing.assert_close(got.mean.double(), want.mean.double(), rtol=slack, atol=slack)
        torch.testing.assert_close(got.variance.double(), want.variance.double(), rtol=slack, atol=slack)


@each(once([trial for trial in RANDOM if trial.rule.exact and trial.rule.family != "step"]))
def test_exact_rule_agrees_with_monte_carlo(trial: Trial) -> None:
    agrees_with_monte_carlo(trial, trial.moments(torch.float32), draws=20_000)


@pytest.mark.parametrize("scale", [100.0, 1.0, 0.01])
@each(once([trial for trial in RANDOM if trial.rule.family == "step"]))
def test_step_agrees_with_draws_however_rare_its_jumps_are(trial: Trial, scale: float) -> None:
    """What jumps by 1 once in so many draws has a variance that few draws show: a few are allowed beside z-scores."""
    inputs = [Moments(x.mean, scale * x.variance) for x in trial.moments()]
    (got,) = trial.converted(torch.float64)(*inputs)
    torch.manual_seed(21)
    draws = 100_000
    stacks = [x.mean + x.std * torch.randn(draws, *x.shape, dtype=torch.float64) for x in inputs]
    deviation = oracles.batched(trial.original(torch.float64), stacks)[0] - got.mean
    square, limit = deviation.square(), oracles.z_limit(2 * got.mean.numel()) / draws**0.5
    assert_within(deviation.mean(0), limit * got.std + 15 / draws, "mean")
    assert_within(square.mean(0) - got.variance, limit * square.std(0) + 15 / draws, "variance")


# Functions like torch.gru_cell, with weights of any size, are their modules' own steps.
APPROXIMATE = [
    trial
    for trial in RANDOM
    if not trial.rule.exact and trial.rule.family != "custom" and (trial.is_module or not trial.composed)
]


def draws_for(trial: Trial) -> int:
    """Whole networks (LSTM, transformers) go draw by draw, as torch.func.vmap does not know them."""
    return 3_000 if trial.composed else 200_000


@each(once(APPROXIMATE))
def test_approximate_rule_is_within_its_tolerance_of_monte_carlo(trial: Trial) -> None:
    agrees_with_monte_carlo(trial, trial.moments(torch.float32), draws=draws_for(trial))


@each(once(APPROXIMATE))
def test_approximate_rule_is_within_its_tolerance_at_small_variances(trial: Trial) -> None:
    inputs = [Moments(x.mean, 0.01 * x.variance) for x in trial.moments(torch.float32)]
    agrees_with_monte_carlo(trial, inputs, draws=draws_for(trial))


@each(once(APPROXIMATE))
def test_approximate_rule_is_within_its_tolerance_where_all_inputs_are_alike(trial: Trial) -> None:
    inputs = [Moments(torch.zeros_like(x.mean), torch.ones_like(x.variance)) for x in trial.moments(torch.float32)]
    inputs = trial.domain(inputs)
    agrees_with_monte_carlo(trial, inputs, draws=draws_for(trial))


def agrees_with_monte_carlo(trial: Trial, inputs: Sequence[Moments], draws: int) -> None:
    """In z-scores, of which none may exceed what chance allows to one test in a million."""
    predicted = trial.converted(torch.float32)(*inputs)
    truths = oracles.monte_carlo(trial.original(torch.float32), inputs, predicted, draws)
    for got, truth in zip(predicted, truths, strict=True):
        std, limit = truth.variance.sqrt(), oracles.z_limit(2 * got.mean.numel())
        rounding = 1e-6 * (1 + got.mean.double().abs())
        allowed = trial.rule.tolerance * std + rounding
        off = got.variance.double().sqrt() - std
        assert_within(truth.mean_error, allowed + limit * truth.mean_deviation, "mean", ~truth.rare)
        assert_within(off, allowed + limit * truth.std_deviation, "std", ~truth.rare)
        # What is certain, or too rare to be drawn, has to be so in the prediction as well.
        assert_within(truth.mean_error, 0.05 * std.max() + rounding, "mean of what is rare", truth.rare)
        assert_within(off, 0.05 * std.max() + rounding, "std of what is rare", truth.rare)


@each([t for t in once(RANDOM) if t.rule.family == "arithmetic" and t.rule.exact and len(t.shapes()) == 2])
def test_arithmetic_of_one_random_variable_with_itself(trial: Trial) -> None:
    (x, *_), converted, original = trial.moments(torch.float32), trial.converted, trial.original
    (got,) = converted(torch.float32)(x, x)
    (truth,) = oracles.monte_carlo(lambda x: original(torch.float32)(x, x), [x], [got], 20_000)
    limit = oracles.z_limit(2 * got.mean.numel())
    assert_within(truth.mean_error, limit * truth.mean_deviation + 1e-6, "mean")
    assert_within(got.variance - truth.variance, limit * truth.variance_deviation + 1e-6, "variance")


# At variance zero, the original


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@each(DEFAULT)
def test_variance_zero_is_the_original_bit_for_bit(trial: Trial, dtype: torch.dtype) -> None:
    means = [x.mean for x in trial.moments(dtype)]
    if trial.rule.family == "elementwise":
        tail = trial.shapes()[0][1:]
        kinks = oracles.kinks_of(trial.original(torch.float64), tail, numbers(trial.case))
        grid = Moments(*[part.to(dtype).flatten(0, 1) for part in elementwise_grid(tail, kinks)])
        means = [x.mean for x in trial.domain([grid])]
    results = trial.converted(dtype)(*[Moments(mean, torch.zeros_like(mean)) for mean in means])
    expected = trial.original(dtype)(*means)
    assert len(results) == len(expected)
    for got, want in zip(results, expected, strict=True):
        if trial.rule.certain:
            assert type(got) is type(want)
            assert got == want
            continue
        assert torch.equal(got.mean, want)
        assert torch.equal(got.variance, torch.zeros_like(want))
        assert got.mean.dtype == want.dtype
        assert got.variance.dtype == variance_dtype(want.dtype)


@each(RANDOM)
def test_channels_last_is_kept_where_the_original_keeps_it(trial: Trial) -> None:
    inputs = [widened(x) if trial.rule.family == "elementwise" else x for x in trial.moments(torch.float32)]
    # The parts of a complex value lie side by side, always.
    parts_last = [spec.complex for spec in trial.uncertain()]
    inputs = [
        x if beside else Moments(*[channels_last(part) for part in x])
        for x, beside in zip(inputs, parts_last, strict=True)
    ]
    expected = trial.original(torch.float32)(*[x.mean for x in inputs])
    for got, want in zip(trial.converted(torch.float32)(*inputs), expected, strict=True):
        if want.dim() == 4 and want.is_contiguous(memory_format=torch.channels_last):
            assert got.mean.is_contiguous(memory_format=torch.channels_last)
            assert got.variance.is_contiguous(memory_format=torch.channels_last)


def widened(x: Moments) -> Moments:
    """An elementwise operation takes any shape, so give it four dimensions."""
    shape = (*x.shape, *(3, 4, 2)[: 4 - len(x.shape)])
    along = (*x.shape, *[1] * (len(shape) - len(x.shape)))
    return Moments(x.mean.reshape(along).expand(shape), x.variance.reshape(along).expand(shape))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@each(RANDOM)
def test_device_and_shape_are_the_original_s(trial: Trial) -> None:
    """On the meta device: a tensor made on another one would be refused."""
    inputs = [x.to("meta") for x in trial.moments(torch.float32)]
    try:
        expected = trial.original(torch.float32, "meta")(*[x.mean for x in inputs])
    except (NotImplementedError, RuntimeError):  # `cpu()` of nothing, a look at its values: nor do we
        with pytest.raises((NotImplementedError, RuntimeError)):
            trial.converted(torch.float32, "meta")(*inputs)
        return
    for got, want in zip(trial.converted(torch.float32, "meta")(*inputs), expected, strict=True):
        assert got.mean.device == got.variance.device == want.device
        assert got.mean.shape == got.variance.shape == want.shape


# What depends on the rule alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@each(once(ALL))
def test_result_is_finite_non_negative_and_keeps_its_dtype(trial: Trial, dtype: torch.dtype) -> None:
    inputs = trial.moments(dtype)
    try:
        wanted = [value.dtype for value in trial.original(dtype)(*[x.mean for x in inputs])]
    # torch has no such kernel (average pooling of half precision on a CPU), or dtype (complex bfloat16): nor do we
    except (NotImplementedError, RuntimeError):
        with pytest.raises((NotImplementedError, RuntimeError)):
            trial.converted(dtype)(*inputs)
        return
    results = trial.converted(dtype)(*inputs)
    assert [x.mean.dtype for x in results] == wanted
    # float32 at least: half precision would underflow.
    assert [x.variance.dtype for x in results] == [torch.promote_types(kind, torch.float32) for kind in wanted]
    for x in results:
        assert x.mean.isfinite().all()
        assert x.variance.isfinite().all()
        assert (x.variance >= 0).all()


@each(once(ALL))
def test_input_is_left_alone(trial: Trial) -> None:
    inputs = trial.moments(torch.float32)
    before = copy.deepcopy(inputs)
    trial.converted(torch.float32)(*inputs)
    for x, was in zip(inputs, before, strict=True):
        assert torch.equal(x.mean, was.mean)
        assert torch.equal(x.variance, was.variance)


@each(RANDOM)
def test_a_view_is_registered_as_an_alias(trial: Trial) -> None:
    """What shares memory with its input, other than by writing into it, has to be known to the rewriter."""
    tensors = [x.mean for x in trial.moments(torch.float32)]
    before = copy.deepcopy(tensors)
    results = trial.original(torch.float32, on_copies=False)(*tensors)
    wrote = any(not torch.equal(x, was) for x, was in zip(tensors, before, strict=True))
    memory = {x.untyped_storage().data_ptr() for x in tensors}
    shared = any(value.untyped_storage().data_ptr() in memory for value in results)
    assert wrote or not shared or trial.rule.alias, "register it with alias=True"


POINTS = {"generic": (1.0, 1.0), "variance zero": (1.0, 0.0), "mean and variance zero": (0.0, 0.0)}


@pytest.mark.parametrize("point", POINTS)
@each(once(ALL))
def test_gradients_are_finite(trial: Trial, point: str) -> None:
    mean_scale, variance_scale = POINTS[point]
    inputs = [Moments(x.mean * mean_scale, x.variance * variance_scale) for x in trial.moments(torch.float32)]
    leaves = [part.requires_grad_() for x in inputs for part in x]
    reaches_original = [value.requires_grad for value in trial.original(torch.float32)(*[x.mean for x in inputs])]
    results = trial.converted(torch.float32)(*inputs)
    # What the original cuts from the graph (detach), the rule cuts too.
    assert [x.mean.requires_grad for x in results] == reaches_original
    for part in [part for x in results for part in x if part.requires_grad]:
        for gradient in torch.autograd.grad(part.sum(), leaves, retain_graph=True, allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


@each(once(ALL))
def test_gradients_are_those_of_the_values(trial: Trial) -> None:
    inputs = trial.moments(torch.float64)
    values = trial.original(torch.float64)(*[x.mean.clone().requires_grad_() for x in inputs])
    differentiable = [value.requires_grad for value in values]
    # A cast to float32 is linear, and shows its slope only over a wide step.
    step, tolerance = (1e-6, 1e-5) if all(value.dtype == torch.float64 for value in values) else (1e-2, 1e-3)
    operation = seeded(trial.converted(torch.float64))

    def moments(*parts: Tensor) -> tuple[Tensor, ...]:
        results = operation(*[Moments(mean, variance) for mean, variance in zip(parts[::2], parts[1::2], strict=True)])
        return tuple(part for x, wanted in zip(results, differentiable, strict=True) if wanted for part in x)

    parts = [part.requires_grad_() for x in inputs for part in x]
    if not any(differentiable):
        assert moments(*parts) == ()
    elif any(value.dtype.itemsize < 4 for value in values):  # a cast that rounds more than differences can show
        for result in moments(*parts):
            gradients = torch.autograd.grad(result.sum(), parts, allow_unused=True)
            assert {float(g.unique()) for g in gradients if g is not None} == {1.0}
    else:
        assert torch.autograd.gradcheck(moments, parts, eps=step, atol=tolerance, rtol=1e-3, fast_mode=True)


# Functions take what the originals take


def original_parameters(target: Any) -> list[str]:
    """The original's arguments in order, where Python or torch's own table of overrides knows them."""
    found = getattr(torch.Tensor, target, None) if isinstance(target, str) else target
    if inspect.isfunction(found):  # torch builds max_pool from two functions, with indices and without
        found = inspect.getclosurevars(found).nonlocals.get("if_false", found)
    if isinstance(target, str) or not inspect.isfunction(found):
        # A function of Python knows best: the table has the last two of max_pool2d_with_indices the other way round.
        found = torch.overrides.get_testing_overrides().get(found, found)
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


@each([trial for trial in ALL if not trial.is_module and trial.name.endswith("-0")])
def test_rule_takes_its_arguments_in_the_order_of_the_original(trial: Trial) -> None:
    """What a rule lacks is reported when a model is converted; another order would be computed, and wrong."""
    taken = inspect.signature(trial.rule.apply).parameters.values()
    here = {p.name: place for place, p in enumerate(taken) if p.kind is p.POSITIONAL_OR_KEYWORD}
    there = {name: place for place, name in enumerate(original_parameters(trial.target))}
    assert {name: here[name] for name in there if name in here} == {n: p for n, p in there.items() if n in here}


# Modules

MODULES = [trial for trial in ALL if trial.is_module]
ONE_INPUT = [trial for trial in MODULES if not getattr(trial.rule.apply, "many_inputs", False)]


@each(ONE_INPUT)
def test_module_is_called_with_moments_or_with_two_tensors_only(trial: Trial) -> None:
    (x, *_), module = trial.moments(), trial.adf_module()
    whole, unpacked = seeded(lambda: module(x)), seeded(lambda: module(*x))
    assert torch.equal(whole()[0], unpacked()[0])
    assert torch.equal(whole()[1], unpacked()[1])
    with pytest.raises(InputError, match="no variance"):
        module(x.mean)
    with pytest.raises(InputError, match="same shape"):
        module(x.mean, x.variance.unsqueeze(0))


@each(ONE_INPUT)
def test_module_applies_keep_variance_fn(trial: Trial) -> None:
    (x, *_), module = trial.moments(), trial.adf_module()
    mean, variance = seeded(lambda: module(x))()
    built = trial.rule.apply(**trial.case.init, keep_variance_fn=lambda v: v + 1)
    module.keep_variance_fn = built.keep_variance_fn
    kept = seeded(lambda: module(x))()
    assert torch.equal(kept[0], mean)
    assert torch.equal(kept[1], variance + 1)


@each(MODULES)
def test_module_looks_like_the_original(trial: Trial) -> None:
    original, module = trial.original_module(), trial.adf_module()
    built = trial.rule.apply(**trial.case.init)
    for adf in (module, built):
        assert list(adf.state_dict()) == list(original.state_dict())
        assert [*dict(adf.named_parameters())] == [*dict(original.named_parameters())]
        assert adf.extra_repr() == original.extra_repr()
        if trial in DEFAULT:
            assert repr(adf) == repr(original)
    built.load_state_dict(original.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), original.parameters(), strict=True))
    assert not module.training


@each([trial for trial in ONE_INPUT if not getattr(trial.rule.apply, "converts_children", False)])
def test_module_built_directly_computes_what_the_converted_one_does(trial: Trial) -> None:
    (x, *_), module = trial.moments(), trial.adf_module()
    built = trial.rule.apply(**trial.case.init).double().eval()
    built.load_state_dict(trial.original_module().state_dict())
    (one, spread), (other, other_spread) = seeded(lambda: module(x))(), seeded(lambda: built(x))()
    assert torch.equal(one, other)
    assert torch.equal(spread, other_spread)


@each(ONE_INPUT)
def test_module_survives_pickle_and_deepcopy(trial: Trial) -> None:
    (x, *_), module = trial.moments(), trial.adf_module()
    mean, variance = seeded(lambda: module(x))()
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(twin) is type(module)
        twin_mean, twin_variance = seeded(lambda twin=twin: twin(x))()
        assert torch.equal(twin_mean, mean)
        assert torch.equal(twin_variance, variance)


# What a module's rule knows and the functions that it is made of can't: that its two factors are one random variable.
ONE_VARIABLE = {"GlobalResponseNorm"}


ALL_UNCERTAIN = [trial for trial in MODULES if trial in DEFAULT and len(trial.shapes()) == len(trial.case.args)]


@each([trial for trial in ALL_UNCERTAIN if not trial.composed])
def test_module_and_function_agree(trial: Trial) -> None:
    """The original's forward, traced by either engine, is made of functions: their rules do what the module's does."""
    original, inputs = trial.original_module(), trial.moments()
    by_module = trial.adf_module()(*inputs)
    name = type(original).__name__
    original.__class__ = type(name, (type(original),), {})  # a class without a rule of its own is traced through
    by_function = adfify.adfify(original, tuple(x.mean for x in inputs))(*inputs)
    if name in ONE_VARIABLE:
        assert not torch.allclose(by_function.variance, by_module.variance)
        return
    torch.testing.assert_close(by_function.mean, by_module.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(by_function.variance, by_module.variance, rtol=1e-12, atol=1e-12)


# Dropout that is on


def in_training(trial: Trial, inputs: Sequence[Moments], draws: int) -> Tensor:
    """Draws of the original in training, mask and input noise: [draws, *shape]."""
    torch.manual_seed(30)
    original = trial.original(torch.float64, train=True)
    with torch.no_grad():
        noisy = [[x.mean + torch.randn_like(x.mean) * x.std for x in inputs] for _ in range(draws)]
        return torch.stack([original(*draw)[0] for draw in noisy])


@each(OVERLAID["sampled"])
def test_sampled_dropout_is_exact_for_its_mask(trial: Trial) -> None:
    """With the mask held, the mean is affine in the input, and the variance follows from its slopes."""
    converted, inputs = seeded(trial.converted(torch.float64)), trial.moments()

    def mean_of(x: Tensor) -> tuple[Tensor, ...]:
        return (converted(Moments(x, torch.zeros_like(x)))[0].mean,)

    (truth,) = oracles.multiaffine(mean_of, inputs, randomness="same")
    (got,) = converted(*inputs)
    torch.testing.assert_close(got.variance, truth.variance, rtol=1e-9, atol=1e-12)


@each(OVERLAID["sampled"])
def test_sampled_dropout_obeys_the_law_of_total_variance(trial: Trial) -> None:
    """Masks drawn by the rule and noise of the variance it states, against the original: also what shares a mask."""
    inputs, draws = trial.moments(), 6_000
    truth, truth_error = oracles.product_moments(in_training(trial, inputs, draws))
    torch.manual_seed(31)
    converted = trial.converted(torch.float64)
    with torch.no_grad():
        drawn = [converted(*inputs)[0] for _ in range(draws)]
        rows = torch.stack([x.mean + torch.randn_like(x.mean) * x.std for x in drawn])
    got, error = oracles.product_moments(rows)
    limit = oracles.z_limit(got.numel())
    assert_within(got - truth, limit * (error + truth_error).sqrt() + 1e-9, "means, and products of two elements")


@each(OVERLAID["analytic"])
def test_analytic_dropout_agrees_with_the_original_in_training(trial: Trial) -> None:
    inputs, draws = trial.moments(), 20_000
    (got,) = trial.converted(torch.float64)(*inputs)
    deviation = in_training(trial, inputs, draws) - got.mean
    limit = oracles.z_limit(2 * got.mean.numel()) / draws**0.5
    assert_within(deviation.mean(0), limit * deviation.std(0), "mean")
    square = deviation.square()
    assert_within(square.mean(0) - got.variance, limit * square.std(0), "variance")
