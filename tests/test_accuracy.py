"""docs/accuracy.md is what benchmarks/accuracy.py measured."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from adfify import adfify

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("accuracy_benchmark", ROOT / "benchmarks" / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own module
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_records(benchmark):
    page = benchmark.PAGE.read_text()
    for begin, render, end in (
        (benchmark.BEGIN, benchmark.tables, benchmark.END),
        (benchmark.BEGIN_SUMMARY, benchmark.summary, benchmark.END_SUMMARY),
    ):
        shown = page.partition(begin)[2].partition(end)[0]
        assert shown.strip() == render(benchmark.read()).strip(), "stale: run python benchmarks/accuracy.py --render"


def test_every_method_was_measured_on_every_network_at_every_level(benchmark):
    there = {(r["network"], r["noise_variance"], r["method"]) for r in benchmark.read()}
    wanted = {(n, level, m) for n in benchmark.NETWORKS for level in benchmark.LEVELS for m in benchmark.METHODS}
    assert there == wanted


def test_every_method_runs_and_is_held_against_the_draws(benchmark):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 6)).eval(), torch.randn(1, 1, 4, 4)
    weight = model[1].weight.detach()
    top = torch.arange(benchmark.TOP)
    drawn = model(x + 0.1 * torch.randn(4000, 1, 4, 4)).detach()[:, top].double()
    for method, adf in benchmark.forms(model, x).items():
        seen = benchmark.against(benchmark.METHODS[method], model, adf, x, 0.01, top, drawn, 0)
        assert seen["std_ratio"].shape == (5,)
        few = "Monte Carlo" in method or "sketch" in method
        if not ("published" in method or (few and "controlled" not in method)):  # a linear network: all are right
            assert (seen["std_off"] <= 0.05).all(), method
            assert (seen["mean_off"] <= 0.1).all(), method
    exact = benchmark.linearisation(model, adfify(model), benchmark.Moments(x, torch.full_like(x, 0.01)), top, 0)
    torch.testing.assert_close(exact.covariance, 0.01 * (weight @ weight.T)[:5, :5])
