"""Threads that convert beside threads that run networks: each gets what it would get alone, nothing is left changed."""

from __future__ import annotations

import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from adfify import adfify


class Branches(nn.Module):
    """Blocks in several files' worth of calls, so that a trace takes a while."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)
        )
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x) * self.scale * math.sqrt(0.5)
        return self.head(x.mean((2, 3)))


class NeedsExport(Branches):
    """torch.fx can't follow a branch that goes by a size of the data."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if len([*x]) > 0 else -x)


@pytest.fixture(autouse=True)
def nothing_is_left_changed():
    before = nn.Module.__call__, nn.Module.__getattr__, math.sqrt, torch.relu, sys.stderr
    yield
    assert (nn.Module.__call__, nn.Module.__getattr__, math.sqrt, torch.relu, sys.stderr) == before


def together(*works, times: int):
    """Everything at once, in a thread each, many times; the results of each."""
    barrier = threading.Barrier(len(works))

    def repeated(work):
        barrier.wait()
        return [work() for _ in range(times)]

    with ThreadPoolExecutor(len(works)) as pool:
        return [task.result() for task in [pool.submit(repeated, work) for work in works]]


@pytest.mark.parametrize(("kind", "times"), [(Branches, 3), (NeedsExport, 1)])
def test_eight_convert_and_eight_run(kind, times):
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    converted = [kind(seed).eval() for seed in range(8)]
    others = [Branches(seed + 100).eval() for seed in range(6)]
    networks = [adfify(Branches(seed + 200).eval()) for seed in range(2)]
    alone = [adfify(model, x)(x) for model in converted]
    running = [*(lambda m=m: m(x) for m in others), *(lambda n=n: n(x).variance for n in networks)]
    expected = [work() for work in running]
    with torch.no_grad():
        converting = [lambda m=m: adfify(m, x)(x) for m in converted]
        results = together(*converting, *running, times=times)
    for got, want in zip(results[:8], alone, strict=True):
        for moments in got:
            assert torch.equal(moments.mean, want.mean)
            assert torch.equal(moments.variance, want.variance)
    for got, want in zip(results[8:], expected, strict=True):
        assert all(torch.equal(tensor, want) for tensor in got)


def test_a_model_runs_while_it_is_converted():
    model, x = Branches(0).eval(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        expected = model(x)
        _, got = together(lambda: adfify(model), lambda: [model(x) for _ in range(20)], times=5)
    assert all(torch.equal(tensor, expected) for part in got for tensor in part)


def test_a_conversion_that_fails_leaves_the_others_alone():
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort()[1].float() if x.sum() > 0 else torch.linalg.svd(x)[0]

    model = Branches(0).eval()

    def failing() -> bool:
        with pytest.raises(Exception, match="Fails"):
            adfify(Fails(), torch.randn(3, 3))
        return True

    results = together(failing, failing, lambda: adfify(model), lambda: adfify(model), times=3)
    assert all(results[0])
    assert len(results[3]) == 3
