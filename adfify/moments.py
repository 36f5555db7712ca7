"""The values that flow through an ADF network: a mean and a variance for every element."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adfify.errors import InputError

# Note [Moments is a frozen dataclass]
# A NamedTuple would concatenate on `+`, which is how the published Bottleneck came to add tuples, and
# torch.export.save refuses one that it does not know. A frozen dataclass has no arithmetic by accident,
# and registered as a pytree it passes through torch.export, torch.compile and torch.func.

# Note [Complex values]
# A complex random element is two real ones, its real and its imaginary part, each with a variance of its own: the
# square of a complex factor times a complex variance would be nonsense, and look like numbers. So they are a class of
# their own, which has no variance: a rule that does not know it fails, and Moments refuse a complex mean. That a rule
# does know it, is `complex=True` in the registry, and a plan says at conversion which rule does not.


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance of every element of a random tensor, elements taken as independent.

    Out of a network called directly, the variance has the bias of that assumption: too small on deep networks.

    Attributes:
        mean: expected values, any shape, floating point.
        variance: variances (squared units of ``mean``), the same shape as ``mean``; float32 beside a mean of float16
            or bfloat16, in which they would underflow, else of the same dtype.

    It unpacks: ``mean, variance = moments``. It has no arithmetic on purpose: operations on it are
    the rules of :mod:`adfify.nn`.
    """

    mean: Tensor
    variance: Tensor

    def __post_init__(self) -> None:
        if isinstance(self.mean, Tensor) and self.mean.is_complex():
            raise InputError(
                f"Moments with a mean of dtype {str(self.mean.dtype).removeprefix('torch.')}: a complex value has two "
                "variances, of its real and its imaginary part. Give torch.view_as_real(x), or compute with the parts."
            )

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.mean, self.variance))

    @property
    def std(self) -> Tensor:
        """Standard deviation, ``sqrt(variance)``, in the units of the mean."""
        return self.variance.sqrt()

    @property
    def shape(self) -> torch.Size:
        """The shape of the mean, and of the variance."""
        return self.mean.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the mean."""
        return self.mean.dtype

    @property
    def device(self) -> torch.device:
        """The device of the mean."""
        return self.mean.device

    def to(self, *args: Any, **kwargs: Any) -> Moments:
        """Both tensors moved or cast, with the arguments of :meth:`torch.Tensor.to`; a variance is float32 at least."""
        mean = self.mean.to(*args, **kwargs)
        kept = {key: value for key, value in kwargs.items() if key not in ("dtype", "device", "other")}
        return Moments(mean, self.variance.to(mean.device, variance_dtype(mean.dtype), **kept))

    def detach(self) -> Moments:
        """Both tensors cut from the autograd graph."""
        return Moments(self.mean.detach(), self.variance.detach())


@dataclasses.dataclass(frozen=True, eq=False)
class ComplexMoments:
    """Moments of the real and of the imaginary part of every element of a complex random tensor, all independent.

    Attributes:
        real: of the real parts, any shape.
        imag: of the imaginary parts, the same shape and dtype.
    """

    real: Moments
    imag: Moments

    @property
    def mean(self) -> Tensor:
        """Expected values, complex."""
        return torch.complex(self.real.mean, self.imag.mean)

    @property
    def shape(self) -> torch.Size:
        """The shape of the complex tensor."""
        return self.real.shape

    @property
    def dtype(self) -> torch.dtype:
        """The complex dtype."""
        return self.real.dtype.to_complex()

    @property
    def device(self) -> torch.device:
        """The device of both parts."""
        return self.real.device

    def detach(self) -> ComplexMoments:
        """Both parts cut from the autograd graph."""
        return ComplexMoments(self.real.detach(), self.imag.detach())


@dataclasses.dataclass(frozen=True, eq=False)
class Attribution:
    """Where the variance of outputs comes from: the parts sum to it.

    Attributes:
        inputs: by an input's name ``[N, k, ...]``, in the shape of the input: what the noise of each of its elements
            adds to the variance of each output. Single parts may be below 0: two elements may cancel each other.
        masks: by a dropout's name ``[N, k, ...]``, likewise, for the masks of ``dropout="analytic"``.
        layers: by an operation's name ``[N, k]``: what the residual variance of its non-linearity adds, where the
            variance was split so (``samples=0``); then ``inputs`` holds what passes through all of them linearly.
    """

    inputs: dict[str, Tensor]
    masks: dict[str, Tensor]
    layers: dict[str, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class JointMoments:
    """Mean and covariance of some outputs of a network, correlations of its units included.

    N inputs, k of the network's outputs.

    Attributes:
        mean: ``[N, k]``.
        covariance: ``[N, k, k]``, symmetric, positive semi-definite, squared units of ``mean``. None where a sketch
            of very many outputs was asked for: name a few outputs for their covariance.
        indices: ``[N, k]``, which outputs these are, of the output flattened.
        variance: ``[N, k]``, the diagonal of the covariance.
        method: how they were found, ``"adjoint"`` or ``"sketch"``.
        samples: ``[N]``, at how many noisy inputs gradients were taken (adjoint), or that were drawn (sketch).
        draws: ``[N]``, how many noisy values the means are averages of.
        mean_error: ``[N, k]``, standard error of ``mean``, where it can be told.
        std_error: ``[N, k]``, standard error of ``std``, likewise.
        model_variance: ``[N, k]``, the part of the variance that random masks of dropout add; the rest is the data's.
        model_covariance: ``[N, k, k]``, likewise of the covariance.
        attribution: where the variance comes from, if asked for.
        shape: of one output in the network, which all k are elements of.
        batch_axis: where the network's output has the batch; None where all that was given is one example.
    """

    mean: Tensor
    covariance: Tensor | None
    indices: Tensor
    variance: Tensor
    method: str
    samples: Tensor
    draws: Tensor
    mean_error: Tensor | None = None
    std_error: Tensor | None = None
    model_variance: Tensor | None = None
    model_covariance: Tensor | None = None
    attribution: Attribution | None = None
    shape: tuple[int, ...] = ()
    batch_axis: int | None = 0

    @property
    def std(self) -> Tensor:
        """``[N, k]``, standard deviations in the units of the mean."""
        return self.variance.sqrt()

    @property
    def correlation(self) -> Tensor | None:
        """``[N, k, k]``, the covariance divided by both standard deviations, 0 beside an output that is certain."""
        if self.covariance is None:
            return None
        scale = torch.where(self.variance > 0, self.variance, 1.0).rsqrt()
        return self.covariance * scale.unsqueeze(-1) * scale.unsqueeze(-2)

    @property
    def data_variance(self) -> Tensor:
        """``[N, k]``, what the noise of the inputs adds; the whole where no dropout is random."""
        return self.variance if self.model_variance is None else self.variance - self.model_variance

    @property
    def data_covariance(self) -> Tensor | None:
        """``[N, k, k]``, what the noise of the inputs adds; the whole where no dropout is random."""
        if self.covariance is None or self.model_covariance is None:
            return self.covariance
        return self.covariance - self.model_covariance

    def as_output(self, values: Tensor) -> Tensor:
        """``[N, k]`` of all outputs (``outputs="all"``) in the shape of the network's output: a map for a segmenter."""
        if self.batch_axis is None:
            return values.reshape(self.shape)
        return values.reshape(len(values), *self.shape).movedim(0, self.batch_axis)


