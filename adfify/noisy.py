"""The original of an ADF network at noisy inputs: its values, and their gradients with respect to the noise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adfify import original
from adfify.errors import InputError
from adfify.gaussian import interpolation
from adfify.layout import Axis, Inputs, Layout
from adfify.moments import Moments
from adfify.network import ADFNetwork
from adfify.nn import dropout
from adfify.nn.module import counterpart

# Note [The same noise for every picture]
# The noise of a draw depends on the seed, the draw's number and the input's name, and on nothing else: so the answer
# for a picture is the same alone, in any batch, and in chunks of any size.

LEAST_CHUNK, FREE = 8, 2**18
"""Noisy inputs in one pass of a large network: more are slower on a CPU. Activations of a pass that takes little."""


def most_in_a_pass(activations: int) -> int:
    """How many noisy inputs there are in a pass of a network with so many activations for each, if nobody says."""
    return max(LEAST_CHUNK, FREE // max(1, activations))


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
        with torch.device("cpu"):  # whatever the default: the noise is the same everywhere
            return self._noise(name, shape, first)

    def _noise(self, name: str, shape: Sequence[int], first: bool) -> Tensor:
        members = 1 if self.correlations is None else 2
        size = members * torch.Size(shape).numel()
        if self.quasi_random and first and size <= _QUASI_RANDOM_DIMENSIONS:
            sobol = torch.quasirandom.SobolEngine(size, scramble=True, seed=self.seed_of(name))  # type: ignore[no-untyped-call]
            sobol.fast_forward(self.numbers.start)  # type: ignore[no-untyped-call]
            points = sobol.draw(len(self.numbers), dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
            basis = torch.special.ndtri(points).float().reshape(len(self.numbers), members, *shape)
        else:
            of_each = [
                torch.Generator("cpu").manual_seed(self.seed_of(name, members, number)) for number in self.numbers
            ]
            basis = torch.stack([torch.randn((members, *shape), generator=one, dtype=torch.float32) for one in of_each])
        if self.correlations is None:
            singles: Tensor = basis.flatten(0, 1)
            return singles
        return interpolation.correlated(basis, self.correlations).flatten(0, 1)

    def seed_of(self, *what: Any) -> int:
        """Make a seed of 32 bits, of which torch's generator on the CPU takes no more."""
        return int.from_bytes(hashlib.blake2b(repr((self.seed, *what)).encode(), digest_size=4).digest(), "big")


