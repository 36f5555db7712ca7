"""Results as tables, sentences and JSON. Made here, printed by the command line."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from adfify.errors import MissingOp
from adfify.printable import printable

if TYPE_CHECKING:
    from adfify.benchmark import Report, Row
    from adfify.demo import Demo, Level
    from adfify.exporting import Input
    from adfify.metadata import Metadata
    from adfify.prediction import Prediction


@dataclass(frozen=True)
class Operation:
    """The operations of one kind in a network.

    Attributes:
        op: as the user knows it, such as ``torch.nn.Conv2d``.
        count: how many there are.
        action: ``"convert"``, ``"keep"`` (it carries no variance) or ``"missing"``.
        rule: dotted name of the rule, or None.
        exact: whether the rule is exact for independent Gaussian inputs, or None.
    """

    op: str
    count: int
    action: str
    rule: str | None
    exact: bool | None


def operations(records: Iterable[Mapping[str, Any]]) -> list[Operation]:
    """The records of a plan counted by kind: missing ones first, then the most frequent."""
    kinds = Counter(
        (record["op"], record["action"], record["rule"], record["exact"])
        for record in records
        if record["action"] in ("convert", "keep", "missing") and record["op"] != "parameter or buffer"
    )
    counted = [Operation(op, count, action, rule, exact) for (op, action, rule, exact), count in kinds.items()]
    order = ("missing", "convert", "keep")
    return sorted(counted, key=lambda kind: (order.index(kind.action), -kind.count, kind.op))


def _table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def of_operations(kinds: Iterable[Operation]) -> Table:
    """One row for each kind of operation."""
    table = _table("operation", "count", "rule", "moments", numbers=["count"])
    moments = {True: "exact", False: "approximate", None: ""}
    for kind in kinds:
        rule = {"keep": "unchanged: it carries no variance", "missing": "MISSING"}.get(kind.action, kind.rule or "")
        style = "bold red" if kind.action == "missing" else None
        exact = moments[kind.exact] if kind.action == "convert" else ""
        table.add_row(printable(kind.op), str(kind.count), printable(rule.removeprefix("adfify.")), exact, style=style)
    return table


def of_predictions(predictions: Iterable[Prediction]) -> Table:
    """One row for each class shown of each picture."""
    table = _table("picture", "label", "probability", "logit ± std", numbers=["probability", "logit ± std"])
    for prediction in predictions:
        for position, score in enumerate(prediction.top):
            table.add_row(
                printable(prediction.path) if position == 0 else "",
                printable(short(score.label)),
                f"{score.probability:.1%}",
                plus_minus(score.mean, score.std),
            )
    return table


def demo_note(demo: Demo) -> str:
    """Which ± is which, and what each is worth."""
    return (
        f"± is the standard deviation that pixel noise of variance {demo.middle.noise_variance:g} gives the logit, by "
        "three ways. One pass: units are taken as independent, which on deep networks makes it too small; at best it "
        "ranks, it is not a calibrated error bar. Joint: correlations of units included; label and probability are by "
        f"its moments. Monte Carlo: {demo.draws} noisy passes of the original network, the truth to hold both against."
    )


def of_demo(demo: Demo) -> tuple[Table, Table]:
    """The predictions at the middle noise level, and for every level how far off the one-pass moments are."""
    middle = demo.middle
    logits = ("logit, one pass", "logit, joint", "logit, Monte Carlo")
    pictures = _table("picture", "label", "probability", *logits, numbers=["probability", *logits])
    for row, (path, label) in enumerate(zip(demo.paths, demo.labels, strict=True)):
        one_pass = plus_minus(float(middle.one_pass_mean[row]), float(middle.one_pass_std[row]))
        joint = plus_minus(float(middle.joint_mean[row]), float(middle.joint_std[row]))
        truth = plus_minus(float(middle.true_mean[row]), float(middle.true_std[row]))
        pictures.add_row(
            printable(path.name),
            printable(short(label)),
            f"{float(demo.probabilities[row]):.1%}",
            one_pass,
            joint,
            truth,
        )
    stds = ("one-pass std", "joint std", "Monte Carlo std")
    columns = ("pixel noise variance", *stds, "one-pass std is", "its mean is off by")
    ranks = ("rank corr. over pictures", "over logits")
    levels = _table(*columns, *ranks, numbers=[*columns, *ranks])
    for level in demo.levels:
        levels.add_row(
            f"{level.noise_variance:g}",
            number(float(level.one_pass_std.median())),
            number(float(level.joint_std.median())),
            number(float(level.true_std.median())),
            off(level.std_ratio),
            f"{level.mean_error:.2f} true std",
            number(level.rank_pictures),
            number(level.rank_logits),
        )
    return pictures, levels


def demo_summary(demo: Demo) -> str:
    """What the demo found, in one plain sentence for each level."""
    return "\n".join(_sentence(demo, level) for level in demo.levels)


def _sentence(demo: Demo, level: Level) -> str:
    median = f"median of {len(demo.paths)} pictures" if len(demo.paths) > 1 else "one picture"
    return (
        f"At pixel noise variance {level.noise_variance:g} the one-pass std of the top logit is {off(level.std_ratio)} "
        f"({median}; Monte Carlo itself is good to {demo.std_error:.0%}), "
        f"and its mean is off by {level.mean_error:.2f} true std; "
        f"that of joint moments is {1 / level.joint_ratio:.2f} of the true one, and the mean off by "
        f"{level.joint_mean_error:.2f}."
    )


def of_benchmark(reports: Sequence[Report]) -> Table:
    """One row for each way to predict: quality where there are labels, and what needs none."""
    labelled = any(report.labelled for report in reports)
    quality = ("accuracy", "NLL", "Brier", "ECE", "AUROC conf.", "AUROC entropy", "AUROC std") if labelled else ()
    rest = ("confidence", "entropy", "std", "same class", "cost")
    table = _table("network", "method", *quality, *rest, numbers=[*quality, *rest])
    for report in reports:
        for row in report.rows:
            plain = row.noise_variance is None
            cost = "1" if plain else f"{report.cost.median:.1f}"
            shown = [row.mean_confidence, row.mean_entropy, row.mean_std, row.agreement]
            table.add_row(
                printable(report.model) if plain else "",
                row.method if plain else f"{row.method} at {row.noise_variance:g}",
                *(_quality(row) if labelled else []),
                *map(number, shown),
                cost,
            )
    return table


def benchmark_notes(reports: Sequence[Report]) -> str:
    """How to read the table, and what it can't say."""
    report = reports[0]
    lines = [f"{report.pictures} pictures, as they are: no noise was added, the noise variance is what ADF was told."]
    if report.labelled:
        lines.append("AUROC: how well wrong predictions are told from right: by 1 - confidence, by entropy, by std.")
    else:
        lines.append(
            "No labels: put the pictures into one folder for each class, named by label, WordNet id or output index, "
            "for accuracy, NLL, Brier, ECE and AUROC."
        )
    lines.append(f"Cost: time of the ADF pass in plain forwards, median of {report.cost.rounds} interleaved rounds.")
    return "\n".join(lines)


