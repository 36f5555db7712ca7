"""What `adfify` returns: a graph module whose values are Moments."""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from adfify import call_signature, locations
from adfify.call_signature import CallSignature
from adfify.errors import AdfifyError, InputError, ModelError
from adfify.failures import blame, check_users_rules, of_joint
from adfify.moments import JointMoments, checked_variance, concrete
from adfify.precision import wide

# Note [Its own copy and pickle]
# A torch.fx.GraphModule keeps only what its graph refers to, and is pickled as source code that is traced anew when
# loaded. Both would lose state_dict keys (an auxiliary head, a num_batches_tracked), and the second would trace
# through the rules. So the tree of modules is set as a whole, and the graph is copied and pickled node by node.


class ADFNetwork(fx.GraphModule):
    """A network that carries a mean and a variance through every operation (assumed density filtering).

    Call it with what the source model takes: a tensor, which gets ``noise_variance`` everywhere, or
    :class:`~adfify.Moments` with your own variance. It returns what the source model returns, with Moments
    in place of uncertain tensors.

    The variance of this one pass takes units as independent. On deep networks that makes it too small,
    often by an order of magnitude: at best it ranks, roughly; it is not a calibrated error bar. :meth:`joint` takes
    their correlations into account.

    Attributes:
        noise_variance: variance of every element of a plain input tensor, in squared units of the input.
        plan: what became of each operation, as plain data.
        signature: what it is called with: see Note [Inputs in the structure of the model's own call].
    """

    noise_variance: float
    plan: list[dict[str, Any]]
    signature: CallSignature

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        name: str,
        noise_variance: float,
        plan: list[dict[str, Any]],
        signature: CallSignature,
    ) -> None:
        _refuse_reserved_names(root, name)
        root.noise_variance = noise_variance  # type: ignore[assignment]
        super().__init__(root, graph, f"ADF{name}")
        self._adopt(root)
        self.noise_variance = noise_variance
        self.plan = plan
        self.signature = signature
        self._name = name

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "noise_variance":
            checked_variance(name, value)
        super().__setattr__(name, value)

    def _adopt(self, root: nn.Module) -> None:
        """Take over a whole tree of modules, in its order."""
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
            self.__dict__[table] = root.__dict__[table]
        if WHOLE in root.__dict__:
            self.__dict__[WHOLE] = root.__dict__[WHOLE]

    def recompile(self) -> Any:
        """See :meth:`torch.fx.GraphModule.recompile`; errors are ours, not printed by torch.fx."""
        code = super().recompile()
        type(self).__call__ = ADFNetwork.__call__  # type: ignore[method-assign]
        return code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.of_leaves(*self.signature.flatten(args, kwargs))

    def of_leaves(self, *leaves: Any) -> Any:
        """Call the graph with its own inputs: the tensors and Moments among the inputs, one after the other.

        Raises:
            InputError: they are not what the original takes.
            RuleError: the original takes them, and a rule fails on them, or one of the user's returns another shape, a
                negative variance or NaN.
        """
        try:
            outputs = nn.Module.__call__(self, *leaves)
            check_users_rules(self, leaves, outputs)
            return outputs
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if isinstance(error, AdfifyError) and not isinstance(error, InputError):
                raise
            judged = blame(self, leaves, error)
            if judged is error:
                raise
            raise judged from error

    def train(self, mode: bool = True) -> Any:
        """See :meth:`torch.nn.Module.train`."""
        if WHOLE in self.__dict__:
            self.__dict__[WHOLE].training = mode
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`torch.nn.Module.load_state_dict`.

        Raises:
            ModelError: a parameter that is not finite.
        """
        loaded = super().load_state_dict(*args, **kwargs)
        refuse_not_finite(self, self._name)
        return loaded

    def joint(
        self,
        *inputs: Any,
        outputs: int | Sequence[int] | Tensor | str = 5,
        method: str = "auto",
        samples: int | None = None,
        seed: int = 0,
        attribution: bool = False,
        output: str | int | None = None,
        chunk_size: int | None = None,
        batched: str | Sequence[str] | Mapping[str, int] = "auto",
        **named: Any,
    ) -> JointMoments:
        """Means, standard deviations and covariances that take the correlation of units into account.

        Unlike the one-pass variance of calling the network, these are held against Monte Carlo on the original
        network: docs/accuracy.md has by how much they are off, and what they cost.

        Args:
            inputs: what the network takes, ``[N, ...]``: tensors or Moments, in the structure of the model's own call.
            outputs: how many, those with the largest means, or all of them, in their own order, where there are no
                more; or a list of indices into the output, flattened, the same for all inputs, or ``[N, k]``, each its
                own; or ``"all"``, which is what a regression wants.
            method: ``"adjoint"``: gradients of the original network at noisy inputs, by the covariance identity of
                Houdre & Perez-Abreu (Ann. Probab. 23, 1995). ``"sketch"``: noisy passes alone, for many outputs at
                once. ``"auto"``: the sketch from 32 outputs on.
            samples: at how many noisy inputs (in pairs: rounded down to an even number, at least 2), instead of as many
                as the network's curvature asks for: that may be too few by far, see ``std_error``. 0, for the
                adjoint: none; statistical linearisation at the variances of the one pass.
            seed: of the noise: the same answer every time, and for a picture whatever else is in the batch.
            attribution: whether to split each variance into its sources.
            output: which, of a network that returns several.
            chunk_size: noisy inputs in one pass, which bounds the memory; by default what suits a CPU's cache.
            batched: which inputs hold the batch: their names, or a dict of names and axes. By default a probe of the
                network tells: first in the uncertain inputs where that keeps the examples apart, else along the one
                axis that does (``[T, N, C]``), and in the certain ones along which they are apart. ``()``: none; all
                that is given is one example (the nodes of a graph), and every noisy input a pass of its own.
            named: inputs by keyword.

        Raises:
            InputError: inputs that the network can't take, an argument that is none of these, or a network in which
                the inputs of a batch depend on each other.
            RuleError: a rule fails on inputs that the original takes.
            InternalError: adfify itself does.
        """
        from adfify.joint import Request, joint

        request = Request(outputs, method, samples, seed, attribution, output, chunk_size, batched)
        leaves = self.signature.flatten(inputs, named)
        try:
            return joint(self, leaves, request)
        except (AdfifyError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise of_joint(self, leaves, error) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> ADFNetwork:
        state, graph = copy.deepcopy(_state(self), memo), _copy_graph(self.graph)
        return _rebuild(state, graph)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (_state(self), _graph_records(self.graph))


_STATE = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "training",
    "noise_variance",
    "plan",
    "signature",
    "_name",
)

# Note [A module that is the whole model]
# A bare nn.LSTM has a rule, and is one operation: the graph calls it, as `_whole`. Its parameters and children have to
# keep their names, so it is no child of the network, but both have the same tables of them.
WHOLE = "_whole"


def _refuse_reserved_names(root: nn.Module, name: str) -> None:
    """torch.fx and this class have attributes of their own, which would hide a child of the same name."""
    children = {**root._parameters, **root._buffers, **root._modules}
    taken = sorted(
        child
        for child in children
        if hasattr(fx.GraphModule, child) or child in ("noise_variance", "plan", "signature")
    )
    if taken:
        raise ModelError(
            f"{name} has {', '.join(map(repr, taken))} among its parameters, buffers or modules, a name that the "
            "converted network needs for itself (it is a torch.fx.GraphModule). Rename it in the model."
        )


# Buffers may hold infinities on purpose: the masks of attention.
def refuse_not_finite(model: nn.Module, name: str) -> None:
    """Raise ModelError that names the parameters with NaN or infinities, and the buffers with NaN."""
    faulty = [path for path, x in model.named_parameters() if concrete(x) and not bool(x.isfinite().all())]
    faulty += [path for path, x in model.named_buffers() if concrete(x) and bool(x.isnan().any())]
    if faulty:
        more = f" and {len(faulty) - 3} more" if len(faulty) > 3 else ""
        raise ModelError(
            f"{name} has NaN or infinite weights, in {', '.join(map(repr, faulty[:3]))}{more}: every moment is NaN. "
            "Load weights of a training that did not diverge."
        )


def _state(network: ADFNetwork) -> dict[str, Any]:
    return {name: network.__dict__[name] for name in (*_STATE, WHOLE) if name in network.__dict__}


def _rebuild(state: dict[str, Any], graph: fx.Graph) -> ADFNetwork:
    root = nn.Module()
    root.__dict__.update(state)
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    # Networks that were pickled before they had a signature take one tensor for each input.
    signature = state.get("signature") or call_signature.of_placeholders(state["_name"], names)
    return ADFNetwork(root, graph, state["_name"], state["noise_variance"], state["plan"], signature)


def _unpickle(state: dict[str, Any], records: list[tuple[Any, ...]]) -> ADFNetwork:
    return _rebuild(state, _graph_from_records(records))


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


class _Ref(str):
    """In a pickled graph: the name of another node."""


class _Op(str):
    """In a pickled graph: an aten overload, which pickle can't find, by its name ``aten.relu.default``."""

    @classmethod
    def of(cls, target: Any) -> Any:
        if hasattr(target, "widens") and _at_home(target) is not target:
            return _Widened(*target.widens)
        return cls(target) if isinstance(target, torch._ops.OpOverload) else target

    def found(self) -> Any:
        return operator.attrgetter(self)(torch.ops)


