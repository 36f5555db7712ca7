"""Every network of the census, converted and held against the original: one process each, so that a run can be resumed.

    python benchmarks/coverage.py                      # all of benchmarks/census.txt; what is done is skipped
    python benchmarks/coverage.py --only timm:resnet10t --only tv:alexnet --again
    python benchmarks/coverage.py --spread --again     # a dozen small ones, of both engines; CI runs these

Each network has random weights of a fixed seed. It runs in float64 on a certain picture, in float32 on an uncertain
one, and the original on noisy ones, for the Monte Carlo columns, which are a look at the one-pass moments and no test:
their bias is known. The results are docs/coverage.jsonl, and the table docs/coverage.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

import adfify
from adfify import Moments
from adfify.moments import is_moments

HERE = Path(__file__).parent
CENSUS, RESULTS = HERE / "census.txt", HERE.parent / "docs" / "coverage.jsonl"
NOISE_VARIANCE = 1e-3
LARGE = 300
"""Pictures of this size are drawn 8 times only: a look costs minutes."""
SPREAD = (
    "timm:test_vit",
    "timm:test_nfnet",
    "timm:test_mambaout",
    "timm:test_vit_relpos",
    "timm:resnet10t",
    "timm:mobilenetv3_small_050",
    "timm:efficientvit_m0",
    "timm:pvt_v2_b0",
    "timm:swiftformer_xs",
    "timm:levit_128s",
    "timm:ghostnet_050",
    "tv:squeezenet1_1",
    "tv:shufflenet_v2_x0_5",
)
"""Small networks of different kinds."""

Record = dict[str, Any]


def build(name: str) -> nn.Module:
    """A network of the census with random weights, in eval mode: ``timm:``, ``tv:`` or ``tvseg:`` and its name."""
    library, _, model = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        return timm.create_model(model).eval()
    import torchvision

    options: dict[str, Any] = {"weights_backbone": None} if library == "tvseg" else {}
    if model in ("inception_v3", "googlenet"):
        options["init_weights"] = False
    return torchvision.models.get_model(model, weights=None, **options).eval()


def outputs_of(values: Any) -> list[Any]:
    """The tensors, or Moments, of whatever structure a network returns."""
    return [leaf for leaf in pytree.tree_leaves(values, is_leaf=is_moments) if isinstance(leaf, (Tensor, Moments))]


@torch.no_grad()
def examine(name: str, size: tuple[int, ...], draws: int) -> Record:
    """What the table says of one network."""
    model = build(name).double()
    torch.manual_seed(1)
    picture = torch.randn(1, *size, dtype=torch.float64)
    # The census has some smaller than the model's own configuration says, for time.
    smaller = size[-1] < getattr(model, "pretrained_cfg", {}).get("input_size", size)[-1]
    started = time.perf_counter()
    adf = adfify.adfify(model, picture if smaller else None, noise_variance=NOISE_VARIANCE)
    seconds = time.perf_counter() - started
    certain = Moments(picture, torch.zeros_like(picture))
    plain, still = outputs_of(model(picture)), outputs_of(adf(certain))
    scale = max(float(y.abs().max()) for y in plain) or 1.0  # some networks begin with a head of zeros
    error = max(float((got.mean - y).abs().max()) for got, y in zip(still, plain, strict=True)) / scale
    result: Record = {
        "model": name,
        "engine": adfify.inspect(model, picture if smaller else None).traced.engine,
        "seconds": round(seconds, 1),
        "error at zero variance": error,
        "zero variance stays zero": all(bool((y.variance == 0).all()) for y in still),
        "keys": list(adf.state_dict()) == list(model.state_dict()),
    }
    model, picture = model.float(), picture.float()
    # What torch.export has traced may cast to the dtype it was traced in.
    adf = (
        adf.float()
        if result["engine"] == "torch.fx"
        else adfify.adfify(model, picture if smaller else None, noise_variance=NOISE_VARIANCE)
    )
    noisy = outputs_of(adf(picture))
    result["finite"] = all(bool(y.mean.isfinite().all() & y.variance.isfinite().all()) for y in noisy)
    result["non-negative"] = all(bool((y.variance >= 0).all()) for y in noisy)
    return result | beside_monte_carlo(model, picture, noisy[0], draws)


def beside_monte_carlo(model: nn.Module, picture: Tensor, one_pass: Moments, draws: int) -> Record:
    """Median over outputs: std of one pass over the true one, and mean off in units of that."""
    sampled = torch.cat(
        [
            outputs_of(model(picture + NOISE_VARIANCE**0.5 * torch.randn(4, *picture.shape[1:])))[0].double()
            for _ in range((draws if picture.shape[-1] < LARGE else 8) // 4)
        ]
    )
    mean, std = sampled.mean(0), sampled.std(0)
    varies = std > 1e-6 * mean.abs().max()  # some networks begin with weights of 0, and give constants
    if not varies.any():
        return {"std ratio": "constant", "mean off": "constant"}
    return {
        "std ratio": round(float((one_pass.std[0].double() / std)[varies].median()), 4),
        "mean off": round(float(((one_pass.mean[0].double() - mean).abs() / std)[varies].median()), 3),
    }


def examined() -> dict[str, Record]:
    """What earlier runs have found."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {record["model"]: record for record in map(json.loads, lines)}


