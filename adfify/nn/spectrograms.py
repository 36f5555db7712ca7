"""Short-time Fourier transforms and their inverse, with a certain window: linear maps, so exact.

A sample that a reflection brings into a frame a second time is one variable there, with the sum of its two weights. As
everywhere in one pass, frames that overlap have parts in common that what follows does not know of.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from adfify.gaussian import fourier
from adfify.moments import ComplexMoments, Moments
from adfify.nn.complex_parts import with_mean
from adfify.registry import Certain, OneOf, Uncertain, case, register

aten = torch.ops.aten

SOURCE = "linear map: transforms of the variances by squared windows, see gaussian.fourier"

framed = partial(register, family="pooling", exact=True, source=SOURCE)


def _window(window: Tensor | None, win_length: int | None, n_fft: int, like: Tensor) -> Tensor:
    """The window in the middle of ``n_fft`` places."""
    length = n_fft if win_length is None else win_length
    found = like.new_ones(length) if window is None else window.to(like.dtype)
    left = (n_fft - length) // 2
    return F.pad(found, (left, n_fft - length - left))


def _padded(x: Tensor, by: int, pad_mode: str) -> Tensor:
    """Samples, [..., T], with ``by`` more at either end."""
    return F.pad(x.reshape(1, -1, x.shape[-1]), (by, by), pad_mode).reshape(*x.shape[:-1], x.shape[-1] + 2 * by)


def _frame_variances(
    variance: Tensor, window: Tensor, n_fft: int, hop: int, pad: tuple[int, str], onesided: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Of real and imaginary parts, [..., F, frames]."""
    by, mode = pad
    padded = _padded(variance, by, mode) if by else variance
    frames = padded.unfold(-1, n_fft, hop) * window.square()
    parts = [part.mT for part in fourier.spectrum(frames, None, (n_fft,), (-1,), onesided, scale)]
    if not by or mode == "constant":
        return parts[0], parts[1]
    samples = torch.arange(variance.shape[-1], dtype=torch.float64, device=variance.device)
    places = _padded(samples, by, mode).long().unfold(0, n_fft, hop)
    for frame, place in enumerate(places):
        inner = by <= frame * hop and frame * hop + n_fft <= by + variance.shape[-1]
        if not inner:
            edge = fourier.repeated(variance.index_select(-1, place), place, window, onesided, scale)
            parts = [torch.cat([p[..., :frame], e.unsqueeze(-1), p[..., frame + 1 :]], -1) for p, e in zip(
                parts, edge, strict=True
            )]  # fmt: skip
    return parts[0], parts[1]


_SIGNAL = Uncertain((2, 20))


@framed(
    torch.stft, "stft", only={"return_complex": True, "align_to_window": OneOf(None, False)},
    cases=[
        case(_SIGNAL, 8, return_complex=True),
        case(Uncertain((21,)), 8, 3, 6, Certain((6,)), return_complex=True, normalized=True),
        case(_SIGNAL, 7, 2, window=Certain((7,)), center=False, onesided=False, return_complex=True),
        case(_SIGNAL, 8, 4, pad_mode="constant", return_complex=True),
    ],
)  # fmt: skip
def stft(
    input: Moments, n_fft: int, hop_length: int | None = None, win_length: int | None = None,
    window: Tensor | None = None, center: bool = True, pad_mode: str = "reflect", normalized: bool = False,
    onesided: bool | None = None, return_complex: bool | None = None, align_to_window: bool | None = None,
) -> ComplexMoments:  # fmt: skip
    mean = torch.stft(
        input.mean, n_fft, hop_length, win_length, window, center, pad_mode, normalized, onesided, return_complex
    )
    scale, hop = n_fft**-0.5 if normalized else 1.0, n_fft // 4 if hop_length is None else hop_length
    placed = _window(window, win_length, n_fft, input.variance)
    pad = (n_fft // 2 if center else 0, pad_mode)
    spread = _frame_variances(input.variance, placed, n_fft, hop, pad, onesided in (None, True), scale)
    return with_mean(mean, *spread)


@framed(
    aten.stft, only={"return_complex": True, "align_to_window": OneOf(None, False)},
    cases=[case(_SIGNAL, 8, 4, 8, Certain((8,)), True, True, True)],
)  # fmt: skip
def aten_stft(
    input: Moments, n_fft: int, hop_length: int | None = None, win_length: int | None = None,
    window: Tensor | None = None, normalized: bool = False, onesided: bool | None = None,
    return_complex: bool | None = None, align_to_window: bool | None = None,
) -> ComplexMoments:  # fmt: skip
    return stft(input, n_fft, hop_length, win_length, window, False, "reflect", normalized, onesided, return_complex)


_SPECTRUM = Uncertain((2, 5, 6), complex=True)


@framed(
    torch.istft, "istft", aten.istft, complex=True, only={"onesided": OneOf(None, True), "return_complex": False},
    cases=[
        case(_SPECTRUM, 8, None, None, Certain((8,), positive=True)),
        case(_SPECTRUM, 8, 3, 6, Certain((6,), positive=True), True, True, None, 14),
    ],
)  # fmt: skip
def istft(
    input: ComplexMoments, n_fft: int, hop_length: int | None = None, win_length: int | None = None,
    window: Tensor | None = None, center: bool = True, normalized: bool = False, onesided: bool | None = None,
    length: int | None = None, return_complex: bool = False,
) -> Moments:  # fmt: skip
    mean = torch.istft(
        input.mean, n_fft, hop_length, win_length, window, center, normalized, onesided, length, return_complex
    )
    hop, scale = n_fft // 4 if hop_length is None else hop_length, n_fft**0.5 if normalized else 1.0
    real, imag = input.real.variance, input.imag.variance
    power = _window(window, win_length, n_fft, real).square()
    frames = fourier.signal(real, imag, (n_fft,), (real.dim() - 2,), scale / n_fft) * power.unsqueeze(-1)
    total = _overlapped(frames, n_fft, hop)
    envelope = _overlapped(power.unsqueeze(-1).expand(n_fft, real.shape[-1]), n_fft, hop)
    spread = total / torch.where(envelope > 1e-11, envelope, 1.0).square()
    start = n_fft // 2 if center else 0
    spread = spread[..., start : start + mean.shape[-1]]
    return Moments(mean, F.pad(spread, (0, mean.shape[-1] - spread.shape[-1])))


def _overlapped(frames: Tensor, n_fft: int, hop: int) -> Tensor:
    """Sums of frames, [..., n_fft, count], each ``hop`` later than the one before."""
    count = frames.shape[-1]
    flat = frames.reshape(-1, n_fft, count)
    size = (1, (count - 1) * hop + n_fft)
    return F.fold(flat, size, (1, n_fft), stride=(1, hop)).reshape(*frames.shape[:-2], size[1])
