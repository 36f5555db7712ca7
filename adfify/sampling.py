"""Monte Carlo: the reference on the original network, and dropout's own uncertainty by repeated passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adfify import call_signature
from adfify.errors import InputError
from adfify.layout import Batched
from adfify.moments import Moments, as_moments, variance_dtype
from adfify.network import ADFNetwork
from adfify.streaming import Powers


@dataclass(frozen=True)
class MonteCarlo:
    """What many noisy passes through the original network gave, in the structure of its output.

    Attributes:
        mean: average of the outputs.
        variance: their sample variance (divided by draws - 1), squared units of ``mean``.
        draws: how many noisy passes for each input.
        mean_error: standard error of ``mean``.
        std_error: standard error of ``std``, from the fourth central moment of the draws.
        covariance: with a control, ``[N, k, k]``: of the outputs ``indices``, which the rest is of, too, ``[N, k]``.
        indices: with a control, ``[N, k]``, which outputs these are.
    """

    mean: Any
    variance: Any
    draws: int
    mean_error: Any
    std_error: Any
    covariance: Tensor | None = None
    indices: Tensor | None = None

    @property
    def std(self) -> Any:
        """Sample standard deviation of the outputs."""
        return pytree.tree_map(torch.sqrt, self.variance)


def monte_carlo(
    model: nn.Module,
    x: Any,
    noise_variance: float | Tensor | None = None,
    draws: int = 1000,
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    control: ADFNetwork | None = None,
    outputs: int | Sequence[int] | Tensor | str = 5,
    batched: Batched = "auto",
) -> MonteCarlo:
    """The moments of a network's outputs under Gaussian input noise, by brute force: the truth ADF is held against.

    Memory does not grow with ``draws``: moments are streamed, and centred on the noiseless output, so that a small
    variance beside a large mean loses no digits.

    Args:
        model: the *original* network, not the ADF one; it is run in the mode it is in, without gradients.
        x: what the model takes: one input ``[N, ...]``, or a tuple of several, each in the structure of the model's own
            call. Floating-point tensors in it are noisy; Moments have their own variance.
        noise_variance: variance of the noise, broadcastable to every noisy tensor, in its squared units; not needed
            where all of those are Moments.
        draws: noisy passes for each input, at least 2.
        seed: of a generator of its own: the same answer every time.
        batch_size: noisy inputs in one pass.
        progress: called with the number of draws just done: ``tqdm(total=draws).update``, for one.
        control: the converted network, whose gradients at the draws are then used as well. Mean and variance stay
            unbiased, whatever the network: the mean is that of the outputs less their linear part, the variance by
            Note [Covariance from gradients] of adfify.gaussian.interpolation, at random correlations. What 10 draws
            give then, plain Monte Carlo gives with 100 to some 1000; each costs a pass backwards more per output.
            An odd draw is left away. An unbiased variance may be below 0 where the network bends a lot and draws are
            few, and the std is then NaN.
        outputs: with ``control``, which ones, as in :meth:`ADFNetwork.joint`; there must be one output tensor.
        batched: with ``control``, which inputs hold the batch, likewise.

    Raises:
        InputError: fewer than 2 draws (6 with a control), no variance or two of them, outputs that are not
            floating-point tensors, or a control that is another network.
    """
    if isinstance(model, ADFNetwork):
        raise InputError(
            "monte_carlo runs the original network, and was given the converted one; that goes to control=."
        )
    inputs = _Inputs.of(x, noise_variance)
    if control is not None:
        return _controlled(model, control, inputs, draws, seed, outputs, batch_size, progress, batched)
    if draws < 2:
        raise InputError(f"draws={draws}; a variance needs at least 2.")
    generator = torch.Generator(inputs.device).manual_seed(seed)
    with torch.no_grad():
        centre, spec = pytree.tree_flatten(model(*inputs.at([x.mean for x in inputs.noisy])))
        for leaf in centre:
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                raise InputError(f"the network returned {type(leaf).__name__} among its outputs; it has no moments.")
        sums = [Powers(leaf) for leaf in centre]
        repeats = _repeats(model, inputs, batch_size, centre)
        done = 0
        while done < draws:
            count = min(repeats, draws - done)
            noisy = model(*inputs.drawn(count, generator))
            for leaf, powers in zip(pytree.tree_leaves(noisy), sums, strict=True):
                powers.add(leaf.reshape(count, *powers.shape))
            done += count
            if progress is not None:
                progress(count)
    by_part = [pytree.tree_unflatten(list(part), spec) for part in zip(*(p.moments() for p in sums), strict=True)]
    return MonteCarlo(by_part[0], by_part[1], draws, by_part[2], by_part[3])


def _controlled(
    model: nn.Module,
    control: ADFNetwork,
    inputs: _Inputs,
    draws: int,
    seed: int,
    outputs: int | Sequence[int] | Tensor | str,
    batch_size: int,
    progress: Callable[[int], None] | None,
    batched: Batched,
) -> MonteCarlo:
    from adfify import interpolated
    from adfify.joint import Request, joined, questions, refuse_training_statistics
    from adfify.noisy import Original

    if draws < LEAST_CONTROLLED:
        raise InputError(f"draws={draws}; with a control there must be {LEAST_CONTROLLED} or more, in pairs.")
    refuse_training_statistics(control)
    if any(origin is not None and origin.mask for origin in (n.meta.get("origin") for n in control.graph.nodes)):
        raise InputError("the control's dropout is random, and the model's is not: convert with dropout='off'.")
    draws = 2 * (draws // 2)
    with torch.inference_mode(False), torch.no_grad():
        means = [x.mean.clone() for x in inputs.noisy]
        moments = [Moments(mean, x.variance.clone()) for mean, x in zip(means, inputs.noisy, strict=True)]
        leaves = tuple(control.signature.flatten(inputs.at(moments), {}))
        given, own = model(*inputs.at(means)), Original(control).run(*control.signature.flatten(inputs.at(means), {}))
        same = pytree.tree_structure(given) == pytree.tree_structure(own)
        pairs = zip(pytree.tree_leaves(given), pytree.tree_leaves(own), strict=False)
        if not (same and all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)):
            raise InputError(f"control is another network than {type(model).__name__}: give adfify(model) of the same.")
        request = Request(outputs, samples=draws, seed=seed, chunk_size=batch_size, batched=batched)
        found = joined([interpolated.unbiased(question) for question in questions(control, leaves, request)])
    if progress is not None:
        progress(draws)
    return MonteCarlo(
        found.mean, found.variance, draws, found.mean_error, found.std_error, found.covariance, found.indices
    )


LEAST_CONTROLLED = 6
"""Three pairs: the mean gradient of two of them is the control variate of the third's values."""