torch.export.register_dataclass(Moments, serialized_type_name="adfify.Moments")
torch.export.register_dataclass(ComplexMoments, serialized_type_name="adfify.ComplexMoments")
torch.export.register_dataclass(Attribution, serialized_type_name="adfify.Attribution")
torch.export.register_dataclass(JointMoments, serialized_type_name="adfify.JointMoments")


def as_moments(value: Any, noise_variance: float, name: str = "input") -> Any:
    """What enters the network: a tensor with the same variance everywhere, or the user's own Moments.

    Args:
        value: a floating-point tensor, or Moments whose variance is broadcastable to its mean.
        noise_variance: variance of every element of a plain tensor, in squared units of the tensor.
        name: how the network calls this input, for the errors.

    Raises:
        InputError: integer tensor, wrong type, NaN, an infinity, negative variance, or a variance whose shape does
            not broadcast to the mean's.
    """
    if isinstance(value, Moments):
        return _checked(value, name)
    if not isinstance(value, Tensor):
        raise InputError(
            f"input '{name}' is {_describe(value)}; give a floating-point Tensor, or Moments(mean, variance)."
        )
    if value.is_nested or value.layout is not torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise InputError(f"input '{name}' is a {kind} tensor; give a dense one (to_dense(), to_padded_tensor(0.0)).")
    if not value.is_floating_point():
        raise InputError(
            f"input '{name}' is {_describe(value)}, and was taken as uncertain when the model was converted. "
            "Give a floating-point tensor, or convert with example_inputs=(...), so that integer inputs "
            "are known to be certain."
        )
    _refuse_not_finite(value, name, "values")
    return Moments(value, torch.full_like(value, noise_variance, dtype=variance_dtype(value.dtype)))


