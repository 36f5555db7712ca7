"""Which operation is propagated by which rule.

A *target* is what a traced graph calls: a function (``torch.relu``), a method's name (``"relu"``), an
attribute with a leading dot (``".shape"``), an aten overload, or a module class. A *rule* is the named
function, or the module class derived from :class:`adfify.nn.ADFModule`, that does the same to Moments.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from adfify.moments import floor
from adfify.precision import original_of, wide
from adfify.signatures import signature_of

Target = Callable[..., Any] | type | str
Keep = Callable[[Any, float], Any]
Decorated = TypeVar("Decorated", bound=Callable[..., Any])

FAMILIES = (
    "affine",
    "normalization",
    "elementwise",
    "pooling",
    "structural",
    "arithmetic",
    "softmax",
    "step",
    "dropout",
    "metadata",
    "custom",
)
"""What a rule belongs to; its oracles in the tests follow from it (see DESIGN.md, families)."""

MOVING = frozenset({"structural", "metadata"})
"""The families whose operations compute nothing."""

COMPUTING = frozenset(FAMILIES) - MOVING
"""The families whose operations compute a new variance, after which ``min_variance`` is applied by default."""


_LINEAR = frozenset({"affine", "normalization", "pooling"})  # where exact, the mean is the original of the means


@dataclass(frozen=True)
class Uncertain:
    """In a :class:`Case`: an argument that is a random tensor of this shape.

    Attributes:
        shape: its shape.
        positive: 8 std and more above 0.
        within: 10 std and more inside these two bounds.
        complex: whether it is complex.
        mask: whether it is a mask: of which of such values are above 0.
    """

    shape: tuple[int, ...]
    positive: bool = False
    complex: bool = False
    within: tuple[float, float] | None = None
    mask: bool = False


@dataclass(frozen=True)
class Certain:
    """In a :class:`Case`: a known tensor of this shape.

    Attributes:
        shape: its shape.
        positive: above 0, as a variance is.
        complex: whether it is complex.
        unit: from 0 to 1, as a probability is.
        of_examples: its rows speak of the batch's examples, by their number: of an empty batch there are none.
    """

    shape: tuple[int, ...]
    positive: bool = False
    complex: bool = False
    unit: bool = False
    of_examples: bool = False


@dataclass(frozen=True)
class Case:
    """One call of the *original* operation, from which every test of its rule is made.

    Attributes:
        args: positional arguments; :class:`Uncertain` and :class:`Certain` stand for tensors.
        kwargs: keyword arguments, likewise.
        init: for a module class, what its constructor is given, by name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    init: Mapping[str, Any] = field(default_factory=dict)


def case(*args: Any, init: Mapping[str, Any] | None = None, **kwargs: Any) -> Case:
    """A :class:`Case` in the notation of the call itself: ``case(Uncertain((2, 3)), dim=1)``."""
    return Case(args, kwargs, init or {})


class OneOf:
    """In ``only``: several values that a rule can take."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return other is self or other in self.values

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return " or ".join(map(repr, self.values))


@dataclass(frozen=True)
class Rule:
    """How one operation is propagated.

    Attributes:
        targets: the original operations.
        apply: the function on Moments, or the ADF module class.
        family: one of :data:`FAMILIES`.
        exact: whether mean and variance are exact for independent Gaussian inputs.
        source: paper and equation, or why none is needed.
        tolerance: for a rule that is not exact, the error of mean and std that it may have against Monte
            Carlo, in units of the true std.
        alias: whether the result may share memory with the input (a view), which matters for in-place use.
        only: for some arguments, or attributes of the module, the one value that the rule can take.
        continuous: whether the original is: where it jumps, its gradient does not say how much it varies.
        complex: whether it also takes ComplexMoments, see Note [Complex values].
        cases: calls of the original, from which the tests are made.
        reads_metadata_of: arguments of which only dtype, shape or device matter, and whose elements do not.
        one_uncertain_of: arguments of which either may be uncertain, but not several at once.
        only_where: for an argument, what ``only`` says in addition where that argument is uncertain.
    """

    targets: tuple[Target, ...]
    apply: Callable[..., Any]
    family: str
    exact: bool
    source: str
    tolerance: float
    alias: bool
    only: Mapping[str, Any]
    cases: tuple[Case, ...] = field(repr=False)
    continuous: bool = True
    complex: bool = False
    reads_metadata_of: tuple[str, ...] = ()
    one_uncertain_of: tuple[str, ...] = ()
    only_where: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Dotted name of the function or class that does it."""
        named = self.apply if hasattr(self.apply, "__qualname__") else type(self.apply)
        return f"{named.__module__ or 'unknown'}.{named.__qualname__}"

    @property
    def signature(self) -> inspect.Signature:
        """What it takes, type hints resolved: see Note [What an annotation says]."""
        return signature_of(self.apply)

    @property
    def certain(self) -> bool:
        """Whether the result is no random tensor: a shape, a dtype, a size."""
        return self.family == "metadata"


