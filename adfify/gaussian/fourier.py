"""Variances of discrete Fourier transforms of independent elements: exact, by transforms of the variances themselves.

Note [The variance of a Fourier transform]
    Every output is a sum over x_j (cos t_jk + i sin t_jk), and variances take the squares of the weights:
    cos^2 t = (1 + cos 2t) / 2, sin^2 t = (1 - cos 2t) / 2. The sum of v_j cos 2 t_jk is the transform of v at twice the
    frequency, 2k modulo n, so that a transform of the variances is all that is needed (Brillinger, Time Series, 1981,
    section 4.3, has it for a v that is the same everywhere). It is computed in double precision, as a small variance is
    a difference of two large ones, and is 0 to the last bit where it should be: at 2k = 0 modulo n both are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Sizes = Sequence[int]


def spectrum(
    real: Tensor, imag: Tensor | None, sizes: Sizes, dims: Sequence[int], half: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Variances of the real and imaginary parts of a transform over ``dims``, see Note [The variance of ...].

    Args:
        real: of the real parts.
        imag: of the imaginary parts, None where there are none.
        sizes: lengths of the transform along ``dims``: longer inputs are cut, shorter ones padded with zeros.
        dims: along which.
        half: whether only the first half of the last of them is wanted (rfft).
        scale: what the plain sum is multiplied by.
    """
    total, twice = _at_twice(real, sizes, dims, half)
    if imag is None:
        return _half_sums(total + twice, scale, real), _half_sums(total - twice, scale, real)
    other, other_twice = _at_twice(imag, sizes, dims, half)
    difference, both = twice - other_twice, total + other
    return _half_sums(both + difference, scale, real), _half_sums(both - difference, scale, real)


def repeated(variance: Tensor, places: Tensor, window: Tensor, half: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Variances of a transform over the last dimension in which an element stands at several places.

    Args:
        variance: of the elements, [..., n], each as often as it is there.
        places: which element each is, [n].
        window: what each place is multiplied by, [n].
        half: whether only the first half of the result is wanted.
        scale: what the plain sum is multiplied by.
    """
    n = len(places)
    same = (places.unsqueeze(0) == places.unsqueeze(1)).to(torch.float64)
    first = same.argmax(1) == torch.arange(n, device=places.device)
    angle = torch.arange(n // 2 + 1 if half else n, device=places.device).unsqueeze(1).to(torch.float64)
    angle = angle * torch.arange(n, device=places.device) * (2 * math.pi / n)
    once = variance.double() * (first * scale**2)

    def of(waves: Tensor) -> Tensor:
        """Weights of the same element are added before they are squared."""
        return (once @ ((waves * window.double()) @ same).square().mT).to(variance.dtype)

    return of(angle.cos()), of(angle.sin())


def signal(real: Tensor, imag: Tensor, sizes: Sizes, dims: Sequence[int], scale: float) -> Tensor:
    """Variances of the real transform over ``dims`` of the first half of a Hermitian spectrum (irfft, hfft).

    Each element beside the first, and the middle one of an even length, of the last dimension stands for two.

    Args:
        real: of the real parts.
        imag: of the imaginary parts.
        sizes: lengths of the *output* along ``dims``.
        dims: along which.
        scale: what the plain sum is multiplied by.
    """
    length, last = sizes[-1], dims[-1]
    there = length // 2 + 1
    weight = torch.full((there,), 4.0, dtype=torch.float64, device=real.device)
    weight[0] = 1.0
    if length % 2 == 0:
        weight[-1] = 1.0
    halves = [*sizes[:-1], there]
    a, b = (_fitted(x.double(), halves, dims).movedim(last, -1) * weight for x in (real, imag))
    a, b = a.movedim(-1, last), b.movedim(-1, last)
    _, twice = _at_twice(a - b, sizes, dims, False)
    both = (a + b).sum(tuple(dims), keepdim=True)
    return _half_sums(both + twice, scale, real)


def _at_twice(x: Tensor, sizes: Sizes, dims: Sequence[int], half: bool) -> tuple[Tensor, Tensor]:
    """The real part of the transform, at frequency 0, and at twice each frequency."""
    x = torch.fft.fftn(x.double(), tuple(sizes), tuple(dims)).real
    total = x
    for dim in dims:
        total = total.narrow(dim, 0, 1)
    for position, (size, dim) in enumerate(zip(sizes, dims, strict=True)):
        count = size // 2 + 1 if half and position == len(dims) - 1 else size
        x = x.index_select(dim, 2 * torch.arange(count, device=x.device) % size)
    return total, x


def _half_sums(x: Tensor, scale: float, like: Tensor) -> Tensor:
    return (x * (0.5 * scale**2)).clamp(min=0).to(like.dtype)


def _fitted(x: Tensor, sizes: Sizes, dims: Sequence[int]) -> Tensor:
    """Cut, or padded with zeros at the end, to these sizes."""
    for size, dim in zip(sizes, dims, strict=True):
        x = x.narrow(dim, 0, min(size, x.shape[dim]))
        if x.shape[dim] < size:
            shape = [*x.shape]
            shape[dim] = size - x.shape[dim]
            x = torch.cat([x, x.new_zeros(shape)], dim)
    return x
