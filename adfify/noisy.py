"""The original of an ADF network at noisy inputs: its values, and their gradients with respect to the noise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adfify import original
from adfify.errors import InputError
from adfify.gaussian import interpolation
from adfify.moments import Moments
from adfify.network import ADFNetwork
from adfify.nn import dropout
from adfify.nn.module import counterpart

# Note [The same noise for every picture]
# The noise of a draw depends on the seed, the draw's number and the input's name, and on nothing else: so the answer
# for a picture is the same alone, in any batch, and in chunks of any size.

LEAST_CHUNK = 8
"""Noisy inputs in one pass of a large network: more are slower on a CPU."""

_QUASI_RANDOM_DIMENSIONS = 2048


@dataclass(frozen=True)
class Draws:
    """Which noise is drawn.

    Attributes:
        seed: of all.
        numbers: of the draws, or of the pairs.
        correlations: of each pair, ``[P]``; None for single, independent draws.
        quasi_random: whether the pairs are points of a scrambled Sobol sequence, of which there must be all.
    """

    seed: int
    numbers: range
    correlations: Tensor | None = None
    quasi_random: bool = False

    @property
    def count(self) -> int:
        """How many noisy inputs there are for each picture."""
        return len(self.numbers) * (1 if self.correlations is None else 2)

    def noise(self, name: str, shape: Sequence[int], first: bool = True) -> Tensor:
        """``[count, *shape]``: standard normal, float32, on the CPU; the two of a pair one after the other.

        Args:
            name: of the source.
            shape: of the noise.
            first: whether it is the first source: a second Sobol sequence would not be independent of the first.
        """
        members = 1 if self.correlations is None else 2
        size = members * torch.Size(shape).numel()
        if self.quasi_random and first and size <= _QUASI_RANDOM_DIMENSIONS:
            sobol = torch.quasirandom.SobolEngine(size, scramble=True, seed=self._seed(name))  # type: ignore[no-untyped-call]
            sobol.fast_forward(self.numbers.start)  # type: ignore[no-untyped-call]
            points = sobol.draw(len(self.numbers), dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
            basis = torch.special.ndtri(points).float().reshape(len(self.numbers), members, *shape)
        else:
            of_each = [torch.Generator().manual_seed(self._seed(name, members, number)) for number in self.numbers]
            basis = torch.stack([torch.randn((members, *shape), generator=one) for one in of_each])
        if self.correlations is None:
            singles: Tensor = basis.flatten(0, 1)
            return singles
        return interpolation.correlated(basis, self.correlations).flatten(0, 1)

    def _seed(self, *what: Any) -> int:
        """32 bits, of which torch's generator on the CPU takes no more."""
        return int.from_bytes(hashlib.blake2b(repr((self.seed, *what)).encode(), digest_size=4).digest(), "big")


@dataclass(frozen=True)
class Source:
    """One independent cause of uncertainty: a network's input, or the masks of a dropout.

    Attributes:
        name: of its node in the graph.
        is_mask: whether it belongs to the model.
        first: whether it is the first of the sources.
        std: standard deviations, broadcastable to ``drawn`` without its first dimension's draws: ``[N, ...]``.
        drawn: ``[K * N, ...]``, the noisy values: leaves of the autograd graph.
    """

    name: str
    is_mask: bool
    first: bool
    std: Tensor
    drawn: Tensor


Precision = tuple[str, torch.dtype, bool]


def autocast_state() -> Precision:
    """The kind of device, dtype and whether it is on, of the autocast that is in force: a GPU's, or else the CPU's."""
    kind = "cuda" if torch.is_autocast_enabled("cuda") else "cpu"
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


