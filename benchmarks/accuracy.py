"""How true means, standard deviations and covariances are, and what they cost: every method, against Monte Carlo.

    python benchmarks/accuracy.py                       # all networks and noise levels; hours on two cores, resumable
    python benchmarks/accuracy.py --network mlp --again

The truth is 4,096 noisy passes of the original network for every picture and level, kept in .cache/accuracy together
with the networks that are trained here. Writes docs/accuracy.jsonl, the figure, and the tables in docs/accuracy.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor, nn

from adfify import Moments, adfify, monte_carlo, published
from adfify.checkpoint import demo_source
from adfify.network import ADFNetwork
from adfify.noisy import Draws
from adfify.prediction import read_picture

ROOT = Path(__file__).resolve().parent.parent
CACHE, RESULTS = ROOT / ".cache" / "accuracy", ROOT / "docs" / "accuracy.jsonl"
PAGE, FIGURE = ROOT / "docs" / "accuracy.md", ROOT / "docs" / "accuracy.png"
LEVELS = (1e-4, 1e-3, 1e-2, 1e-1)
PICTURES, DRAWS, TOP = 8, 4096, 5
PHOTOGRAPHS = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png", "astronaut.png",
               "retina.jpg", "coins.png")  # fmt: skip
SEEDS = 3
"""Of methods that draw: figures are medians over so many; of plain Monte Carlo on the large network over one."""

Record = dict[str, Any]


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 digits, ``[N, 1, 8, 8]`` with mean 0 and variance 1, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return ((x - x.mean()) / x.std())[order], torch.tensor(data.target)[order]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def resnet18() -> nn.Module:
    import torchvision

    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return model


def vit() -> nn.Module:
    import timm

    return timm.models.VisionTransformer(
        img_size=32, patch_size=4, in_chans=1, num_classes=10, embed_dim=96, depth=6, num_heads=3
    )


def convnext() -> nn.Module:
    import timm

    return timm.models.ConvNeXt(in_chans=1, num_classes=10, depths=(2, 2, 4, 2), dims=(24, 48, 96, 192))


TRAINED: Mapping[
    str, tuple[Callable[[], nn.Module], int, int, float]
] = {  # how it is made, side, epochs, learning rate
    "mlp": (mlp, 8, 30, 1e-3),
    "resnet18": (resnet18, 32, 8, 1e-3),
    "vit": (vit, 32, 40, 1e-3),
    "convnext": (convnext, 32, 30, 2e-3),
}
NETWORKS = (*TRAINED, "efficientnet_lite0")


def trained(name: str) -> tuple[nn.Module, Tensor]:
    """A network trained on 1,500 digits, and :data:`PICTURES` of the rest."""
    make, side, epochs, rate = TRAINED[name]
    x, label = digits()
    if side != x.shape[-1]:
        x = nn.functional.interpolate(x, size=side, mode="bilinear")
    torch.manual_seed(0)
    model, file = make(), CACHE / f"{name}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        optimiser = torch.optim.AdamW(model.parameters(), rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, epochs * (1500 // 50))
        for _ in track(range(epochs), f"training {name}"):
            for rows in torch.randperm(1500).split(50):
                loss = nn.functional.cross_entropy(model(x[rows]), label[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.eval()
    with torch.no_grad():
        right = (model(x[1500:]).argmax(1) == label[1500:]).double().mean()
    print(f"{name}: {float(right):.1%} of 297 unseen digits right")
    return model, x[1500 : 1500 + PICTURES]


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A trained network in eval mode and its pictures, normalised as it takes them."""
    if name != "efficientnet_lite0":
        return trained(name)
    import skimage

    source = demo_source()
    folder = Path(skimage.__file__).parent / "data"
    pictures = torch.stack([read_picture(folder / file, source.preprocessing) for file in PHOTOGRAPHS])
    return source.model.to(memory_format=torch.channels_last), pictures.contiguous(memory_format=torch.channels_last)