@dataclass(frozen=True)
class _Widened:
    """In a pickled graph: a rule registered by a call, not as a decorator: its name is the bare function's."""

    rule: Callable[..., Any]
    original: Callable[..., Any] | None
    linear: bool

    def found(self) -> Any:
        return wide(self.original, self.linear)(self.rule)


def _at_home(function: Any) -> Any:
    """What stands in a function's module under its name."""
    try:
        return operator.attrgetter(function.__qualname__)(sys.modules[function.__module__])
    except (AttributeError, KeyError):
        return None


def _graph_records(graph: fx.Graph) -> list[tuple[Any, ...]]:
    def encode(value: Any) -> Any:
        return fx.map_arg(value, lambda node: _Ref(node.name))

    return [
        (
            node.op,
            _Op.of(node.target),
            encode(node.args),
            encode(node.kwargs),
            node.name,
            node.meta.get("origin"),
            locations.source_line(node),
        )
        for node in graph.nodes
    ]


def _graph_from_records(records: list[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def decode(value: Any) -> Any:
        return fx.node.map_aggregate(value, lambda leaf: made[leaf] if isinstance(leaf, _Ref) else leaf)

    for op, target, args, kwargs, name, *rest in records:
        # Networks of before joint moments have no origin, those of before RuleError no location.
        origin, location = (*rest, None, None)[:2]
        found = target.found() if isinstance(target, (_Op, _Widened)) else target
        node = made[name] = graph.create_node(op, found, decode(args), decode(kwargs), name=name)
        if origin is not None:
            node.meta["origin"] = origin
        if location:
            node.meta["location"] = location
    return graph
