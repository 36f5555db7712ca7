"""Joint moments by statistical linearisation at the variances of the one pass: `samples=0`.

Note [Slopes and residuals of any rule]
With the variance v of its input held fixed, the derivative of a rule's mean by the mean of its input is the slope of
the best linear fit (Bonnet 1964; Stein, Ann. Stat. 9, 1981, lemma 1: E[f'(x)] = dE[f(x)]/dm), and what the fit misses
has the variance d = Var[f(x)] - J v J'. So the mean path's own gradients, variances detached, are those of a linear
network, into which every non-linear operation injects independent noise of variance d. The diagonal of J v J' is the
mean of (J sqrt(v) e)^2 over random signs e, for each input in turn (Bekas, Kokiopoulou & Saad, Appl. Numer. Math. 57,
2007): with one e exactly where J is diagonal, as of activations, which shows in J sqrt(v) e = (J' 1) sqrt(v) e, and
where elements of several inputs meet one by one; elsewhere (maxima, softmax, attention, norms) with PROBES of them, and
off by up to sqrt(2 / PROBES) of that part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from adfify.errors import InputError
from adfify.joint import Question
from adfify.layout import Inputs, Layout
from adfify.moments import Attribution, JointMoments, Moments, as_moments, is_moments, on_each
from adfify.network import ADFNetwork
from adfify.noisy import by_each
from adfify.original import Origin

PROBES = 8
Means = Callable[..., tuple[Tensor, ...]]
LINEAR = frozenset({None, "affine", "structural", "metadata"})


def _is_linear(origin: Origin) -> bool:
    """Whether it injects nothing: a pooling that is exact averages, a normalisation that is has its statistics."""
    return origin.family in LINEAR or (origin.exact and origin.family in ("pooling", "normalization"))


def moments(question: Question) -> JointMoments:
    """Of one picture."""
    path, layout = _MeanPath(question.network, question.request.seed), question.layout
    with torch.enable_grad():
        outputs = path.run(*question.repeated.arranged())
        plain = pytree.tree_map_only(Moments, lambda x: x.mean, outputs, is_leaf=is_moments)
        mean = layout.values(plain, layout.least)[:1]
        indices = question.request.indices(mean.detach())
        chosen = mean.gather(1, indices)
        sources = {**path.inputs, **path.residuals}
        tensors = [tensor for tensor, _ in sources.values()]
        rows = [by_each(output, tensors, again=n + 1 < chosen.shape[1]) for n, output in enumerate(chosen.unbind(1))]
    covariance = chosen.new_zeros(*indices.shape, indices.shape[1])
    shares: dict[str, Tensor] = {}
    for position, (name, (_, variance)) in enumerate(sources.items()):
        gradient = torch.stack([row[position] for row in rows]).unsqueeze(0)  # [1, k, ...]
        weighted = gradient * variance
        covariance += weighted.flatten(2) @ gradient.flatten(2).mT
        shares[name] = weighted * gradient
    attribution = Attribution(
        inputs=_of_inputs({name: shares[name] for name in path.inputs}, question.inputs),
        masks=_of_masks({name: shares[name] for name in path.residuals if name in path.masks}, layout),
        layers={name: shares[name].flatten(2).sum(2) for name in path.residuals if name not in path.masks},
    )
    of_masks = [share.flatten(2).sum(2) for share in attribution.masks.values()]
    none = torch.zeros(1, dtype=torch.int64, device=indices.device)
    return JointMoments(
        mean=chosen.detach(),
        covariance=covariance,
        indices=indices.contiguous(),
        variance=covariance.diagonal(dim1=-2, dim2=-1),
        method="adjoint",
        samples=none,
        draws=none,
        model_variance=sum(of_masks, torch.zeros_like(mean.gather(1, indices))).detach(),
        attribution=attribution if question.request.attribution else None,
        shape=layout.shape,
        batch_axis=layout.batch_axis,
    )


def _of_inputs(shares: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """``[1, k, ...]`` without the batch's axis, where the network has it."""
    axes = dict(zip(inputs.names, inputs.axes, strict=True))
    found = {}
    for name, share in shares.items():
        axis = axes.get(name)
        found[name] = share if axis is None else share.select(axis + 2, 0)
    return found


