"""A picture is the same picture with 8 bits, with 16 and as floats, or it is refused by its mode."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adfify.errors import DataError
from adfify.prediction import read_picture
from adfify.preprocessing import Preprocessing

# Neither resized nor cropped: then 8 bits and more have to agree to rounding.
PLAIN = Preprocessing(
    input_size=(3, 24, 40), mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2), crop_mode="squash", crop_pct=1
)
GREY = torch.randint(0, 256, (24, 40), generator=torch.Generator().manual_seed(0)).numpy()
PREPARED = {
    "center": Preprocessing(input_size=(3, 32, 32)),
    "border": Preprocessing(input_size=(3, 32, 32), crop_mode="border", crop_pct=1.0),
    "squash": Preprocessing(input_size=(3, 32, 32), crop_mode="squash", interpolation="lanczos"),
    "torchvision": Preprocessing(input_size=(3, 32, 32), library="torchvision", interpolation="bilinear"),
    "one channel": Preprocessing(input_size=(1, 32, 40), mean=(0.5,), std=(0.5,)),
}


def saved(path: Path, values: np.ndarray, **options: object) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


def assert_same(path: Path, expected: Path, preprocessing: Preprocessing = PLAIN, levels: float = 0.01) -> None:
    """Within so many of 255 grey levels."""
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    off = (read_picture(path, preprocessing) - read_picture(expected, preprocessing)) * std * 255
    assert off.abs().max() < levels


@pytest.fixture
def eight(tmp_path) -> Path:
    return saved(tmp_path / "eight.png", GREY.astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "dtype", "factor"),
    [
        ("a.png", np.uint16, 257),
        ("a.pgm", np.uint16, 257),
        ("a.jp2", np.uint16, 257),
        ("a.tif", np.uint16, 257),
        ("big-endian.tif", ">u2", 257),
        ("float.tif", np.float32, 1 / 255),
        ("float.pfm", np.float32, 1 / 255),
    ],
)
def test_deep_pictures_are_scaled_by_the_range_of_their_format(tmp_path, eight, name, dtype, factor):
    deep = saved(tmp_path / name, (GREY * factor).astype(dtype), **({"lossless": True} if name == "a.jp2" else {}))
    assert Image.open(deep).mode in ("I;16", "I;16B", "I", "F")
    assert_same(deep, eight)


@pytest.mark.parametrize("way", PREPARED)
def test_deep_pictures_go_through_every_preparation(tmp_path, way):
    smooth = np.add.outer(np.arange(70.0), np.arange(90.0)) * 255 / 158  # which resizing does not overshoot
    eight = saved(tmp_path / "eight.png", smooth.round().astype(np.uint8))
    deep = saved(tmp_path / "deep.png", smooth.round().astype(np.uint16) * 257)
    assert read_picture(deep, PREPARED[way]).shape == PREPARED[way].input_size
    assert_same(deep, eight, PREPARED[way], levels=1.1)


def test_a_dark_picture_stays_dark(tmp_path):
    dark = saved(tmp_path / "dark.png", (GREY // 16).astype(np.uint8))
    assert_same(saved(tmp_path / "deep.png", (GREY // 16 * 257).astype(np.uint16)), dark)
    assert_same(saved(tmp_path / "deep.tif", (GREY // 16 / 255).astype(np.float32)), dark)


def tiff(bits: int, photometric: int, data: bytes, width: int, height: int) -> bytes:
    """A grey TIFF of one strip."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (279, len(data))])
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", 9) + entries + bytes(4)


def test_twelve_bits_and_white_is_zero(tmp_path, eight):
    twelve = np.round(GREY / 255 * 4095).astype(int).reshape(-1, 2)
    packed = bytes(
        byte for a, b in twelve.tolist() for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255)
    )  # two pixels in three bytes
    (tmp_path / "twelve.tif").write_bytes(tiff(12, 1, packed, 40, 24))
    assert_same(tmp_path / "twelve.tif", eight, levels=0.1)
    negative = ((255 - GREY) * 257).astype("<u2").tobytes()
    (tmp_path / "negative.tif").write_bytes(tiff(16, 0, negative, 40, 24))
    assert_same(tmp_path / "negative.tif", eight)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((GREY * 257).astype(np.int32), ["mode I", "which value is white"]),
        ((GREY * 8_421_504).astype(np.int32), ["mode I"]),
        (GREY.astype(np.float32), ["mode F", "from 0 to 255", "Nothing is clipped"]),
        ((GREY / 255 - 0.5).astype(np.float32), ["mode F", "from -0.5"]),
        (np.where(GREY > 128, np.nan, 0.5).astype(np.float32), ["mode F", "nan"]),
        (np.where(GREY > 128, np.inf, 0.5).astype(np.float32), ["mode F", "inf"]),
    ],
    ids=["counts", "32 bits", "0 to 255", "signed", "NaN", "inf"],
)
def test_what_has_no_range_is_refused_by_mode(tmp_path, values, words):
    path = saved(tmp_path / "a.tif", values)
    with pytest.raises(DataError) as caught:
        read_picture(path, PLAIN)
    assert all(word in str(caught.value) for word in [str(path), *words])
    with pytest.raises(DataError):
        PLAIN.tensor(Image.open(path))