@dataclass(frozen=True)
class _Inputs:
    """What a model is called with.

    Attributes:
        args: by position; the rest is certain.
        noisy: of the tensors in it, mean and variance of those that are uncertain, in order.
    """

    args: tuple[Any, ...]
    noisy: tuple[Moments, ...]

    @classmethod
    def of(cls, x: Any, noise_variance: float | Tensor | None) -> _Inputs:
        args, noisy = call_signature.positional(x), []

        def moments(value: Any, path: str) -> Any:
            if isinstance(value, Moments) or value.is_floating_point():
                noisy.append(as_moments(_with_noise(value, noise_variance, path), 0.0, path))
            return value

        call_signature.mapped(args, moments, "x")
        if not noisy:
            raise InputError(f"x={x!r:.60} has no floating-point tensor in it, and so nothing is uncertain.")
        if noise_variance is not None and not any(map(_is_plain, call_signature.leaves(args))):
            raise InputError("x is Moments, which have their own variance; leave noise_variance away.")
        return cls(args, tuple(noisy))

    @property
    def device(self) -> torch.device:
        return self.noisy[0].device

    def at(self, values: Sequence[Any]) -> Any:
        """The arguments, with these values in place of what is uncertain."""
        rest = iter(values)
        return call_signature.mapped(
            self.args, lambda x, _: next(rest) if isinstance(x, Moments) or x.is_floating_point() else x, "x"
        )

    def drawn(self, count: int, generator: torch.Generator) -> Any:
        """The arguments of so many draws, one after the other along the first dimension."""
        return self.at([_draw(x.mean, x.std, count, generator) for x in self.noisy])


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _with_noise(value: Tensor | Moments, noise_variance: float | Tensor | None, path: str) -> Moments:
    if isinstance(value, Moments):
        return value
    if noise_variance is None:
        raise InputError(f"{path} is a plain tensor: give noise_variance, or Moments(x, variance).")
    return Moments(value, torch.as_tensor(noise_variance, dtype=variance_dtype(value.dtype), device=value.device))


