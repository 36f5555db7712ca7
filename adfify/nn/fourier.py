"""Fourier transforms: linear maps, so exact; their results are complex, see Note [Complex values] in adfify.moments.

What the one pass leaves out is, as everywhere, that elements of the result depend on each other: a transform of a real
signal along all of its length has each coefficient twice, as its conjugate, and these are taken as two values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adfify.gaussian import fourier
from adfify.moments import ComplexMoments, Moments
from adfify.nn.complex_parts import with_mean
from adfify.nn.structural import both
from adfify.registry import Uncertain, case, register

aten = torch.ops.aten

SOURCE = "linear map: the transform of the variances at twice the frequency, see gaussian.fourier"

transform = partial(register, family="pooling", exact=True, source=SOURCE, complex=True)
shifted = partial(register, family="structural", exact=True, source="moves elements", alias=False, complex=True)


def _cases(*shape: int, sizes: Any, along: Any, complex: bool = False, norm: str = "ortho") -> list[Any]:
    x = Uncertain(shape, complex=complex)
    return [case(x), case(x, sizes, along, norm), case(x, norm="forward")]


def _axes(x: Tensor, sizes: Any, dims: Any) -> tuple[int, ...]:
    """The dimensions as counted from the front: all of them, or the last of as many as there are sizes."""
    if dims is None:
        dims = range(x.dim()) if sizes is None else range(x.dim() - len(sizes), x.dim())
    return tuple(int(dim) % x.dim() for dim in dims)


def _lengths(x: Tensor, sizes: Any, axes: Sequence[int], to_real: bool = False) -> list[int]:
    """Lengths of the transform; -1, and None, stand for the input's own (of half a spectrum: 2 (n - 1))."""
    own = [x.shape[axis] for axis in axes]
    if to_real:
        own[-1] = 2 * (own[-1] - 1)
    return own if sizes is None else [o if size in (None, -1) else size for o, size in zip(own, sizes, strict=True)]


def _scale(lengths: Sequence[int], norm: str | None, divides: bool) -> float:
    """The factor of the plain sum; ``divides`` where it is 1 / count unless ``norm`` says otherwise."""
    count = 1
    for length in lengths:
        count *= length
    if norm == "ortho":
        return float(count**-0.5)
    return 1 / count if divides == (norm in (None, "backward")) else 1.0


def _to_complex(
    op: Callable[..., Tensor], x: Moments | ComplexMoments, sizes: Any, dims: Any, norm: str | None, divides: bool,
    half: bool = False,
) -> ComplexMoments:  # fmt: skip
    """Of ``op``, which is called on the mean alone, with its own arguments: the moments."""
    mean = op(x.mean)
    real = x.real.variance if isinstance(x, ComplexMoments) else x.variance
    imag = x.imag.variance if isinstance(x, ComplexMoments) else None
    axes = _axes(real, sizes, dims)
    lengths = _lengths(real, sizes, axes)
    return with_mean(mean, *fourier.spectrum(real, imag, lengths, axes, half, _scale(lengths, norm, divides)))


def _to_real(
    op: Callable[..., Tensor], x: Moments | ComplexMoments, sizes: Any, dims: Any, norm: str | None, divides: bool
) -> Moments:
    mean = op(x.mean)
    real = x.real.variance if isinstance(x, ComplexMoments) else x.variance
    imag = x.imag.variance if isinstance(x, ComplexMoments) else torch.zeros_like(real)
    axes = _axes(real, sizes, dims)
    lengths = _lengths(real, sizes, axes, to_real=True)
    return Moments(mean, fourier.signal(real, imag, lengths, axes, _scale(lengths, norm, divides)))


_ONE: dict[str, Any] = {"sizes": 5, "along": 0}
_TWO: dict[str, Any] = {"sizes": (3, -1), "along": (0, 1)}
_SOME: dict[str, Any] = {"sizes": (5, 3), "along": (-1, 0)}


@transform(
    torch.fft.fft, aten.fft_fft,
    cases=[*_cases(3, 4, **_ONE), *_cases(3, 4, complex=True, **_ONE), case(Uncertain((2, 6)), n=4, dim=-1)],
)  # fmt: skip
def fft(
    input: Moments | ComplexMoments, n: int | None = None, dim: int = -1, norm: str | None = None
) -> ComplexMoments:
    return _to_complex(partial(torch.fft.fft, n=n, dim=dim, norm=norm), input, _one(n), (dim,), norm, False)