def lift(x: Moments | Tensor) -> Moments:
    """A certain tensor as a random one of variance 0.

    Raises:
        InputError: neither a tensor nor Moments.
    """
    if not isinstance(x, (Moments, Tensor)):
        raise InputError(f"{_describe(x)} was given where Moments are needed; a tensor can be taken with variance 0.")
    return x if isinstance(x, Moments) else Moments(x, torch.zeros_like(x, dtype=variance_dtype(x.dtype)))


HALF = (torch.float16, torch.bfloat16)


def variance_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the variance beside a mean of this dtype: see Note [Variances are held in float32]."""
    return torch.float32 if dtype in HALF else dtype


def held_in(variance: Tensor, dtype: torch.dtype) -> Tensor:
    """A variance, to go beside a mean of this dtype."""
    return variance.to(variance_dtype(dtype))


def mean_of(x: Any) -> Any:
    """What a certain operation is given, to read its dtype, shape or device; a tensor is itself."""
    return x.mean if isinstance(x, Moments) else x


def checked_variance(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` can be one variance for all elements."""
    if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value!r:.60}; it is one finite number >= 0, or give Moments(x, variance) as input.")


def is_moments(value: Any) -> bool:
    """Whether it is Moments: where a walk through a structure of values (torch's pytree) has to stop."""
    return isinstance(value, Moments)


def on_each(change: Callable[..., Moments], value: Any, *args: Any) -> Any:
    """``change`` applied to every Moments of what an operation returned: one, or a structure of several."""
    if isinstance(value, Moments):
        return change(value, *args)
    return pytree.tree_map_only(Moments, lambda x: change(x, *args), value, is_leaf=is_moments)


def floor(value: Any, min_variance: float) -> Any:
    """The default meaning of ``min_variance``: a lower bound, which changes nothing above it."""
    return on_each(lambda x: Moments(x.mean, x.variance.clamp(min=min_variance)), value)


def _checked(value: Moments, name: str) -> Moments:
    mean, variance = value
    for part, tensor in (("mean", mean), ("variance", variance)):
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            raise InputError(
                f"the {part} of input '{name}' is {_describe(tensor)}; it must be a floating-point Tensor."
            )
    if mean.shape != variance.shape:
        try:
            variance = variance.expand_as(mean)
        except RuntimeError:
            raise InputError(
                f"input '{name}' has a mean of shape {tuple(mean.shape)} and a variance of shape "
                f"{tuple(variance.shape)}; the variance must be broadcastable to the mean."
            ) from None
    _refuse_not_finite(mean, name, "mean values")
    _refuse_not_finite(variance, name, "variances")
    if concrete(variance) and bool((variance < 0).any()):
        raise InputError(f"input '{name}' has a negative variance: {variance.min().item():.6g}; variances are >= 0.")
    return Moments(mean, held_in(variance, mean.dtype))


def _refuse_not_finite(tensor: Tensor, name: str, what: str) -> None:
    if not concrete(tensor) or bool(tensor.isfinite().all()):
        return
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    found = " and ".join(f"{count} {kind}" for count, kind in ((nan, "NaN"), (infinite, "infinite")) if count)
    raise InputError(f"input '{name}' has {found} among its {what} (shape {tuple(tensor.shape)}).")


def concrete(tensor: Tensor) -> bool:
    """Whether a look at the values is possible: not under torch.compile, torch.export or torch.func."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a Tensor of dtype {str(value.dtype).removeprefix('torch.')} and shape {tuple(value.shape)}"
    return f"{value!r:.80} of type {type(value).__name__}"
