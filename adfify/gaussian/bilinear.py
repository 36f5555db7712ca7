"""Sums of products of elements of independent tensors: matrix products, and everything that einsum can say. Exact."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adfify.gaussian.normal import Pair

Product = Callable[[Tensor, Tensor], Tensor]


def bilinear(op: Product, mean_a: Tensor, variance_a: Tensor | None, mean_b: Tensor, variance_b: Tensor | None) -> Pair:
    """op(a, b), a and b independent, at least one with a variance; an output is a sum of a_i b_i, each i once.

    Every term has the moments of a product (Goodman, JASA 55, 1960, equation 2), and terms of different elements are
    uncorrelated: Var = op(v_a, v_b + m_b^2) + op(m_a^2, v_b). No term is negative, so nothing cancels.
    """
    mean = op(mean_a, mean_b)
    mean_a, mean_b = widened(mean_a), widened(mean_b)
    terms = []
    if variance_a is not None:
        power_b = mean_b.square() if variance_b is None else torch.addcmul(widened(variance_b), mean_b, mean_b)
        terms.append(op(widened(variance_a), power_b))
    if variance_b is not None:
        terms.append(op(mean_a.square(), widened(variance_b)))
    return mean, sum(terms[1:], terms[0]).to(mean.dtype)


def widened(x: Tensor) -> Tensor:
    """float16 and bfloat16 in float32: the square of a mean overflows in the one and rounds away in the other."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# Note [The variance of an einsum]
#   y_o = sum over the contracted labels of a product of elements, one of each factor. Let every factor be m + d. The
#   parts of y with d from the factors in S, and m from the others, are uncorrelated for different S, and
#     Var[y_S] = sum over the labels of S of prod_S v * (sum over the other labels of prod_{not S} m)^2,
#   which is exact: two products covary only where all their d's are the same elements. (einsum(v + m^2) - einsum(m^2)
#   is not the variance where a label is contracted that some factor lacks: in "ij,jk,kl->il" one a_ij is in many
#   products.) Factors not in S that share no label to be summed are squared one by one, so that no outer product of
#   them is made.


def einsum(equation: str, means: Sequence[Tensor], variances: Sequence[Tensor | None]) -> Pair:
    """``torch.einsum`` of independent factors, at least one with a variance: see Note [The variance of an einsum]."""
    mean = torch.einsum(equation, *means)
    labels, out, means, variances = _parsed(equation, means, variances)
    wide = [widened(m) for m in means]
    terms = []
    uncertain = [k for k, v in enumerate(variances) if v is not None]
    for chosen in itertools.chain.from_iterable(
        itertools.combinations(uncertain, n + 1) for n in range(len(uncertain))
    ):
        kept = set(out).union(*[labels[k] for k in chosen])
        names, factors = [labels[k] for k in chosen], [widened(v) for k in chosen if (v := variances[k]) is not None]
        for group in _groups([k for k in range(len(wide)) if k not in chosen], labels, kept):
            name = "".join(dict.fromkeys(x for k in group for x in labels[k] if x in kept))
            names.append(name)
            factors.append(_einsum([labels[k] for k in group], name, [wide[k] for k in group]).square())
        terms.append(_einsum(names, out, factors))
    return mean, sum(terms[1:], terms[0]).to(mean.dtype)


_REST = "@"  # one character for "..."


def _einsum(labels: Sequence[str], out: str, factors: Sequence[Tensor]) -> Tensor:
    return torch.einsum(f"{','.join(labels)}->{out}".replace(_REST, "..."), *factors)


def _parsed(
    equation: str, means: Sequence[Tensor], variances: Sequence[Tensor | None]
) -> tuple[list[str], str, list[Tensor], list[Tensor | None]]:
    """Labels of every factor and of the output; a factor's label of size 1, which broadcasts, is taken off it."""
    left, arrow, out = equation.replace(" ", "").replace("...", _REST).partition("->")
    labels = left.split(",")
    if not arrow:
        out = _REST * (_REST in left) + "".join(sorted(x for x in set(left) - {_REST, ","} if left.count(x) == 1))
    sizes = [_sizes(names, m) for names, m in zip(labels, means, strict=True)]
    largest = {name: max(s.get(name, 1) for s in sizes) for s in sizes for name in s}
    for k, names in enumerate(labels):
        broadcast = [name for name, size in sizes[k].items() if size == 1 != largest[name]]
        labels[k] = "".join(name for name in names if name not in broadcast)
        narrow = [m if not broadcast else _einsum([names], labels[k], [m]) for m in (means[k],)]
        means = [*means[:k], *narrow, *means[k + 1 :]]
        spread = variances[k]
        if broadcast and spread is not None:
            variances = [*variances[:k], _einsum([names], labels[k], [spread]), *variances[k + 1 :]]
    return labels, out, list(means), list(variances)


def _sizes(names: str, x: Tensor) -> dict[str, int]:
    """The size of every named dimension, those of "..." left out."""
    before, _, after = names.partition(_REST)
    named = dict(zip(before, x.shape, strict=False))
    named.update(zip(reversed(after), reversed(x.shape), strict=False))
    return named


def _groups(factors: Sequence[int], labels: Sequence[str], kept: set[str]) -> list[list[int]]:
    """The factors, those together that share a label which is not kept."""
    groups: list[list[int]] = []
    for k in factors:
        summed = set(labels[k]) - kept
        joined = [g for g in groups if any(summed & set(labels[j]) for j in g)]
        groups = [g for g in groups if g not in joined] + [[*itertools.chain(*joined), k]]
    return groups