class Rules:
    """A table of rules, possibly laid over another: what it lacks is looked up there.

    Args:
        parent: the table beneath.
        keep_variance: what ``min_variance`` means: by default a floor, in the published code an addition.
        keeping: the families after whose operations it is applied.
    """

    def __init__(
        self, parent: Rules | None = None, keep_variance: Keep | None = None, keeping: frozenset[str] | None = None
    ) -> None:
        self._parent = parent
        self._rules: dict[Target, Rule] = {}
        self.keep_variance: Keep = keep_variance or (parent.keep_variance if parent else floor)
        self.keeping: frozenset[str] = keeping or (parent.keeping if parent else COMPUTING)

    def register(
        self,
        *targets: Target,
        family: str = "custom",
        exact: bool = False,
        source: str = "",
        tolerance: float = 0.0,
        alias: bool | None = None,
        only: Mapping[str, Any] | None = None,
        cases: Sequence[Case] = (),
        continuous: bool = True,
        complex: bool = False,
        reads_metadata_of: Sequence[str] = (),
        one_uncertain_of: Sequence[str] = (),
        only_where: Mapping[str, Mapping[str, Any]] | None = None,
        override: bool = False,
    ) -> Callable[[Decorated], Decorated]:
        """Decorate the function, or module class, that propagates Moments through ``targets``.

        What the rule is given follows from its type hints: ``Moments`` (a certain tensor is lifted to variance 0),
        ``Moments | Tensor`` (either), ``Tensor``, ``int`` ... (what is certain); an argument without a hint is given
        what comes.

        Args:
            targets: functions, method names, attribute names (``".shape"``), aten overloads or module
                classes. A module class matches exactly: a subclass may do something else.
            family: one of :data:`FAMILIES`; decides how ``min_variance`` and the tests treat it.
            exact: whether the moments are exact for independent Gaussian inputs.
            source: paper and equation.
            tolerance: see :class:`Rule`.
            alias: whether the result may share memory with the input; by default for family structural.
            only: see :class:`Rule`; an operation called otherwise has no rule.
            continuous: False for an operation that jumps: ``joint`` then does not go by gradients.
            complex: whether it also takes complex random values (ComplexMoments).
            reads_metadata_of: arguments of which only dtype, shape or device matter: where the others are certain, the
                result is.
            one_uncertain_of: arguments of which either may be uncertain, but not several at once.
            only_where: see :class:`Rule`.
            cases: calls of the original operation to test with.
            override: True to replace the rule that a target has in this table; the targets' namesakes (the method
                ``"relu"`` beside ``torch.relu``) keep theirs.

        Raises:
            TypeError: no targets, an unknown family, a target of the wrong type, a method or attribute that
                torch.Tensor has not, a type hint of the rule that can't be
                resolved, or a rule that can't do what its target does: see :func:`_check_rule`.
            ValueError: a target has a rule in this table already, and ``override`` is not given.
        """
        _check_targets(targets, family)
        known = tuple(dict.fromkeys(map(_known_as, targets)))
        if not override:
            self._refuse_second(known)
        for target in targets:
            _give_home(target)

        def decorate(apply: Decorated) -> Decorated:
            _check_rule(apply, targets)
            signature_of(apply)
            _give_home(apply)
            if family not in MOVING and not isinstance(apply, type):
                # An overlay's operations are not the originals: other numerics, or masks drawn at random.
                callable_here = self._parent is None and family != "dropout"
                original = original_of(known) if callable_here else None
                apply = wide(original, linear=exact and family in _LINEAR)(apply)
            may_alias = family == "structural" if alias is None else alias
            rule = Rule(
                known, apply, family, exact, source, tolerance, may_alias, only or {}, tuple(cases), continuous,
                complex, tuple(reads_metadata_of), tuple(one_uncertain_of), only_where or {},
            )  # fmt: skip
            self._replace(known)
            self._rules.update(dict.fromkeys(known, rule))
            return apply

        return decorate

    def _refuse_second(self, targets: tuple[Target, ...]) -> None:
        taken = [target for target in targets if target in self._rules]
        if taken:
            rule = self._rules[taken[0]]
            raise ValueError(
                f"{target_name(taken[0])} has a rule already: {rule.name}, which is also that of "
                f"{', '.join(target_name(t) for t in rule.targets if t != taken[0]) or 'nothing else'}. "
                "Give override=True to replace it for the targets that you name."
            )

    def _replace(self, targets: tuple[Target, ...]) -> None:
        """Take targets from the rules that they have: each then tells only of what it still does."""
        for old in {id(rule): rule for rule in map(self._rules.get, targets) if rule is not None}.values():
            rest = replace(old, targets=tuple(target for target in old.targets if target not in targets))
            self._rules.update(dict.fromkeys(rest.targets, rest))

    def find(self, target: Target) -> Rule | None:
        """The rule of a target, exactly matched, or None."""
        # Note [Match exact types]
        # Never isinstance, never the MRO: looked up so, timm's BatchNormAct2d was taken for the BatchNorm2d
        # that it derives from, its activation was dropped, and the mean was off by 3e5, silently.
        load_extensions()
        for name in names_of(target):
            if name in self._rules:
                return self._rules[name]
        return None if self._parent is None else self._parent.find(target)

    def keeps(self, rule: Rule) -> bool:
        """Whether ``min_variance`` is applied to the result of a rule."""
        return rule.family in self.keeping

    def over(self, other: Rules) -> Rules:
        """This table's own rules laid over another table."""
        overlay = Rules(other)
        overlay._rules = dict(self._rules)
        return overlay

    def __iter__(self) -> Iterator[Rule]:
        """Every rule in force, each once."""
        load_extensions()
        seen: set[int] = set()
        for target in {**dict.fromkeys(self._parent_targets()), **dict.fromkeys(self._rules)}:
            rule = self.find(target)
            if rule is not None and id(rule) not in seen:
                seen.add(id(rule))
                yield rule

    def _parent_targets(self) -> Iterator[Target]:
        if self._parent is not None:
            yield from self._parent._parent_targets()
            yield from self._parent._rules