@transform(torch.fft.ifft, aten.fft_ifft, cases=[*_cases(3, 4, **_ONE), *_cases(3, 4, complex=True, **_ONE)])
def ifft(
    input: Moments | ComplexMoments, n: int | None = None, dim: int = -1, norm: str | None = None
) -> ComplexMoments:
    return _to_complex(partial(torch.fft.ifft, n=n, dim=dim, norm=norm), input, _one(n), (dim,), norm, True)


@transform(torch.fft.rfft, aten.fft_rfft, complex=False, cases=[*_cases(3, 4, **_ONE), case(Uncertain((2, 6)), n=4)])
def rfft(input: Moments, n: int | None = None, dim: int = -1, norm: str | None = None) -> ComplexMoments:
    return _to_complex(partial(torch.fft.rfft, n=n, dim=dim, norm=norm), input, _one(n), (dim,), norm, False, True)


@transform(
    torch.fft.irfft, aten.fft_irfft,
    cases=[*_cases(3, 4, complex=True, **_ONE), case(Uncertain((2, 3), complex=True), 7), case(Uncertain((2, 3)), n=3)],
)  # fmt: skip
def irfft(input: Moments | ComplexMoments, n: int | None = None, dim: int = -1, norm: str | None = None) -> Moments:
    return _to_real(partial(torch.fft.irfft, n=n, dim=dim, norm=norm), input, _one(n), (dim,), norm, True)


@transform(torch.fft.hfft, aten.fft_hfft, cases=[*_cases(3, 4, complex=True, **_ONE), case(Uncertain((2, 3)), n=3)])
def hfft(input: Moments | ComplexMoments, n: int | None = None, dim: int = -1, norm: str | None = None) -> Moments:
    return _to_real(partial(torch.fft.hfft, n=n, dim=dim, norm=norm), input, _one(n), (dim,), norm, False)


@transform(torch.fft.ihfft, aten.fft_ihfft, complex=False, cases=_cases(3, 4, **_ONE))
def ihfft(input: Moments, n: int | None = None, dim: int = -1, norm: str | None = None) -> ComplexMoments:
    return _to_complex(partial(torch.fft.ihfft, n=n, dim=dim, norm=norm), input, _one(n), (dim,), norm, True, True)


def _one(n: int | None) -> tuple[int, ...] | None:
    return None if n is None else (n,)


# Several dimensions: of the two kinds, the last two or all of them, the arguments differ only in what is left out


@transform(
    torch.fft.fft2, aten.fft_fft2,
    cases=[*_cases(2, 3, 4, **_TWO), case(Uncertain((2, 3, 2), complex=True), dim=(0, -1))],
)  # fmt: skip
def fft2(
    input: Moments | ComplexMoments, s: Any = None, dim: Any = (-2, -1), norm: str | None = None
) -> ComplexMoments:
    return _to_complex(partial(torch.fft.fft2, s=s, dim=dim, norm=norm), input, s, dim, norm, False)


@transform(torch.fft.ifft2, aten.fft_ifft2, cases=_cases(2, 3, 4, complex=True, **_TWO))
def ifft2(
    input: Moments | ComplexMoments, s: Any = None, dim: Any = (-2, -1), norm: str | None = None
) -> ComplexMoments:
    return _to_complex(partial(torch.fft.ifft2, s=s, dim=dim, norm=norm), input, s, dim, norm, True)


@transform(torch.fft.rfft2, aten.fft_rfft2, complex=False, cases=_cases(2, 3, 4, **_TWO))
def rfft2(input: Moments, s: Any = None, dim: Any = (-2, -1), norm: str | None = None) -> ComplexMoments:
    return _to_complex(partial(torch.fft.rfft2, s=s, dim=dim, norm=norm), input, s, dim, norm, False, True)


@transform(
    torch.fft.irfft2, aten.fft_irfft2,
    cases=[*_cases(2, 3, 3, complex=True, **_TWO), case(Uncertain((3, 3), complex=True), s=(2, 5))],
)  # fmt: skip
def irfft2(
    input: Moments | ComplexMoments, s: Any = None, dim: Any = (-2, -1), norm: str | None = None
) -> Moments:  # fmt: skip
    return _to_real(partial(torch.fft.irfft2, s=s, dim=dim, norm=norm), input, s, dim, norm, True)