def in_own_process(name: str, size: str, draws: int) -> Record:
    """A network may take gigabytes, which only the end of a process gives back for sure."""
    command = [sys.executable, __file__, "--examine", name, "--size", size, "--draws", str(draws)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"model": name, "failed": done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}
    record: Record = json.loads(done.stdout.splitlines()[-1])
    return record


def meets(record: Record) -> bool:
    """Whether a network does all that is asked of it."""
    if "failed" in record:
        return False
    return bool(is_exact(record) and record["keys"] and record["finite"] and record["non-negative"])


def is_exact(record: Record) -> bool:
    """Whether it equals the original at zero variance."""
    return bool(record["error at zero variance"] <= 1e-9 and record["zero variance stays zero"])


COLUMNS = ("model", "engine", "seconds", "error at zero variance", "keys", "finite", "std ratio", "mean off")


def table(records: list[Record]) -> str:
    """The page: what is asked of every network, and how many meet it."""
    good = [r for r in records if "failed" not in r]
    exact = sum(map(is_exact, good))
    lines = [
        "# Coverage",
        "",
        "Made by `python benchmarks/coverage.py`: random weights; see there. The last columns are medians",
        f"over outputs at a noise variance of {NOISE_VARIANCE:g}, against Monte Carlo on the original network: std of",
        "one pass over the true one, and the mean's error in true std. One pass takes units as independent, and its",
        "variance is *not* a calibrated error bar: these columns say by how much.",
        "",
        f"- {len(good)} of {len(records)} convert; {sum(r['keys'] for r in good)} keep all `state_dict` keys, in order",
        f"- {exact} of {len(records)} equal the original at zero variance to 1e-9 of the largest output",
        f"- {sum(r['finite'] and r['non-negative'] for r in good)} give finite, non-negative variances",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for record in records:
        cells = [str(record.get("failed", ""))] if "failed" in record else []
        row = [cell(record.get(column, "")) for column in COLUMNS]
        lines.append("| " + " | ".join([row[0], *cells] if cells else row) + " |")
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(
    only: Annotated[list[str] | None, typer.Option(help="A network of the census; may be repeated.")] = None,
    spread: Annotated[bool, typer.Option("--spread", help="A dozen small ones.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also what an earlier run has examined.")] = False,
    draws: Annotated[int, typer.Option(min=8, help="Monte Carlo draws.")] = 32,
    examine_one: Annotated[str | None, typer.Option("--examine", help="Examine one network in this process.")] = None,
    size: Annotated[str, typer.Option(help="With --examine: its input, 3x224x224.")] = "3x224x224",
) -> None:
    """Convert the census and hold every network against its original; exit code 1 if one falls short."""
    if examine_one is not None:
        print(json.dumps(examine(examine_one, tuple(map(int, size.split("x"))), draws)))
        return
    census = dict(line.split() for line in CENSUS.read_text(encoding="utf-8").splitlines())
    found = examined()
    chosen = only or (SPREAD if spread else list(census))
    for name in tqdm([name for name in chosen if again or "std ratio" not in found.get(name, {})], unit="network"):
        found[name] = in_own_process(name, census[name], draws)
        records = [found[name] for name in census if name in found]
        RESULTS.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        RESULTS.with_suffix(".md").write_text(table(records), encoding="utf-8")
    Console().print(table([found[name] for name in chosen]), soft_wrap=True)
    if not all(meets(found[name]) for name in chosen):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
