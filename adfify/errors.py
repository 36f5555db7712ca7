"""Every error that adfify raises on purpose. Each says what was given, why it can't be, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class AdfifyError(Exception):
    """The root: catching it catches everything that adfify raises on purpose."""


class InputError(AdfifyError, ValueError):
    """A value given to an ADF network or module can't be propagated (shape, dtype, sign, NaN)."""


class RuleError(AdfifyError):
    """A rule fails on inputs that the original operation takes: the rule is wrong, and not the input.

    Attributes:
        node: the operation's name in the graph, or ``""`` where it failed once and not again.
        op: the operation as the user knows it.
        rule: dotted name of the function or class that failed.
        location: ``file:line`` in the model's own source, or ``""`` where it is not known.
        said: the error that was raised in it, or what is wrong with its result.
        written_at: ``file:line`` of the rule, or ``""``.
    """

    def __init__(self, node: str, op: str, rule: str, location: str, said: str, written_at: str = "") -> None:
        self.node, self.op, self.rule, self.location, self.said = node, op, rule, location, said
        self.written_at = written_at
        at = f", at '{node}'" + (f" ({location})" if location else "") if node else ""
        super().__init__(
            f"{f'the rule {rule}' if rule else 'a rule'} for {op}{at}, failed with {said}\n"
            f"The original operation takes these inputs, so the rule{f' at {written_at}' if written_at else ''} is "
            "wrong: mend it if it is yours "
            "(adfify.register), and report it if it is adfify's."
        )

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), (self.node, self.op, self.rule, self.location, self.said, self.written_at)


class InternalError(AdfifyError):
    """adfify itself fails on inputs that the model takes: neither the model nor its user is at fault."""


_LONGEST = 1900
"""Characters of an error's message: one can be read, and a log of whole graphs can't."""


class ModelError(AdfifyError):
    """The model can't be converted for a reason other than a missing rule: hooks, parametrizations, tracing."""

    def __init__(self, message: str) -> None:
        # What is wrong stands at the beginning, and what to do at the end.
        cut = len(message) > _LONGEST
        super().__init__(f"{message[: _LONGEST - 600]}\n ...\n{message[-500:]}" if cut else message)


class CheckpointError(AdfifyError):
    """A file, or a model's name, from which no model can be made."""


class ExportError(AdfifyError):
    """The ADF network can't be written as a torch.export program."""


class DataError(AdfifyError):
    """Pictures or folders that can't be used."""


@dataclass(frozen=True)
class MissingOp:
    """One operation without a rule.

    Attributes:
        op: the operation as the user knows it, such as ``torch.linalg.svdvals`` or ``torch.nn.LSTM``.
        module_path: the module in whose forward it stands, ``""`` for the model itself.
        location: ``file:line`` in the model's own source, or ``""`` where the tracer has none.
        reason: why it is missing.
    """

    op: str
    module_path: str
    location: str
    reason: str

    def __str__(self) -> str:
        where = f" in '{self.module_path}'" if self.module_path else ""
        at = f" ({self.location})" if self.location else ""
        return f"{self.op}{where}{at}: {self.reason}"


class UnsupportedOpsError(AdfifyError):
    """Some operations have no rule; all of them are listed, once.

    Attributes:
        model: the model's class name.
        missing: one :class:`MissingOp` for each place.
    """

    def __init__(self, model: str, missing: Sequence[MissingOp]) -> None:
        self.model = model
        self.missing = tuple(missing)
        lines = "\n".join(f"  - {op}" for op in self.missing)
        count = len(self.missing)
        super().__init__(
            f"{model} has {count} operation{'s' if count != 1 else ''} that adfify can't propagate a variance "
            f"through:\n{lines}\n"
            "Register a rule for each, for instance\n"
            "  @adfify.register(the_function)\n"
            "  def my_rule(x: adfify.Moments, ...) -> adfify.Moments: ...\n"
            "(for a module class, a class derived from adfify.nn.ADFModule and from it, whose forward does that) "
            "and convert again. adfify.supported() lists the rules there are."
        )

    def __reduce__(self) -> tuple[type, tuple[str, tuple[MissingOp, ...]]]:
        return type(self), (self.model, self.missing)