@dataclass(frozen=True)
class Source:
    """One independent cause of uncertainty: a network's input, or the masks of a dropout.

    Attributes:
        name: of its node in the graph.
        is_mask: whether it belongs to the model.
        first: whether it is the first of the sources.
        std: standard deviations, broadcastable to ``drawn`` without its first dimension's draws: ``[1, ...]``.
        drawn: ``[K, ...]``, the noisy values: leaves of the autograd graph.
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
        self.precision = precision or autocast_state()
        self.elements = 0
        self._plain: dict[str, nn.Module] = {}
        self._sources: list[Source] = []
        self._masks: list[Axis | None] = []
        self._draws, self._rows, self._needs_gradients = Draws(0, range(1)), 0, False
        self._batched, self._mask_count, self._alone = True, 0, 0

    def at(self, inputs: Inputs, layout: Layout, draws: Draws, gradients: bool) -> tuple[Tensor, list[Source]]:
        """The output that is asked for at noisy inputs, ``[K, M]``, and the sources of their noise.

        Args:
            inputs: of one example.
            layout: of the network.
            draws: the noise of the inputs.
            gradients: whether the outputs are differentiable with respect to the sources.
        """
        self._draws, self._needs_gradients, self._sources, self._masks = draws, gradients, [], list(layout.masks)
        self._batched, self._mask_count, self._alone = layout.at is not None, 0, 0
        self._rows = max(draws.count, layout.least)
        with torch.set_grad_enabled(gradients), torch.autocast(*self.precision):
            noisy = [self._noisy(name, x) for name, x in zip(inputs.names, inputs.leaves, strict=True)]
            if layout.at is not None:
                values = self._values(inputs, layout, noisy, self._rows)[: draws.count]
            else:
                values = torch.cat([self._lone(inputs, layout, noisy, draw) for draw in range(draws.count)])
        return values, self._sources

    def _values(self, inputs: Inputs, layout: Layout, noisy: Sequence[Any], rows: int) -> Tensor:
        parts = zip(inputs.leaves, noisy, inputs.axes, strict=True)
        leaves = [
            (self._filled(drawn) if isinstance(x, Moments) else x.repeat(rows, *[1] * (x.dim() - 1)))
            if axis is not None
            else drawn
            for x, drawn, axis in parts
        ]
        with dropout.masks_by(self._mask):
            return layout.values(self.run(*replace(inputs, leaves=tuple(leaves)).arranged()), rows)

    def _lone(self, inputs: Inputs, layout: Layout, noisy: Sequence[Any], draw: int) -> Tensor:
        """Of one draw, in a pass of its own: all that is given is one example."""
        self._alone, self._mask_count = draw, 0
        parts = zip(inputs.leaves, noisy, strict=True)
        leaves = [drawn[draw] if isinstance(x, Moments) else drawn for x, drawn in parts]
        return self._values(inputs, layout, leaves, 1)

    def _filled(self, drawn: Tensor) -> Tensor:
        """With the last of them again, where a single one would be squeezed away."""
        missing = self._rows - len(drawn)
        return torch.cat((drawn, drawn[-1:].expand(missing, *drawn.shape[1:]))) if missing else drawn

    def without_noise(self, inputs: Inputs) -> tuple[Any, list[tuple[int, ...]], int]:
        """Outputs in the model's structure at the means, masks being 1; the masks' shapes; elements of all results."""
        masks: list[tuple[int, ...]] = []
        self.elements = 0

        def one(x: Tensor, variance: float, shape: tuple[int, ...]) -> Tensor:
            masks.append(shape)
            return torch.ones(shape, dtype=x.dtype, device=x.device)

        leaves = [x.mean if isinstance(x, Moments) else x for x in inputs.leaves]
        with torch.no_grad(), torch.autocast(*self.precision), dropout.masks_by(one):
            outputs = self.run(*replace(inputs, leaves=tuple(leaves)).arranged())
        return outputs, masks, self.elements

    def _noisy(self, name: str, x: Any) -> Any:
        if not isinstance(x, Moments):
            return x
        lone = x if self._batched else Moments(x.mean.unsqueeze(0), x.variance.unsqueeze(0))
        std = lone.variance.sqrt()
        noise = self._draws.noise(name, lone.shape[1:], not self._sources).to(std)
        drawn = torch.addcmul(lone.mean.to(std), std, noise).to(x.mean.dtype)
        return self._leaf(name, False, std, _in_format_of(lone.mean, drawn))

    # Note [Masks as Gaussian factors]
    # Gradients are taken by a mask, so it has to be a continuous variable: a Gaussian factor of the mask's mean and
    # variance. That is exact for what is linear in the masks after the dropout, and good where many of them are
    # summed; a function that bends right behind a dropout sees more than two moments. Without gradients, they are
    # zeros and ones.
    def _mask(self, x: Tensor, variance: float, shape: tuple[int, ...]) -> Tensor:
        number, self._mask_count = self._mask_count, self._mask_count + 1
        if not self._batched:
            made = [source for source in self._sources if source.is_mask]
            if number < len(made):
                return made[number].drawn[self._alone]
            return self._drawn_mask(number, x, variance, shape)[self._alone]
        axis = self._masks[number]
        if axis is None or axis.length != 1 or shape[axis.index] != self._rows:
            raise InputError(
                f"a dropout of this network masks a tensor of shape {tuple(x.shape)}, of which no one axis is the "
                f"{self._rows} noisy inputs: joint moments can't tell whose masks are whose. Convert with "
                "dropout='off'."
            )
        of_each = (*shape[: axis.index], *shape[axis.index + 1 :])
        return self._filled(self._drawn_mask(number, x, variance, of_each)).movedim(0, axis.index)

    def _drawn_mask(self, number: int, x: Tensor, variance: float, shape: tuple[int, ...]) -> Tensor:
        name = f"mask {len(self._sources)}"
        noise = self._draws.noise(name, shape, not self._sources).to(x)
        std = torch.full((1,) * noise.dim(), variance**0.5, dtype=x.dtype, device=x.device)
        if self._needs_gradients:
            return self._leaf(name, True, std, 1 + std * noise)
        kept = 1 / (1 + variance)
        threshold = torch.special.ndtri(torch.tensor(kept, dtype=torch.float64, device="cpu")).to(noise)
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
                self.elements += leaf.numel()
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


def gradients(outputs: Sequence[Tensor], sources: Sequence[Source]) -> list[Tensor]:
    """For each source ``[K, k, D]``: gradients of k outputs ``[K]`` each, times the source's std."""
    by_source: list[list[Tensor]] = [[] for _ in sources]
    for position, output in enumerate(outputs):
        found = by_each(output, [source.drawn for source in sources], again=position + 1 < len(outputs))
        for source, value, rows in zip(sources, found, by_source, strict=True):
            rows.append((value * source.std).flatten(1).to(output.dtype))
    return [torch.stack(rows, 1) for rows in by_source]


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