@transform(
    torch.fft.fftn, aten.fft_fftn,
    cases=[*_cases(2, 3, 2, **_SOME), case(Uncertain((2, 3, 2), complex=True)), case(Uncertain((2, 3, 2)), (4, 3))],
)  # fmt: skip
def fftn(input: Moments | ComplexMoments, s: Any = None, dim: Any = None, norm: str | None = None) -> ComplexMoments:
    return _to_complex(partial(torch.fft.fftn, s=s, dim=dim, norm=norm), input, s, dim, norm, False)


@transform(torch.fft.ifftn, aten.fft_ifftn, cases=_cases(2, 3, 2, complex=True, **_SOME))
def ifftn(input: Moments | ComplexMoments, s: Any = None, dim: Any = None, norm: str | None = None) -> ComplexMoments:
    return _to_complex(partial(torch.fft.ifftn, s=s, dim=dim, norm=norm), input, s, dim, norm, True)


@transform(torch.fft.rfftn, aten.fft_rfftn, complex=False, cases=_cases(2, 3, 4, **_SOME))
def rfftn(input: Moments, s: Any = None, dim: Any = None, norm: str | None = None) -> ComplexMoments:
    return _to_complex(partial(torch.fft.rfftn, s=s, dim=dim, norm=norm), input, s, dim, norm, False, True)


@transform(torch.fft.irfftn, aten.fft_irfftn, cases=_cases(2, 2, 3, complex=True, **_SOME))
def irfftn(input: Moments | ComplexMoments, s: Any = None, dim: Any = None, norm: str | None = None) -> Moments:
    return _to_real(partial(torch.fft.irfftn, s=s, dim=dim, norm=norm), input, s, dim, norm, True)


@transform(torch.fft.hfft2, aten.fft_hfft2, cases=_cases(2, 2, 3, complex=True, **_TWO))
def hfft2(input: Moments | ComplexMoments, s: Any = None, dim: Any = (-2, -1), norm: str | None = None) -> Moments:
    return _to_real(partial(torch.fft.hfft2, s=s, dim=dim, norm=norm), input, s, dim, norm, False)


@transform(torch.fft.hfftn, aten.fft_hfftn, cases=_cases(2, 2, 3, complex=True, **_SOME))
def hfftn(input: Moments | ComplexMoments, s: Any = None, dim: Any = None, norm: str | None = None) -> Moments:
    return _to_real(partial(torch.fft.hfftn, s=s, dim=dim, norm=norm), input, s, dim, norm, False)


@transform(torch.fft.ihfft2, aten.fft_ihfft2, complex=False, cases=_cases(2, 3, 4, **_TWO))
def ihfft2(input: Moments, s: Any = None, dim: Any = (-2, -1), norm: str | None = None) -> ComplexMoments:
    return _to_complex(partial(torch.fft.ihfft2, s=s, dim=dim, norm=norm), input, s, dim, norm, True, True)


@transform(torch.fft.ihfftn, aten.fft_ihfftn, complex=False, cases=_cases(2, 3, 4, **_SOME))
def ihfftn(input: Moments, s: Any = None, dim: Any = None, norm: str | None = None) -> ComplexMoments:
    return _to_complex(partial(torch.fft.ihfftn, s=s, dim=dim, norm=norm), input, s, dim, norm, True, True)


@shifted(
    torch.fft.fftshift, aten.fft_fftshift,
    cases=[case(Uncertain((3, 4))), case(Uncertain((3, 4)), 1), case(Uncertain((3, 4), complex=True), dim=(-1,))],
)  # fmt: skip
def fftshift(input: Moments, dim: Any = None) -> Moments:
    return both(torch.fft.fftshift, input, dim)


@shifted(
    torch.fft.ifftshift, aten.fft_ifftshift,
    cases=[case(Uncertain((3, 4))), case(Uncertain((3, 4)), 1), case(Uncertain((3, 4), complex=True), dim=(-1,))],
)  # fmt: skip
def ifftshift(input: Moments, dim: Any = None) -> Moments:
    return both(torch.fft.ifftshift, input, dim)
