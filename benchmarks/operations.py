"""The page of all operations, docs/operations.md: made from the registry, and from measurements of what is approximate.

    python benchmarks/operations.py            # the page; new rules are measured, those measured before are not
    python benchmarks/operations.py --again    # everything is measured again

Measured is what the tests hold each rule's tolerance against: Monte Carlo on the original operation, with all of the
rule's cases (tests/oracles.py), at generic moments, at a hundredth of those variances, and for inputs all alike.
Elements that a few extreme draws decide, such as a hinge that hardly ever opens, count where the draws' own error is a
quarter of the allowance for it, or less: elsewhere it is the draws that would be measured, not the rule.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import timm.layers  # noqa: F401  with these imported, the rules for their classes are in force
import torch
import torchvision.ops  # noqa: F401
import typer
from tqdm import tqdm

import adfify
from adfify import Moments
from adfify.registry import FAMILIES, RULES, Rule, target_name

ROOT = Path(__file__).parent.parent
PAGE, MEASURED = ROOT / "docs" / "operations.md", ROOT / "docs" / "operations.json"
sys.path.append(str(ROOT / "tests"))

Errors = dict[str, tuple[float, float]]

# What the draws' own error may add to a figure, of small networks and of single operations.
NOISE = {True: 0.1, False: 0.02}

HEAD = """# Operations

What `adfify` propagates, and how truly: made by `python benchmarks/operations.py`, of `adfify.supported()`.

*Exact* means: mean and variance are those of the operation for independent Gaussian inputs (to rounding, or to the
quadrature's 3e-4). For what is approximate, the largest errors of the mean and of the std are given, in units of the
true std: the worst element of all the rule's test cases, among them some made to be hard, of those whose std 200,000
Monte Carlo draws tell to half a per cent (a few thousand for whole networks, whose figures therefore hold some per cent
of noise; theirs have two to eight units with torch's initial weights, where units that share their inputs matter most).
That is one operation by itself. In a network its inputs are not independent, so no exactness of single operations makes
the variance of one pass a calibrated error bar.

An operation of torch.export (aten) is found under the function or method of its name. What has no rule raises
`UnsupportedOpsError`, and `adfify.register` adds one.
"""


def measure(rule: Rule) -> tuple[float, float]:
    """Largest errors of mean and std, in units of the true std, over all cases of the rule's first target."""
    import oracles

    worst = [0.0, 0.0]
    for trial in (t for t in oracles.trials(RULES, [rule]) if t.target is rule.targets[0]):
        generic = trial.moments(torch.float32)
        small = [Moments(x.mean, 0.01 * x.variance) for x in generic]
        alike = trial.domain([Moments(torch.zeros_like(x.mean), torch.ones_like(x.variance)) for x in generic])
        for inputs in (generic, small, alike):
            predicted = trial.converted(torch.float32)(*inputs)
            draws = 3_000 if trial.composed else 200_000
            for got, truth in zip(
                predicted, oracles.monte_carlo(trial.original(torch.float32), inputs, predicted, draws), strict=True
            ):
                std = truth.variance.sqrt()
                known = truth.std_deviation < 0.25 * NOISE[trial.composed] * std
                seen = known & (std > 1e-3 * std.max())  # below, float32 rounds more than there is
                for place, error in enumerate((truth.mean_error, got.variance.double().sqrt() - std)):
                    worst[place] = max(worst[place], float((error.abs() / std)[seen].max()) if seen.any() else 0.0)
    return float(f"{worst[0]:.2g}"), float(f"{worst[1]:.2g}")


def page(rules: list[Rule], measured: Errors) -> str:
    """The page; a rule that is not exact has to have been measured."""
    sections = [HEAD]
    for family in FAMILIES:
        members = [rule for rule in rules if rule.family == family]
        if not members:
            continue
        sections.append(f"\n## {family}\n\n| operation | rule | moments | mean, std off | source |\n|" + " --- |" * 5)
        for rule in members:
            names = ", ".join(f"`{name}`" for name in sorted({target_name(target) for target in rule.targets}))
            off = ", ".join(f"{value:g}" for value in measured.get(rule.name, ()))
            kind = "certain" if rule.certain else "exact" if rule.exact else "approximate"
            source = rule.source.replace("|", "\\|")
            sections.append(f"| {names} | `{rule.name.removeprefix('adfify.')}` | {kind} | {off} | {source} |")
    return "\n".join(sections) + "\n"


def approximate(rules: list[Rule]) -> list[Rule]:
    """What has to be measured."""
    return [rule for rule in rules if not rule.exact and not rule.certain and not made_of_functions(rule)]


def made_of_functions(rule: Rule) -> bool:
    """Whether it is the function behind a module that is a small network, and measured as that."""
    return "composed" in rule.source and not isinstance(rule.apply, type)


def recorded() -> Errors:
    """What has been measured, by the rule's name."""
    return json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}


def main(again: Annotated[bool, typer.Option(help="Measure what has been measured before, too.")] = False) -> None:
    """Measure what is new, and write the page."""
    rules = adfify.supported()
    wanted = {rule.name: rule for rule in approximate(rules)}
    measured = {} if again else {name: errors for name, errors in recorded().items() if name in wanted}
    for name in tqdm([name for name in wanted if name not in measured], unit="rule"):
        measured[name] = measure(wanted[name])
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(measured[key])}" for key in sorted(measured))
        MEASURED.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    PAGE.write_text(page(rules, measured), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
