"""How a picture becomes the tensor that a network was trained on, and the noise of its pixels a variance."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from adfify import pixels, records
from adfify.errors import CheckpointError, DataError, InputError
from adfify.printable import printable

if TYPE_CHECKING:
    from PIL import Image

Library = Literal["timm", "torchvision"]

_SIDES = range(1, 1 << 14)  # pixels; the largest networks of timm take 1024
_CROPS = ("center", "squash", "border")
_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "lanczos", "box", "hamming", "random")


def needs(library: str, extra: str = "models") -> Any:
    """Import a library that only an extra installs.

    Raises:
        CheckpointError: it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise CheckpointError(
            f"This needs {library.split('.')[0]}, which can't be imported here ({error}). "
            f"Install it with: pip install 'adfify[{extra}]'"
        ) from error


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a picture before a network sees it: resize, crop, scale to [0, 1], normalise.

    The defaults are those of most ImageNet networks.

    Attributes:
        input_size: channels, height and width of the tensor.
        mean: of each channel, in units of pixels in [0, 1]; subtracted.
        std: of each channel, in the same units; divided by.
        interpolation: ``"bilinear"``, ``"bicubic"`` ..., as the library calls it.
        crop_pct: shorter side of the crop over that of the resized picture.
        crop_mode: ``"center"``, ``"squash"`` or ``"border"``, in timm's meaning; torchvision has only the first.
        library: whose transforms do it, ``"timm"`` or ``"torchvision"``.
        resize_size: torchvision only: the shorter side after resizing, in pixels; None is crop / crop_pct.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    library: Library = "timm"
    resize_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse what prepares no picture.

        Raises:
            InputError: which, and why.
        """
        if not all(size in _SIDES for size in self.input_size):
            raise InputError(f"input_size is {self.input_size}, and should be from 1 to {_SIDES[-1]} each")
        if not self.mean or not all(map(math.isfinite, self.mean)):
            raise InputError(f"mean is {self.mean!r:.80}, and should be finite, one number for each channel")
        if not self.std or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise InputError(f"std is {self.std!r:.80}, and should be finite and above 0, one number for each channel")
        if self.interpolation not in _INTERPOLATIONS:
            raise InputError(f"interpolation is {self.interpolation!r:.80}, and should be {', '.join(_INTERPOLATIONS)}")
        if self.crop_mode not in _CROPS:
            raise InputError(f"crop_mode is {self.crop_mode!r:.80}, and should be {', '.join(_CROPS)}")
        resized = self.resize_size
        if not (math.isfinite(self.crop_pct) and self.crop_pct > 0):
            raise InputError(f"crop_pct is {self.crop_pct}, and should be above 0")
        if resized is None:
            resized = int(min(1e9, max(self.input_size[1:]) / self.crop_pct))
        if resized not in _SIDES:
            raise InputError(
                f"crop_pct is {self.crop_pct} and resize_size {self.resize_size}: pictures would be resized to "
                f"{resized} pixels, and at most {_SIDES[-1]} are."
            )

    @classmethod
    def of(cls, model: nn.Module, spec: str) -> Preprocessing:
        """What belongs to a model.

        Args:
            model: the network, from which timm reads its configuration.
            spec: where it was made from: ``timm:NAME``, ``torchvision:NAME``; for anything else it is the
                defaults of this class.

        Raises:
            CheckpointError: the library is not installed.
        """
        library, _, name = spec.partition(":")
        if library == "timm":
            config = needs("timm.data").resolve_model_data_config(model)
            return cls(
                input_size=tuple(config["input_size"]),
                mean=tuple(config["mean"]),
                std=tuple(config["std"]),
                interpolation=config["interpolation"],
                crop_pct=config["crop_pct"],
                crop_mode=config["crop_mode"],
            )
        if library == "torchvision":
            return cls._of_torchvision(name)
        return cls()

    @classmethod
    def _of_torchvision(cls, name: str) -> Preprocessing:
        """From the transforms of the default weights, which are read without the weights themselves."""
        defaults = cls(interpolation="bilinear", library="torchvision", resize_size=256)
        weights = torchvision_weights(name)
        if weights is None:
            return defaults
        transforms, preset = needs("torchvision.transforms"), weights.transforms()
        resize = list(getattr(preset, "resize_size", None) or [256])
        crop = list(getattr(preset, "crop_size", None) or resize)  # segmentation: resized, not cropped
        return cls(
            input_size=(3, crop[0], crop[-1]),
            mean=tuple(getattr(preset, "mean", defaults.mean)),
            std=tuple(getattr(preset, "std", defaults.std)),
            interpolation=getattr(preset, "interpolation", transforms.InterpolationMode.BILINEAR).value,
            crop_pct=min(crop) / min(resize),
            library="torchvision",
            resize_size=min(resize),
        )

    def tensor(self, picture: Image.Image) -> Tensor:
        """A picture of any mode and size as ``[C, H, W]``, float32, normalised, by the library's own transforms.

        Raises:
            InputError: the network takes neither grey nor colour pictures.
            DataError: nothing says what the picture's values mean, see Note [A picture's range is its format's]; or it
                is so narrow that it can't be resized.
            CheckpointError: the library is not installed.
        """
        channels = self.input_size[0]
        if channels not in (1, 3):
            raise InputError(f"the network takes {channels} channels, and a picture has 1 or 3; give it tensors.")
        self._refuse_narrow(*picture.size)
        shown = pixels.in_unit_range(picture, pixels.range_of(picture))
        if shown.mode == "F":
            return torch.cat([self._channel(shown, channel) for channel in range(channels)])
        result: Tensor = self._transform(self.mean, self.std)(pixels.in_colours(shown, channels))
        return result

    def _refuse_narrow(self, width: int, height: int) -> None:
        """Raise DataError where the longer side, in proportion to the shorter one, comes out too long."""
        crop = self.input_size[1:]
        shorter = self.resize_size or max(crop) / self.crop_pct
        kept = shorter * shorter * max(width, height) / max(1, min(width, height))
        if self.crop_mode == "center" and kept * self.input_size[0] > pixels.LARGEST:
            raise DataError(
                f"it has {width} x {height} pixels, and its shorter side is resized to {shorter:.0f}, which would make "
                f"{kept:.3g} of them: crop it first"
            )

    def _channel(self, floats: Image.Image, channel: int) -> Tensor:
        """``[1, H, W]``, one channel of a grey picture of floats in [0, 1], which resizing rounds nowhere."""
        mean, std = (float(self._per_channel(values)[channel]) for values in (self.mean, self.std))
        # In units of 255, in which timm's borders are; where resizing overshoots it ends there, as 8 bits do.
        prepared: Tensor = self._transform((mean,), (1.0,))(floats.point(lambda value: value * 255))
        return ((prepared + mean).clamp(0, 255) / 255 - mean) / std

    def _transform(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Image.Image], Any]:
        if self.library == "torchvision":
            return self._torchvision_transform(mean, std)
        transform: Callable[[Image.Image], Any] = needs("timm.data").create_transform(
            input_size=self.input_size,
            is_training=False,
            mean=mean,
            std=std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return transform

    def _torchvision_transform(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Image.Image], Any]:
        """The steps of torchvision's ImageClassification preset."""
        transforms = needs("torchvision.transforms")
        crop = self.input_size[1:]
        steps: Callable[[Image.Image], Any] = transforms.Compose(
            [
                transforms.Resize(
                    self.resize_size or round(min(crop) / self.crop_pct),
                    interpolation=transforms.InterpolationMode(self.interpolation),
                    antialias=True,
                ),
                transforms.CenterCrop(crop),
                transforms.PILToTensor(),
                transforms.ConvertImageDtype(torch.float32),
                transforms.Normalize(mean, std),
            ]
        )
        return steps

    def variance(self, noise_variance: float) -> Tensor:
        """``[C, 1, 1]``: what noise of this variance on every pixel, in [0, 1], is after the normalisation.

        The variance over std squared. Resizing averages pixels and would make it smaller: the noise is taken to be
        on the pixels that the network is given.
        """
        return noise_variance / self._per_channel(self.std).square()

    def pixels(self, tensor: Tensor) -> Tensor:
        """``[..., C, H, W]``, normalised, back to pixels in [0, 1], clipped there, for figures."""
        mean, std = (self._per_channel(values).to(tensor) for values in (self.mean, self.std))
        return (tensor * std + mean).clamp(0, 1)

    def _per_channel(self, values: tuple[float, ...]) -> Tensor:
        channels = self.input_size[0]
        return torch.tensor(values if len(values) == channels else values[:1] * channels).view(-1, 1, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """The inverse of :meth:`to_json`.

        Raises:
            CheckpointError: a field is not known or missing, or holds what prepares no picture.
        """
        try:
            return records.read(cls, data, "preprocessing")
        except records.RecordError as error:
            raise CheckpointError(f"{printable(repr(data)[:200])} is no preprocessing: {error}.") from error


def torchvision_weights(name: str) -> Any:
    """torchvision's default weights of a model: an enum with ``transforms`` and ``meta``; None where there are none.

    Nothing is downloaded.
    """
    models = needs("torchvision.models")
    try:
        return models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError, RuntimeError):  # models for which torchvision never published any
        return None