def test_a_mode_that_pil_cant_convert_is_refused(monkeypatch, eight):
    def refuse(*args: object) -> None:
        raise ValueError("no way")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(DataError, match="mode L, which PIL can't convert to RGB"):
        read_picture(eight, PLAIN)


# 8 bits, in every mode: as they always were


def test_grey_becomes_three_equal_channels(eight):
    pixels = PLAIN.pixels(read_picture(eight, PLAIN)) * 255
    expected = torch.from_numpy(GREY).float().expand(3, -1, -1)
    torch.testing.assert_close(pixels, expected, atol=1e-3, rtol=0)


def test_every_8_bit_mode_keeps_its_colours(tmp_path):
    generator = torch.Generator().manual_seed(1)
    colours = torch.randint(0, 256, (24, 40, 3), generator=generator).to(torch.uint8).numpy()
    plain = saved(tmp_path / "plain.png", colours)
    alpha = np.full((24, 40, 1), 7, np.uint8)
    assert_same(saved(tmp_path / "rgba.png", np.concatenate([colours, alpha], 2)), plain)
    grey = saved(tmp_path / "grey.png", colours[..., 0])
    assert_same(saved(tmp_path / "la.png", np.concatenate([colours[..., :1], alpha], 2)), grey)
    Image.fromarray(255 - colours).convert("CMYK").save(tmp_path / "cmyk.tif")
    assert_same(tmp_path / "cmyk.tif", saved(tmp_path / "inverse.png", 255 - colours), levels=1.1)
    few = Image.fromarray(colours // 128 * 255)
    few.quantize(8).save(tmp_path / "palette.png")
    few.save(tmp_path / "few.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert_same(tmp_path / "palette.png", tmp_path / "few.png")
    one = saved(tmp_path / "bits.png", colours[..., 0] > 128)
    assert_same(one, saved(tmp_path / "black and white.png", (colours[..., 0] > 128).astype(np.uint8) * 255))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("suffix", "deep"), [("png", False), ("png", True), ("tif", True)])
def test_a_deep_photograph_is_read_upright(tmp_path, orientation, suffix, deep):
    values = GREY[:24, :24].astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole = saved(tmp_path / "eight.png", values, exif=exif)
    path = saved(tmp_path / f"deep.{suffix}", values.astype(np.uint16) * 257 if deep else values, exif=exif)
    square = Preprocessing(input_size=(3, 24, 24), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)
    assert_same(path, whole, square)
    turned = np.asarray(Image.fromarray(values).transpose(_TURN[orientation]) if orientation > 1 else values)
    read = square.pixels(read_picture(path, square))[0] * 255
    torch.testing.assert_close(read, torch.from_numpy(turned.copy()).float(), atol=0.01, rtol=0)


# Exif 2.32, tag 0x0112: what brings the first row and column to their places.
_T = Image.Transpose
_TURN = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE, 6: _T.ROTATE_270,
    7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # fmt: skip


def test_16_bits_of_colour_are_read_by_pil(tmp_path):
    """PIL takes the upper 8 bits, which is no clipping."""
    png = io.BytesIO()
    Image.new("RGB", (40, 24), (10, 128, 250)).save(png, "PNG")
    deep = bytearray(b"\x89PNG\r\n\x1a\n")

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\x00" + struct.pack(">3H", 10 * 257, 128 * 257, 250 * 257) * 40
    deep += chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 24, 16, 2, 0, 0, 0))
    deep += chunk(b"IDAT", zlib.compress(row * 24)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(deep)
    (tmp_path / "plain.png").write_bytes(png.getvalue())
    assert_same(tmp_path / "deep.png", tmp_path / "plain.png")