def _of_masks(shares: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    axes = zip(shares.items(), layout.masks, strict=False)
    return {name: x if axis is None else x.select(axis.index + 2, 0) for (name, x), axis in axes}


class _MeanPath(fx.Interpreter):
    """Runs an ADF network with its variances detached, and notes what noise every operation injects."""

    def __init__(self, network: ADFNetwork, seed: int) -> None:
        super().__init__(network)
        self.extra_traceback = False
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self.inputs: dict[str, tuple[Tensor, Tensor]] = {}
        self.residuals: dict[str, tuple[Tensor, Tensor]] = {}
        self.masks: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n.target is as_moments:
            given = self.fetch_args_kwargs_from_env(n)[0][0]
            x = Moments(given.mean.detach().requires_grad_(), given.variance.detach())
            self.inputs[str(n.all_input_nodes[0].target)] = (x.mean, x.variance)
            return x
        result = on_each(lambda x: Moments(x.mean, x.variance.detach()), super().run_node(n))
        origin = n.meta.get("origin")
        if origin is not None and origin.mask is not None:
            self._refuse_sampled(n, origin)
        if origin is not None and not _is_linear(origin):
            self._note(n, origin, result)
        return result

    def _refuse_sampled(self, node: fx.Node, origin: Origin) -> None:
        module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        if origin.mask in (type(module), module):
            raise InputError(
                f"'{node.name}' draws a mask in every pass (dropout='sampled'), which samples=0 can't linearise: "
                "convert with dropout='analytic', or take samples."
            )
        self.masks.add(node.name)

    def _note(self, node: fx.Node, origin: Origin, result: Any) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        given, spec = pytree.tree_flatten((args, kwargs), is_leaf=is_moments)
        uncertain = [position for position, leaf in enumerate(given) if is_moments(leaf)]
        variances = [given[position].variance for position in uncertain]

        def means(*inputs: Tensor) -> tuple[Tensor, ...]:
            leaves = list(given)
            for position, mean, variance in zip(uncertain, inputs, variances, strict=True):
                leaves[position] = Moments(mean, variance)
            again, named = pytree.tree_unflatten(leaves, spec)
            outputs = getattr(self, node.op)(node.target, again, named)
            return tuple(x.mean for x in pytree.tree_leaves(outputs, is_leaf=is_moments) if is_moments(x))

        inputs = [given[position].mean.detach() for position in uncertain]
        outputs = [x for x in pytree.tree_leaves(result, is_leaf=is_moments) if is_moments(x)]
        explained = self._explained(means, inputs, variances, origin.family == "arithmetic")
        for number, (x, part) in enumerate(zip(outputs, explained, strict=True)):
            if x.mean.requires_grad:
                name = node.name if len(outputs) == 1 else f"{node.name}.{number}"
                self.residuals[name] = (x.mean, (x.variance - part).clamp(min=0))

    def _explained(self, means: Means, inputs: list[Tensor], variances: list[Tensor], one_by_one: bool) -> list[Tensor]:
        """The diagonals of J v J'."""
        squares: list[Tensor] = []
        for position, variance in enumerate(variances):
            along, signed = self._probe(means, inputs, position, variance)
            parts = [part.square() for part in along]
            shapes = {tuple(x.shape) for x in (*along, *inputs)}
            meet = one_by_one and len(along) == 1 and along[0].shape == max(inputs, key=Tensor.numel).shape
            if not (meet or (len(shapes) == 1 and _is_diagonal(means, inputs, position, signed, along))):
                for _ in range(PROBES - 1):
                    more, _ = self._probe(means, inputs, position, variance)
                    parts = [part + other.square() for part, other in zip(parts, more, strict=True)]
                parts = [part / PROBES for part in parts]
            squares = [a + b for a, b in zip(squares, parts, strict=True)] if squares else parts
        return squares

    def _probe(
        self, means: Means, inputs: list[Tensor], position: int, variance: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """J sqrt(v) e of one input, and sqrt(v) e."""
        signs = (
            torch.randint(0, 2, variance.shape, generator=self._generator, device="cpu").to(variance).mul_(2).sub_(1)
        )
        directions = [torch.zeros_like(x) for x in inputs]
        directions[position] = signs * variance.sqrt()
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative, which this is made of
            _, along = torch.autograd.functional.jvp(means, tuple(inputs), tuple(directions))  # type: ignore[no-untyped-call]
        return along, directions[position]


def _is_diagonal(means: Means, inputs: list[Tensor], position: int, signed: Tensor, along: tuple[Tensor, ...]) -> bool:
    given = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        total = sum(x.sum() for x in means(*given))
        assert isinstance(total, Tensor)
        (slope,) = torch.autograd.grad(total, given[position])
    return len(along) == 1 and torch.allclose(along[0], slope * signed, rtol=1e-3, atol=1e-6)