def truth(name: str, model: nn.Module, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Indices of the top logits ``[N, 5]``, and their values at noisy inputs ``[N, DRAWS, 5]``."""
    file = CACHE / f"{name}-{level:g}.pt"
    if not file.exists():
        generator, kept = torch.Generator().manual_seed(12345), []
        with torch.inference_mode():
            top = model(x).topk(TOP).indices
            for _ in track(range(DRAWS), f"Monte Carlo on {name} at {level:g}"):
                noisy = x + level**0.5 * torch.randn(x.shape, generator=generator)
                kept.append(model(_like(noisy, x)).gather(1, top))
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"top": top, "draws": torch.stack(kept, 1)}, file)
    data = torch.load(file, weights_only=True)
    return data["top"], data["draws"].double()


def _like(noisy: Tensor, x: Tensor) -> Tensor:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return noisy.contiguous(memory_format=torch.channels_last) if channels_last else noisy


@dataclass(frozen=True)
class Estimate:
    """Of one picture: mean ``[5]``, covariance ``[5, 5]``, or only its diagonal where a method knows no other."""

    mean: Tensor
    covariance: Tensor
    passes: float = float("nan")


Method = Callable[[nn.Module, ADFNetwork, Moments, Tensor, int], Estimate]


def one_pass(model: nn.Module, adf: ADFNetwork, x: Moments, top: Tensor, seed: int) -> Estimate:
    with torch.inference_mode():
        out = adf(x)
    return Estimate(out.mean[0, top], torch.diag(out.variance[0, top]))


def linearisation(model: nn.Module, adf: ADFNetwork, x: Moments, top: Tensor, seed: int) -> Estimate:
    """The Jacobian of the original at the noiseless input."""
    mean = x.mean.detach().requires_grad_()
    output = model(mean)[0, top]
    rows = [torch.autograd.grad(y, mean, retain_graph=True)[0].flatten() for y in output]
    scaled = torch.stack(rows) * x.variance.flatten().sqrt()
    return Estimate(output.detach(), scaled @ scaled.T, 1 + len(top))


def joint(**arguments: Any) -> Method:
    def method(model: nn.Module, adf: ADFNetwork, x: Moments, top: Tensor, seed: int) -> Estimate:
        found = adf.joint(x, outputs=top.tolist(), seed=seed, **arguments)
        assert found.covariance is not None
        samples, draws = int(found.samples), int(found.draws)
        values = draws + samples if found.samples == 2 and found.method == "adjoint" else draws
        passes = values + samples * len(top) if found.method == "adjoint" else samples
        return Estimate(found.mean[0], found.covariance[0], passes if samples else float("nan"))

    return method


def controlled(model: nn.Module, adf: ADFNetwork, x: Moments, top: Tensor, seed: int) -> Estimate:
    found = monte_carlo(model, x, draws=10, control=adf, outputs=top.tolist(), seed=seed)
    assert found.covariance is not None
    return Estimate(found.mean[0], found.covariance[0], 10 * (1 + len(top)))


def draws_alone(count: int) -> Method:
    def method(model: nn.Module, adf: ADFNetwork, x: Moments, top: Tensor, seed: int) -> Estimate:
        noise = Draws(1000 + seed, range(count)).noise("x", x.mean.shape[1:])
        with torch.inference_mode():
            blocks = [x.mean + x.variance.sqrt() * block for block in noise.split(8)]
            values = torch.cat([model(_like(block, x.mean))[:, top] for block in blocks]).double()
        return Estimate(values.mean(0), torch.cov(values.T), count)

    return method


COUNTS = (10, 30, 100, 300)
DRAWN = (
    "joint",
    "joint, samples=2",
    "joint, sketch",
    "Monte Carlo 10, controlled",
    *(f"Monte Carlo {n}" for n in COUNTS),
)
METHODS: Mapping[str, Method] = {
    "one pass": one_pass,
    "published": one_pass,
    "published, floor 1e-3": one_pass,
    "linearisation": linearisation,
    "joint, samples=0": joint(samples=0),
    "joint, sketch": joint(method="sketch"),
    "joint, samples=2": joint(samples=2),
    "joint": joint(),
    "Monte Carlo 10, controlled": controlled,
    **{f"Monte Carlo {count}": draws_alone(count) for count in COUNTS},
}


def forms(model: nn.Module, x: Tensor) -> dict[str, ADFNetwork]:
    """The converted networks that the methods take."""
    plain = adfify(model, x[:1], share_weights=True)
    return {
        "published": adfify(model, x[:1], share_weights=True, rules=published.RULES, min_variance=0.0),
        "published, floor 1e-3": adfify(model, x[:1], share_weights=True, rules=published.RULES, min_variance=1e-3),
    } | dict.fromkeys((name for name in METHODS if not name.startswith("published")), plain)


def measure(
    name: str, level: float, methods: Iterable[str], adfs: Mapping[str, ADFNetwork], model: nn.Module, x: Tensor
) -> Iterable[Record]:
    """One record for each method: medians over the pictures, the top logits and the seeds."""
    top, drawn = truth(name, model, x, level)
    for method in methods:
        estimate = METHODS[method]
        plain = method.removeprefix("Monte Carlo ").isdigit() and name not in TRAINED
        seeds = range(SEEDS if method in DRAWN and not plain else 1)
        seen = [
            against(estimate, model, adfs[method], x[n : n + 1], level, top[n], drawn[n], seed)
            for seed in seeds
            for n in range(len(x))
        ]
        yield {"network": name, "noise_variance": level, "method": method} | {
            key: float(torch.cat([one[key] for one in seen]).nanquantile(0.5)) for key in seen[0]
        }


def against(
    estimate: Method, model: nn.Module, adf: ADFNetwork, x: Tensor, level: float, top: Tensor, drawn: Tensor, seed: int
) -> dict[str, Tensor]:
    """How far off one method is on one picture; its time beside that of a plain forward, in turn."""
    noisy = Moments(x, torch.full_like(x, level))
    began = time.perf_counter()
    found = estimate(model, adf, noisy, top, seed)
    took = time.perf_counter() - began
    with torch.inference_mode():
        plain = min(_timed(lambda: model(x)) for _ in range(3))
    true_mean, true_covariance = drawn.mean(0), torch.cov(drawn.T).reshape(len(top), -1).reshape(len(top), -1)
    true_std, covariance = true_covariance.diagonal().sqrt(), found.covariance.detach().double()
    mean, std = found.mean.detach().double(), covariance.diagonal().clamp(min=0).sqrt()
    inside = {
        f"inside_{share}": ((drawn - mean).abs() <= NormalDist().inv_cdf(0.5 + share / 200) * std).double().mean(0)
        for share in (50, 90, 95)
    }
    return {
        "std_off": (std / true_std - 1).abs(),
        "std_ratio": std / true_std,
        "mean_off": (mean - true_mean).abs() / true_std,
        "covariance_off": ((covariance - true_covariance).norm() / true_covariance.norm()).reshape(1),
        "passes": torch.tensor([float(found.passes)], dtype=torch.float64),
        "time_in_forwards": torch.tensor([took / plain], dtype=torch.float64),
    } | inside


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


HEADER = """\
| σ² | method | std off | (ratio) | mean off, in std | covariance off | inside 50 / 90 / 95 % | passes | time |
|---|---|---|---|---|---|---|---|---|"""


def tables(records: Iterable[Record]) -> str:
    """Markdown: for each network and noise level, every method."""
    by_network: dict[str, list[str]] = {}
    for record in records:
        by_network.setdefault(record["network"], []).append(_row(record))
    return "\n\n".join("\n".join((f"### {name}", "", HEADER, *rows)) for name, rows in by_network.items()) + "\n"


def _row(r: Record) -> str:
    inside = " / ".join(f"{100 * r[f'inside_{share}']:.0f}" for share in (50, 90, 95))
    cells = (
        f"{r['noise_variance']:g}",
        r["method"],
        f"{100 * r['std_off']:.1f} %",
        f"{r['std_ratio']:.3g}",
        f"{r['mean_off']:.2f}",
        f"{100 * r['covariance_off']:.0f} %",
        inside,
        "–" if r["passes"] is None else f"{r['passes']:.0f}",
        f"{r['time_in_forwards']:.1f}",
    )
    return f"| {' | '.join(cells)} |"


SUMMARY = """\
| network | σ² | std off | mean off | covariance off | inside 90 % | passes, top 5 | Monte Carlo needs | times as many |
|---|---|---|---|---|---|---|---|---|"""


def summary(records: Iterable[Record]) -> str:
    """Markdown: what `joint` reaches by default, and how many draws Monte Carlo needs for as good a std."""
    return "\n".join([SUMMARY, *(_summed_up(r) for r in records if r["method"] == "joint")]) + "\n"


def _summed_up(r: Record) -> str:
    # Of N Gaussian draws the std has a relative standard error of 1 / sqrt(2 N), and the median error is 0.6745 of it.
    needed = 0.5 * (NormalDist().inv_cdf(0.75) / r["std_off"]) ** 2
    cells = (
        r["network"],
        f"{r['noise_variance']:g}",
        f"{100 * r['std_off']:.1f} %",
        f"{r['mean_off']:.2f} std",
        f"{100 * r['covariance_off']:.0f} %",
        f"{100 * r['inside_90']:.1f} %",
        f"{r['passes']:.0f}",
        f"{needed:.0f}",
        f"{needed / r['passes']:.1f}",
    )
    return f"| {' | '.join(cells)} |"


BEGIN, END = "<!-- tables: python benchmarks/accuracy.py -->", "<!-- end of the tables -->"
BEGIN_SUMMARY, END_SUMMARY = "<!-- summary: python benchmarks/accuracy.py -->", "<!-- end of the summary -->"


def read() -> list[Record]:
    """The records there are."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def write(records: list[Record]) -> None:
    """Records, tables and figure."""
    order = {name: position for position, name in enumerate(NETWORKS)}
    methods = {name: position for position, name in enumerate(METHODS)}
    records.sort(key=lambda r: (order[r["network"]], r["noise_variance"], methods[r["method"]]))
    RESULTS.write_text("".join(json.dumps(_rounded(record)) + "\n" for record in records))
    page = _put(PAGE.read_text(), BEGIN, tables(read()), END)
    PAGE.write_text(_put(page, BEGIN_SUMMARY, summary(read()), END_SUMMARY))
    draw(read(), FIGURE)


def _put(page: str, begin: str, text: str, end: str) -> str:
    return f"{page.partition(begin)[0]}{begin}\n\n{text}\n{end}{page.partition(end)[2]}"


def _rounded(record: Record) -> Record:
    return {
        key: (None if value != value else float(f"{value:.4g}")) if isinstance(value, float) else value
        for key, value in record.items()
    }


SHOWN = ("one pass", "linearisation", "joint, samples=0", "joint, sketch", "joint, samples=2", "joint",
         "Monte Carlo 10, controlled")  # fmt: skip


def draw(records: list[Record], path: Path) -> None:
    """Error of the std against the cost, all methods: a column for each noise level, a row for each network."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(record["network"] for record in records))
    figure = Figure(figsize=(12, 2.4 * len(names) + 0.9), dpi=120, layout="constrained")
    grid = figure.subplots(len(names), len(LEVELS), sharex="row", sharey=True, squeeze=False)
    for row, name in enumerate(names):
        for axes, level in zip(grid[row], LEVELS, strict=True):
            _panel(axes, [r for r in records if r["network"] == name and r["noise_variance"] == level])
            if row == 0:
                axes.set_title(f"noise variance {level:g}", fontsize=10)
            if row == len(names) - 1:
                axes.set_xlabel("time, in plain forwards", fontsize=9)
        grid[row][0].set_ylabel(f"{name}\nstd off", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path)


def _panel(axes: Any, records: list[Record]) -> None:
    def points(methods: Iterable[str]) -> tuple[list[float], list[float]]:
        there = [r for method in methods for r in records if r["method"] == method]
        return [r["time_in_forwards"] for r in there], [r["std_off"] for r in there]

    counted = points(f"Monte Carlo {n}" for n in COUNTS)
    axes.plot(*counted, "o-", color="#00708a", ms=4, label="Monte Carlo 10, 30, 100, 300")
    for number, method in enumerate(SHOWN):
        chief = method == "joint"
        colour = "#c8373f" if chief else f"C{number}"
        axes.plot(*points([method]), "sD^vP*X"[number], ms=12 if chief else 7, color=colour, label=method)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.2)


def main(
    only: Annotated[list[str] | None, typer.Option("--network", help="One of them; again for more.")] = None,
    level: Annotated[list[float] | None, typer.Option(help="Noise variance; again for more.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="As the tables call it; again for more.")] = None,
    again: Annotated[bool, typer.Option(help="Measure also what there is a record of.")] = False,
    render: Annotated[bool, typer.Option(help="Only draw the tables and the figure from the records.")] = False,
) -> None:
    """Measure what has no record yet."""
    torch.set_num_threads(1)
    for name in () if render else only or NETWORKS:
        there = set() if again else set(map(_key, read()))
        wanted = {at: [m for m in method or METHODS if (name, at, m) not in there] for at in level or LEVELS}
        if not any(wanted.values()):
            continue
        model, x = network(name)
        adfs = forms(model, x)
        for at, methods in wanted.items():
            new = list(measure(name, at, methods, adfs, model, x))
            write([r for r in read() if _key(r) not in set(map(_key, new))] + new)
    write(read())


def _key(record: Record) -> tuple[str, float, str]:
    return record["network"], record["noise_variance"], record["method"]


if __name__ == "__main__":
    typer.run(main)