RULES = Rules()
"""The default rules: the correct ones."""

register = RULES.register


def supported() -> list[Rule]:
    """The default rules, in the order of their families."""
    return sorted(RULES, key=lambda rule: (FAMILIES.index(rule.family), rule.name))


# Note [Libraries that bring their own layers]
# Classes of timm and torchvision can only be registered once those are imported, and importing them costs
# seconds. A model that has such layers has already imported its library, so that is when the rules come.
EXTENSIONS = {
    "timm.layers": ("adfify.nn.timm_layers",),
    "torchvision.ops": ("adfify.nn.torchvision_ops", "adfify.nn.torchvision_regions"),
}


def load_extensions() -> None:
    """Register the rules for the classes of those libraries that are already imported."""
    for library, files in EXTENSIONS.items():
        for rules in files if library in sys.modules else ():
            if rules not in sys.modules:
                importlib.import_module(rules)


# Note [An aten overload is the torch function of its name]
# torch.export speaks aten: `aten.relu_.default`, `aten.permute.default`. Each is what torch.relu_, the method
# `permute` or torch.nn.functional's function of that name calls, with the same arguments in the same order, so one rule
# serves all of them. Where the order differs (torch.nn.functional.batch_norm), the aten overload is registered itself.
# That holds for the namespace aten alone: a library's own operator `mylib::relu` may do anything, and is known only
# as itself.
def names_of(target: Target) -> Iterator[Target]:
    """What a target is known by: itself, and for an aten overload the functions that are it."""
    yield target
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return
    yield packet
    if packet._qualified_op_name.partition("::")[0] != "aten":
        return
    # torch.nn.functional's function of the name of an overload with several results (adaptive_max_pool2d) returns one.
    several = not isinstance(target, torch._ops.OpOverload) or len(target._schema.returns) != 1
    homes = (torch, torch._C._nn) if several else (torch, torch._C._nn, functional)
    # An in-place overload (silu_) has the arguments of the one that is not, and that is what a rule computes.
    for name in dict.fromkeys((packet.__name__, packet.__name__.rstrip("_"))):
        yield from (getattr(home, name) for home in homes if hasattr(home, name))
        yield name
        yield f".{_ATTRIBUTES.get(name, name)}"
        family, _, rest = name.partition("_")
        if family in ("special", "linalg", "fft"):
            yield getattr(getattr(torch, family), rest, target)