def _quality(row: Row) -> list[str]:
    if row.quality is None:
        return [""] * 7
    q = row.quality
    return [number(v) for v in (q.accuracy, q.nll, q.brier, q.ece, q.auroc_confidence, q.auroc_entropy, q.auroc_std)]


def short(label: str) -> str:
    """The first of a label's synonyms."""
    return label.split(",")[0]


def number(value: float | None) -> str:
    """Three significant digits; a dash where there is no value."""
    return "–" if value is None or value != value else f"{value:#.3g}".rstrip(".")


def plus_minus(mean: float, std: float) -> str:
    """``mean ± std``: the std with two significant digits, the mean with as many decimals, at least two."""
    if not (math.isfinite(mean) and 0 < std < math.inf):
        return f"{mean:.2f} ± {std:g}"
    decimals = max(2, 1 - math.floor(math.log10(std)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}" if decimals <= 6 else f"{mean:.6f} ± {std:.1e}"


def off(ratio: float) -> str:
    """How far off a std is, where ``ratio`` is the true one over it."""
    if ratio > 1:
        return f"{ratio:.1f}x too small"
    return f"{1 / ratio:.1f}x too large" if ratio > 0 else "infinitely too large"


def verdict(kinds: Sequence[Operation], missing: Sequence[MissingOp]) -> str:
    """Whether a network can be converted, and what is in the way."""
    if not missing:
        return f"It can be converted: {counted(kinds)}."
    places = "\n".join(f"  - {op}" for op in missing)
    return f"It can't be converted. Without a rule:\n{places}\nadfify.register gives an operation a rule, in Python."


def counted(kinds: Sequence[Operation]) -> str:
    """How many operations are propagated, and how many of them exactly."""
    converted = [kind for kind in kinds if kind.action == "convert"]
    exact = sum(kind.count for kind in converted if kind.exact)
    total = sum(kind.count for kind in converted)
    return f"{total} operations carry variances, {exact} by exact rules"


def how_to_run(program: Path, metadata: Metadata) -> str:
    """Python that runs a program of ``metadata`` (see :func:`adfify.program.read_metadata`) by torch alone."""
    names = [name for entry in metadata.inputs for name in _parameters(entry)]
    shapes = "; ".join(
        f"{entry.name}: [{', '.join('N' if size is None else str(size) for size in entry.shape)}]"
        for entry in metadata.inputs
    )
    single = metadata.outputs.uncertain == (True,)
    return (
        "import torch\n"
        f"network = torch.export.load({str(program)!r}).module()\n"
        f"{'mean, variance' if single else 'outputs'} = network({', '.join(names)})  # {shapes}, normalised"
    )


def _parameters(entry: Input) -> list[str]:
    return [entry.name, f"{entry.name}_variance"] if entry.uncertain else [entry.name]


def indented(text: str) -> str:
    """Every line two columns to the right."""
    return "\n".join(f"  {line}" for line in text.splitlines())


def to_json(value: Any) -> str:
    """JSON of dataclasses, paths, mappings, sequences and numbers; NaN and infinity become null."""
    return json.dumps(_plain(value), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
