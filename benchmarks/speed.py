"""What a pass of the ADF network costs, in passes of the plain one: both in turn in one process, on this machine.

    python benchmarks/speed.py
    python benchmarks/speed.py --model timm:resnet50 --batch-size 8 --device cuda --compile --json speed.json

Only ratios are reported. Times depend on the machine and on what else it does; the ratio much less.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

import adfify
from adfify.benchmark import Cost, interleaved
from adfify.checkpoint import open_source

MODELS = (
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",  # ReLU6
    "timm:efficientnet_lite0",
    "timm:efficientnet_b0",  # SiLU
    "timm:vit_tiny_patch16_224",  # GELU, softmax
)


@dataclass(frozen=True)
class Measurement:
    """The ratio for one network, and under which conditions."""

    model: str
    form: str
    input_size: tuple[int, ...]
    device: str
    threads: int
    torch: str
    cost: Cost


def forms(model: torch.nn.Module, compiled: bool) -> dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]]:
    """The plain network beside the ADF one, as they are, and both compiled."""
    adf = adfify.adfify(model, share_weights=True)
    eager = {"eager": (model, adf)}
    return eager | {"compiled": (torch.compile(model), torch.compile(adf))} if compiled else eager


def measure(spec: str, compiled: bool, rounds: int, batch_size: int, device: str) -> list[Measurement]:
    """Every form of one network, with random weights: the time does not depend on them."""
    source = open_source(spec)
    x = torch.randn(batch_size, *source.preprocessing.input_size, generator=torch.Generator().manual_seed(0)).to(device)

    def timed(network: Callable[[Tensor], Any]) -> None:
        with torch.inference_mode():
            network(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    results = []
    for form, (plain, adf) in forms(source.model.to(device), compiled).items():
        cost = interleaved(lambda plain=plain: timed(plain), lambda adf=adf: timed(adf), rounds)
        where = torch.cuda.get_device_name() if x.is_cuda else "cpu"
        version = str(torch.__version__)
        results.append(Measurement(spec, form, tuple(x.shape), where, torch.get_num_threads(), version, cost))
    return results


def main(
    model: Annotated[list[str] | None, typer.Option(help="timm:NAME or torchvision:NAME; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=20, help="How often each network runs.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    device: str = "cpu",
    compile: Annotated[bool, typer.Option("--compile", help="Measure torch.compile of both, too.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the measurements here.")] = None,
) -> None:
    """Time of the ADF pass in units of the plain network's."""
    table = Table(Column("network", no_wrap=True), "form", "batch", "ratio, median", "ratio, minimum", "rounds")
    results = []
    for spec in model or MODELS:
        for result in measure(spec, compile, rounds, batch_size, device):
            results.append(result)
            ratios = (f"{result.cost.median:.2f}", f"{result.cost.minimum:.2f}")
            table.add_row(spec, result.form, str(batch_size), *ratios, str(rounds))
    Console().print(table)
    record = json.dumps([asdict(result) for result in results], indent=1)
    if json_file is None:
        print(record)
    else:
        json_file.write_text(record + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
