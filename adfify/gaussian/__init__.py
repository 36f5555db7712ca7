"""Closed-form moments of functions of Gaussian variables: tensors in, tensors out.

Every function takes ``mean`` and ``variance`` of independent Gaussian inputs and returns the mean and the
variance of the output (of any shape that broadcasts). Nothing here knows about layers or graphs. Notation: s
= sqrt(variance), z = mean / s, and phi, Phi the standard normal density and distribution function.

References
    A&S     Abramowitz & Stegun, Handbook of Mathematical Functions, 1964.
    Gautschi, Recursive computation of the repeated integrals of the error function, Math. Comp. 15, 1961.
    Clark, The greatest of a finite set of random variables, Operations Research 9, 1961.
    Stein, Estimation of the mean of a multivariate normal distribution, Ann. Stat. 9, 1981.
    Frey & Hinton, Variational learning in nonlinear Gaussian belief networks, Neural Computation 11, 1999.
"""

from adfify.gaussian.attention import attend, scores
from adfify.gaussian.bilinear import bilinear, einsum, widened
from adfify.gaussian.categorical import log_softmax, softmax
from adfify.gaussian.normal import normal_cdf, normal_pdf
from adfify.gaussian.piecewise import absolute, clamp, clamp_between, leaky_relu, maximum, relu
from adfify.gaussian.polynomial import exp, product, square
from adfify.gaussian.quadrature import expect
from adfify.gaussian.smooth import (
    celu,
    elu,
    gelu,
    hardsigmoid,
    hardswish,
    logsigmoid,
    mish,
    selu,
    sigmoid,
    silu,
    softplus,
    tanh,
)

__all__ = [
    "absolute",
    "attend",
    "bilinear",
    "celu",
    "clamp",
    "clamp_between",
    "einsum",
    "elu",
    "exp",
    "expect",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "leaky_relu",
    "log_softmax",
    "logsigmoid",
    "maximum",
    "mish",
    "normal_cdf",
    "normal_pdf",
    "product",
    "relu",
    "scores",
    "selu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "square",
    "tanh",
    "widened",
]