class Original(fx.Interpreter):
    """Runs the original operations of an ADF network on its tensors.

    Args:
        network: whose original.
        precision: the user's autocast, see :func:`autocast_state`; by default that of now. Only the network runs in
            it: sums of squares of gradients would not survive it.
    """

    def __init__(self, network: ADFNetwork, precision: Precision | None = None) -> None:
        super().__init__(network)
        self.extra_traceback = False  # an error of the user's is said in our words
        self.network = network
        self._precision = precision or autocast_state()
        self._elements = 0
        self._plain: dict[str, nn.Module] = {}
        self._sources: list[Source] = []
        self._draws, self._pictures, self._needs_gradients = Draws(0, range(1)), 0, False

    def at(self, inputs: Sequence[Any], draws: Draws, gradients: bool) -> tuple[Any, list[Source]]:
        """Outputs ``[K * N, ...]`` in the model's structure, and the sources of their noise.

        Args:
            inputs: of the network; Moments are the uncertain ones.
            draws: the noise of the inputs.
            gradients: whether the outputs are differentiable with respect to the sources.
        """
        self._draws, self._needs_gradients, self._sources, self._elements = draws, gradients, [], 0
        self._pictures = next(len(x.mean) for x in inputs if isinstance(x, Moments))
        names = [str(node.target) for node in self.network.graph.nodes if node.op == "placeholder"]
        with torch.set_grad_enabled(gradients), torch.autocast(*self._precision):
            noisy = [self._noisy(name, x) for name, x in zip(names, inputs, strict=False)]
            with dropout.masks_by(self._mask):
                outputs = self.run(*noisy)
        return outputs, self._sources

    @property
    def activations(self) -> int:
        """Elements of all results for one input, in the last run."""
        return self._elements // max(1, self._pictures * self._draws.count)

    @contextmanager
    def without_noise(self) -> Iterator[None]:
        """Within it, :meth:`run` multiplies by no masks."""
        with dropout.masks_by(lambda x, variance, shape: torch.ones(shape, dtype=x.dtype, device=x.device)):
            yield

    def _noisy(self, name: str, x: Any) -> Any:
        if not isinstance(x, Moments):
            batched = isinstance(x, Tensor) and x.dim() > 0 and len(x) == self._pictures
            return x.repeat(self._draws.count, *[1] * (x.dim() - 1)) if batched else x
        noise = self._draws.noise(name, x.shape[1:], not self._sources).to(x.variance).unsqueeze(1)
        std = x.variance.sqrt()
        drawn = torch.addcmul(x.mean.to(std.dtype), std, noise).flatten(0, 1).to(x.mean.dtype)
        return self._leaf(name, False, std, _in_format_of(x.mean, drawn))

    # Note [Masks as Gaussian factors]
    # Gradients are taken by a mask, so it has to be a continuous variable: a Gaussian factor of the mask's mean and
    # variance. That is exact for what is linear in the masks after the dropout, and good where many of them are
    # summed; a function that bends right behind a dropout sees more than two moments. Without gradients, they are
    # zeros and ones.
    def _mask(self, x: Tensor, variance: float, shape: tuple[int, ...]) -> Tensor:
        name, inputs = f"mask {len(self._sources)}", self._draws.count * self._pictures
        if len(x) != inputs:
            raise InputError(
                f"a dropout of this network masks a tensor of shape {tuple(x.shape)}, in which the {inputs} noisy "
                "inputs are not the first dimension: joint moments can't tell whose masks are whose. Convert with "
                "dropout='off'."
            )
        noise = self._draws.noise(name, shape[1:], not self._sources).to(x).repeat_interleave(self._pictures, 0)
        std = torch.full((1,) * len(shape), variance**0.5, dtype=x.dtype, device=x.device)
        if self._needs_gradients:
            return self._leaf(name, True, std, 1 + std * noise)
        kept = 1 / (1 + variance)
        threshold = torch.special.ndtri(torch.tensor(kept, dtype=torch.float64)).to(noise)
        return self._leaf(name, True, std, (noise < threshold).to(x) / kept)

    def _leaf(self, name: str, is_mask: bool, std: Tensor, drawn: Tensor) -> Tensor:
        drawn = drawn.detach().requires_grad_(self._needs_gradients)
        self._sources.append(Source(name, is_mask, not self._sources, std, drawn))
        return drawn

    def run_node(self, node: fx.Node) -> Any:
        origin: original.Origin | None = node.meta.get("origin")
        if origin is None or node.op in ("placeholder", "get_attr", "output"):
            result = super().run_node(node)
        else:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            result = self._run_original(node, origin, args, kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._elements += leaf.numel()
        return result

    def _run_original(self, node: fx.Node, origin: original.Origin, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            _refuse_inner_masks(str(node.target), self.network.get_submodule(str(node.target)), origin)
        if origin.mask is not None:
            certain = Moments(args[0], torch.zeros_like(args[0]))
            rule = self._masking(str(node.target), origin.mask) if node.op == "call_module" else origin.mask
            return rule(certain, *args[1:], **kwargs).mean
        if origin.family == "dropout":
            return args[0]
        if node.op == "call_module" or origin.operation is None:
            return self._original_module(str(node.target))(*args, **kwargs)
        return origin.operation(*args, **kwargs)

    def _original_module(self, path: str) -> nn.Module:
        if path not in self._plain:
            self._plain[path] = original.of_module(self.network.get_submodule(path))
        return self._plain[path]

    def _masking(self, path: str, mask: Any) -> nn.Module:
        return counterpart(self._original_module(path), mask)


def gradients(outputs: Sequence[Tensor], sources: Sequence[Source], draws: int) -> list[Tensor]:
    """For each source ``[K, N, k, D]``: gradients of k outputs ``[K * N]`` each, times the source's std."""
    by_source: list[list[Tensor]] = [[] for _ in sources]
    for position, output in enumerate(outputs):
        found = by_each(output, [source.drawn for source in sources], again=position + 1 < len(outputs))
        for source, value, rows in zip(sources, found, by_source, strict=True):
            scaled = value.reshape(draws, -1, *value.shape[1:]) * source.std
            rows.append(scaled.flatten(2).to(output.dtype))
    return [torch.stack(rows, 2) for rows in by_source]


def by_each(output: Tensor, tensors: Sequence[Tensor], again: bool) -> list[Tensor]:
    """The gradient of a sum of outputs by each of several tensors, 0 where it does not depend on one.

    Args:
        output: what is summed.
        tensors: of its autograd graph.
        again: whether the graph is needed once more.
    """
    found: Sequence[Tensor | None] = (None,) * len(tensors)
    if output.requires_grad:
        found = torch.autograd.grad(output.sum(), list(tensors), retain_graph=again, allow_unused=True)
    return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(tensors, found, strict=True)]


def _refuse_inner_masks(path: str, module: nn.Module, origin: original.Origin) -> None:
    """Raise for random masks inside a module that the original runs as a whole."""
    inner = [name for name, child in module.named_modules() if child is not module and dropout.is_random(child)]
    if origin.mask is None and inner:
        raise InputError(
            f"'{path}.{inner[0]}' is a dropout inside {type(module).__name__}, whose masks joint moments can't follow. "
            "Convert with dropout='off'."
        )


def _in_format_of(like: Tensor, x: Tensor) -> Tensor:
    """Keeps channels_last, in which convolutions may be several times faster."""
    channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last) if channels_last and not like.is_contiguous() else x
