"""What the numbers of a picture file mean: 8 bits as they are, all deeper ones as floats in [0, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from adfify.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# Note [A picture's range is its format's]
# PIL converts 16 and 32 bits to 8 by clipping: a 16-bit photograph becomes a white sheet, and a float one black. So
# deeper pictures are scaled before anybody converts them, by the range that their format defines. It is never taken
# from the largest value that happens to be in the picture: a dark picture is to stay dark. Where the format defines
# none (32-bit integers hold counts of anything, floats outside [0, 1] too), the picture is refused.

LARGEST = 1 << 29
"""Bytes of a picture's pixels: 178 million in colour, as PIL's own limit is."""

Range = tuple[float, float]
"""The values of black and of white."""

_DEEP = ("I", "F")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF 6.0, section 8
_SIXTEEN_BITS_IN_I = ("PNG", "PPM")  # PIL's mode I has 32 bits, but these formats end at 16
_SIGNED = ("FITS",)


def range_of(picture: Image.Image) -> Range | None:
    """The values of black and white in a deep grey picture; None for the 8-bit modes, which PIL knows how to convert.

    Args:
        picture: as opened from its file, which still knows its format.

    Raises:
        DataError: the mode is named, and what to do.
    """
    if not picture.mode.startswith(_DEEP):
        return None
    tags = getattr(picture, "tag_v2", {})
    if picture.mode == "F":
        white = 1.0
    elif picture.mode.startswith("I;16") and picture.format not in _SIGNED:
        # 12 bits of a TIFF are read into 16, as they are.
        white = 2.0 ** int(tags[_BITS_PER_SAMPLE][0]) - 1 if _BITS_PER_SAMPLE in tags else 65535.0
    elif picture.mode == "I" and picture.format in _SIXTEEN_BITS_IN_I:
        white = 65535.0
    else:
        raise DataError(
            f"its pixels are integers of mode {picture.mode}, which have no range of their own: nothing says which "
            "value is white. Save it with 8 or 16 bits (as np.uint16, with 65535 for white), or as float in [0, 1]."
        )
    return (white, 0.0) if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else (0.0, white)


def in_unit_range(picture: Image.Image, range_: Range | None) -> Image.Image:
    """A deep grey picture in mode F, black being 0 and white 1; others as they are.

    Args:
        picture: turned upright, perhaps.
        range_: see :func:`range_of`, of the file.

    Raises:
        DataError: values outside of the range: nothing is clipped.
    """
    if range_ is None:
        return picture
    black, white = range_
    floats = picture.convert("F")
    values = numpy.asarray(floats)
    low, high = float(values.min()), float(values.max())  # NaN, where there is one
    if not min(black, white) <= low <= high <= max(black, white):
        raise DataError(
            f"its pixels are of mode {picture.mode}, whose range here is {min(black, white):g} to "
            f"{max(black, white):g}, and it has values from {low:.6g} to {high:.6g}. "
            "Nothing is clipped: scale it to that range, and save it again."
        )
    return floats.point(lambda value: value * (1 / (white - black)) + -black / (white - black))


def in_colours(picture: Image.Image, channels: int) -> Image.Image:
    """An 8-bit picture of any mode in one channel, ``L``, or three, ``RGB``.

    An alpha channel is left away, as in training (torchvision's ImageFolder).

    Raises:
        DataError: PIL knows no way from its mode.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        return picture.convert(mode)
    except ValueError as error:
        raise DataError(
            f"its pixels are of mode {picture.mode}, which PIL can't convert to {mode}: {error}."
        ) from error


def refuse_huge(picture: Image.Image) -> None:
    """Raise DataError for a picture of more than `LARGEST` bytes, which its header says before anything is decoded."""
    width, height = picture.size
    bytes_each = 4 if picture.mode.startswith(_DEEP) else len(picture.getbands())
    if width * height * bytes_each > LARGEST:
        raise DataError(
            f"it has {width} x {height} pixels of mode {picture.mode}, and at most {LARGEST:,} bytes are read"
        )
