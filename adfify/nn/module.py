"""The base of every ADF module: what is common to calling and converting one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules import utils

from adfify.errors import InputError
from adfify.moments import Moments, on_each


class ADFModule(nn.Module):
    """Mixed in before a torch.nn class, it gives that class' ADF counterpart.

    The counterpart has the original's constructor, repr and ``state_dict`` keys. It is called with
    Moments, or with two tensors, ``relu(mean, variance)``; its result unpacks into mean and variance,
    so that ``self.relu(*self.bn(*self.conv(*x)))`` runs as in the published networks.

    Attributes:
        keep_variance_fn: applied to the resulting variance where set, as in the published code:
            ``lambda variance: variance + 1e-3``. Also a keyword of the constructor.
    """

    keep_variance_fn: Callable[[Tensor], Tensor] | None = None
    many_inputs: ClassVar[bool] = False
    """Whether forward takes several tensors of its own, so that two tensors are not a mean and a variance."""
    converts_children: ClassVar[bool] = False
    """Whether forward calls the children, which then have to be converted too, each by its own rule."""

    def __init__(self, *args: Any, keep_variance_fn: Callable[[Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if keep_variance_fn is not None:
            self.keep_variance_fn = keep_variance_fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.many_inputs and (args or not kwargs):
            args = _with_moments_first(self, args)
        result = super().__call__(*args, **kwargs)
        if self.keep_variance_fn is not None:
            result = on_each(_with_variance, result, self.keep_variance_fn)
        return result


def _with_variance(x: Moments, change: Callable[[Tensor], Tensor]) -> Moments:
    return Moments(x.mean, change(x.variance))


def counterpart(source: nn.Module, target_class: type[nn.Module]) -> nn.Module:
    """An instance of ``target_class`` with every attribute of ``source``; tables are its own, tensors are shared."""
    target = target_class.__new__(target_class)
    for name, value in source.__dict__.items():
        target.__dict__[name] = copy.copy(value) if isinstance(value, (dict, set, list)) else value
    return target


def _with_moments_first(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    match args:
        case (Moments(), *_):
            return args
        case (Tensor() as mean, Tensor() as variance, *rest) if mean.shape == variance.shape:
            return (Moments(mean, variance), *rest)
        case (Tensor() as mean, Tensor() as variance, *_):
            given = f"a mean of shape {tuple(mean.shape)} and a variance of shape {tuple(variance.shape)}"
        case (Tensor() as mean,):
            given = f"one Tensor of shape {tuple(mean.shape)}, with no variance"
        case _:
            given = ", ".join(type(value).__name__ for value in args) or "nothing"
    raise InputError(
        f"{type(module).__name__} got {given}; give Moments(mean, variance), or mean and variance as two tensors "
        "of the same shape."
    )


def per_dimension(value: Any, dimensions: int) -> tuple[Any, ...]:
    """A kernel size, stride, padding or dilation as torch takes them: one number for all dimensions, or one each."""
    sizes: tuple[Any, ...] = tuple(utils._ntuple(dimensions)(value))  # type: ignore[no-untyped-call]
    return sizes