_ATTRIBUTES = {"numpy_T": "T", "matrix_H": "H"}
"""Of a tensor, by what aten calls them."""


def _known_as(target: Target) -> Target:
    """What a traced graph calls a target: ``torch.Tensor.relu`` is the method ``"relu"``, a property ``".mT"``."""
    name = getattr(target, "__name__", None)
    if isinstance(target, (str, type)) or name is None or vars(torch.Tensor).get(name, _base(name)) is not target:
        return target
    return str(name) if callable(target) else f".{name}"


def _base(name: str) -> Any:
    return vars(torch._C.TensorBase).get(name)


def target_name(target: Target) -> str:
    """A target as the user knows it: ``torch.relu``, ``Tensor.view``, ``torch.nn.Conv2d``."""
    if isinstance(target, str):
        return f"Tensor{target}" if target.startswith(".") else f"Tensor.{target}"
    if isinstance(target, type):
        module = "torch.nn" if target.__module__.startswith("torch.nn.modules.") else target.__module__
        return f"{module}.{target.__qualname__}"
    name = getattr(target, "__name__", None)
    if name is None or hasattr(target, "_schema"):
        return str(target)
    if name == "fn":  # torch.nn.functional builds its max_pool functions, and they are all named so
        name = next((public for public, value in vars(functional).items() if value is target), name)
    module = getattr(target, "__module__", None) or "torch"
    private = module.removeprefix("torch._C._")
    if private in ("fft", "linalg", "special"):
        return f"torch.{private}.{name.removeprefix(private + '_')}"
    return f"{_PUBLIC_HOMES.get(module, module)}.{name}"


# Where torch defines a function, and where its users find it.
_PUBLIC_HOMES = {"_operator": "operator", "torch._C._nn": "torch.nn.functional", "torch.functional": "torch"}


def _give_home(function: Any) -> None:
    """Name a function's module where it has none, as those of ``exec`` do: torch.fx writes code that names it."""
    if inspect.isfunction(function) and function.__module__ is None:
        function.__module__ = function.__globals__.get("__name__") or "__main__"


def _check_targets(targets: Sequence[Target], family: str) -> None:
    if not targets:
        raise TypeError("register() needs at least one target: register(torch.relu, ...), as a decorator.")
    if family not in FAMILIES:
        raise TypeError(f"family {family!r} is unknown; it is one of {', '.join(FAMILIES)}.")
    for target in targets:
        if isinstance(target, str):
            _check_name(target)
        elif not (callable(target) or _known_as(target) is not target):
            raise TypeError(f"{target!r} is no target: give a function, a module class, or a method's name.")
        if isinstance(target, type) and not issubclass(target, nn.Module):
            raise TypeError(f"{target!r} is no target: of classes, only torch.nn.Module subclasses are.")


def _check_name(target: str) -> None:
    """Raise unless it is the name of a method of torch.Tensor, or of an attribute with a leading dot."""
    name = target.removeprefix(".")
    if hasattr(torch.Tensor, name):
        return
    near = difflib.get_close_matches(name, dir(torch.Tensor), 3)
    kind = "attribute" if target.startswith(".") else "method"
    raise TypeError(
        f"{target!r} is no target: torch.Tensor has no {kind} of that name. "
        + (f"The nearest are {', '.join(map(repr, near))}. " if near else "")
        + "Give a function or a module class itself, and only a method of Tensor by its name."
    )


def _check_rule(apply: Any, targets: Sequence[Target]) -> None:
    """Raise TypeError unless it is a class for module classes, and a function, which a graph can name, for the rest."""
    for target in targets:
        if not isinstance(target, type) and not inspect.isfunction(apply):
            raise TypeError(
                f"{apply!r:.80} is no rule for {target_name(target)}: that takes a function on Moments, made by def."
            )
        if isinstance(target, type) and not (isinstance(apply, type) and hasattr(apply, "converts_children")):
            raise TypeError(
                f"{apply!r:.80} is no rule for the module class {target_name(target)}: that takes a class derived from "
                f"adfify.nn.ADFModule and {target.__name__}, in this order, whose forward takes Moments."
            )