def _draw(mean: Tensor, std: Tensor, count: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn((count, *mean.shape), generator=generator, dtype=std.dtype, device=mean.device)
    drawn = (mean + std * noise).to(mean.dtype)
    return drawn.flatten(0, 1) if mean.dim() else drawn[0]


# Note [Draws side by side]
# Many draws in one pass are faster, and right only where the model keeps what stands along the first dimension apart:
# not where time does (nn.LSTM without batch_first), and not where examples are mixed. Two draws, each for itself and
# both together, show which it is. Several inputs are drawn one by one: which of them hold the batch, nobody has said.


def _repeats(model: nn.Module, inputs: _Inputs, batch_size: int, centre: Sequence[Tensor]) -> int:
    """How many draws may be in one pass."""
    mean = inputs.noisy[0].mean
    repeats = max(1, batch_size // len(mean)) if mean.dim() and len(mean) else 1
    if repeats == 1 or len(list(call_signature.leaves(inputs.args))) > 1:
        return 1
    both = _draw(mean, inputs.noisy[0].std, 2, torch.Generator(inputs.device).manual_seed(0))
    apart = [pytree.tree_leaves(model(*inputs.at([one]))) for one in both.chunk(2)]
    try:
        together = pytree.tree_leaves(model(*inputs.at([both])))
    except RuntimeError:  # of a model that takes no other size
        return 1
    for a, b, whole, single in zip(*apart, together, centre, strict=True):
        expected = torch.cat((a, b)) if single.dim() else a
        spread = float((a - b).abs().max()) if a.numel() else 0.0
        if whole.shape != expected.shape or not torch.allclose(whole, expected, rtol=1e-5, atol=1e-2 * spread):
            return 1
    return repeats


@dataclass(frozen=True)
class Prediction:
    """A prediction with its variance in two parts (Loquercio, Segu & Scaramuzza 2020, equation 8).

    Attributes:
        mean: of the outputs.
        data_variance: from the noise of the inputs.
        model_variance: from dropout; 0 for a network whose dropout is off.
    """

    mean: Tensor
    data_variance: Tensor
    model_variance: Tensor

    @property
    def variance(self) -> Tensor:
        """The total, by the law of total variance: data plus model."""
        return self.data_variance + self.model_variance

    @property
    def std(self) -> Tensor:
        """Square root of the total variance."""
        return self.variance.sqrt()


def predict(
    adf: ADFNetwork,
    x: Any,
    draws: int | None = None,
    *,
    seed: int = 0,
    one_pass: bool = False,
    batched: Batched = "auto",
) -> Prediction:
    """Total predictive uncertainty, split into the data's part and the model's.

    By :meth:`ADFNetwork.joint`, or as published: ADF for the data's part, Monte Carlo dropout for the model's.

    Source: Loquercio, Segu & Scaramuzza, RA-L 2020, algorithm 1 (``one_pass=True``).

    Args:
        adf: a network with one output tensor, converted with ``dropout="sampled"`` or ``"analytic"``, or with dropout
            off: then there is no model's part.
        x: what the network takes: one input, a tensor or Moments, or a tuple of several.
        draws: with ``one_pass``, passes, each with masks of its own, at least 2; 20 by default.
        seed: of the noise and the masks: the same answer every time; torch's own random state is left as it was.
        one_pass: the published algorithm. Its data variance takes units as independent, and is too small on deep
            networks, often by an order of magnitude.
        batched: which inputs hold the batch, as in :meth:`ADFNetwork.joint`.

    Raises:
        InputError: fewer than 2 draws, draws without ``one_pass``, or a network with other than one output.
    """
    args = call_signature.positional(x)
    if not one_pass:
        if draws is not None:
            raise InputError(f"draws={draws} is for one_pass=True; joint moments choose their own number.")
        joint = adf.joint(*args, outputs="all", seed=seed, batched=batched)
        model_variance = torch.zeros_like(joint.variance) if joint.model_variance is None else joint.model_variance
        parts = (joint.mean, joint.variance - model_variance, model_variance)
        return Prediction(*map(joint.as_output, parts))
    draws = 20 if draws is None else draws
    if draws < 2:
        raise InputError(f"draws={draws}; a variance needs at least 2.")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        passes = [adf(*args) for _ in range(draws)]
    if not isinstance(passes[0], Moments):
        raise InputError(f"predict() takes a network with one output, and this one returns {type(passes[0]).__name__}.")
    means = torch.stack([moments.mean for moments in passes])
    if (
        any(node.meta["origin"].mask for node in adf.graph.nodes if "origin" in node.meta)
        and not means.diff(dim=0).any()
    ):
        raise InputError("the masks' variance is inside the data's with dropout='analytic': leave one_pass away.")
    variances = torch.stack([moments.variance for moments in passes])
    return Prediction(means.mean(0), variances.mean(0), means.var(0))
