"""The one call: a model in, an ADF network out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from adfify import call_signature, graph, tracing
from adfify.errors import ModelError
from adfify.graph import Plan
from adfify.moments import checked_variance
from adfify.network import ADFNetwork, refuse_not_finite
from adfify.nn import dropout as dropout_rules
from adfify.registry import RULES, Rules
from adfify.threads import one_at_a_time


@one_at_a_time
def adfify(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    noise_variance: float = 1e-3,
    min_variance: float = 0.0,
    rules: Rules = RULES,
    dropout: str = "off",
    share_weights: bool = False,
) -> ADFNetwork:
    """Rewrite a trained network so that it propagates a mean and a variance (assumed density filtering).

    Source: Gast & Roth, "Lightweight Probabilistic Deep Networks", CVPR 2018; Loquercio, Segu &
    Scaramuzza, "A General Framework for Uncertainty Estimation in Deep Learning", RA-L 2020.

    Args:
        model: any module that torch.fx, or else torch.export, can trace; it is left untouched. DataParallel,
            DistributedDataParallel and torch.compile wrappers are taken off.
        example_inputs: what the model would be called with, by position: one input, or a tuple of several. Needed if
            some inputs are integers (they are certain), optional, or lists, tuples, dictionaries or dataclasses of
            tensors, and where torch.export has to run the model and its configuration (timm's, torchvision's) does
            not say what on. Whatever is no tensor in it (None, a flag, a length) the network is made for.
        example_kwargs: likewise, by keyword.
        noise_variance: variance of every element of an input given as a plain tensor, in squared units
            of that tensor (of the *normalised* pixels, where the model takes those).
        min_variance: lower bound of the variance after every operation that computes one; with
            ``published.RULES`` it is added there, as the published code does. 0 changes nothing.
        rules: the table of rules; ``published.RULES`` for the published code's numerics.
        dropout: ``"off"``, ``"sampled"`` (Monte Carlo dropout: a new mask every pass) or ``"analytic"``
            (the variance of the dropout itself is added).
        share_weights: use the model's own parameters and buffers instead of a copy.

    Returns:
        A ``torch.fx.GraphModule`` with the model's ``state_dict`` keys, device, dtype and its modules' training
        flags (a forward of your own that reads ``self.training`` is traced as the flag is now). It takes
        what the model takes, tensors or Moments, and returns Moments in the structure the model returned.

        The variance of this one pass takes units as independent: a ranking, not a calibrated error bar. For that
        there is :meth:`ADFNetwork.joint`.

    Raises:
        UnsupportedOpsError: operations without a rule, all of them listed.
        ModelError: hooks, parametrizations, weights that are not finite, or a forward that can't be traced.
        ValueError: a negative or non-finite variance, or an unknown dropout policy.
    """
    checked_variance("noise_variance", noise_variance)
    checked_variance("min_variance", min_variance)
    plan = inspect(model, example_inputs, example_kwargs=example_kwargs, rules=rules, dropout=dropout)
    network = graph.apply(plan, noise_variance, min_variance, share_weights)
    refuse_not_finite(network, plan.model)
    return network


@one_at_a_time
def inspect(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    rules: Rules = RULES,
    dropout: str = "off",
) -> Plan:
    """What :func:`adfify` would do with a model: for every operation the rule, or why there is none.

    Arguments and errors are those of :func:`adfify`, but missing operations do not raise: see ``plan.missing``.
    """
    args = _checked_examples(example_inputs)
    kwargs = dict(example_kwargs or {})
    if not isinstance(rules, Rules):
        raise TypeError(f"rules={rules!r:.60}; give a table of rules, such as adfify.published.RULES.")
    if isinstance(model, ADFNetwork):
        raise ModelError(f"{type(model).__name__} is an ADF network already; convert the model it was made from.")
    in_force = _with_dropout(rules, dropout)
    plan = graph.plan(tracing.trace(model, args, kwargs, in_force), in_force)
    return _by_other_engine(plan, args, kwargs, in_force) if plan.missing else plan


def _checked_examples(example_inputs: Any) -> tuple[Any, ...] | None:
    if example_inputs is None:
        return None
    args = call_signature.positional(example_inputs)
    if not isinstance(example_inputs, (tuple, list)) and not call_signature.has_tensors(example_inputs):
        raise TypeError(f"example_inputs={example_inputs!r:.60}; give a tensor, or a tuple of what the model takes.")
    return args


def _by_other_engine(plan: Plan, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any], rules: Rules) -> Plan:
    """What torch.fx finds no rule for, a function of a library say, torch.export may take apart into what has one."""
    traced = tracing.exported(plan.traced.root, args, kwargs, rules) if plan.traced.engine == "torch.fx" else None
    other = graph.plan(traced, rules) if traced is not None else plan
    return plan if other.missing else other


def _with_dropout(rules: Rules, policy: str) -> Rules:
    if policy not in dropout_rules.POLICIES:
        raise ValueError(f"dropout={policy!r} is unknown; it is one of {', '.join(map(repr, dropout_rules.POLICIES))}.")
    overlay = dropout_rules.POLICIES[policy]
    return rules if overlay is None else overlay.over(rules)
