"""Which line an error names where the user's code calls a function of torchvision's."""

from __future__ import annotations

import re

import pytest
import torch
from tiny import ByExport
from torch import Tensor, fx, nn
from torchvision import ops

import adfify
from adfify import locations
from adfify.errors import UnsupportedOpsError


class Boxes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ops.roi_align(x, [x[0, 0, :2, :4]], 2)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.align = ops.RoIAlign(2, 1.0, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.align(x, [x[0, 0, :2, :4]])


@pytest.mark.parametrize("by_export", [False, True], ids=["torch.fx", "torch.export"])
@pytest.mark.parametrize("build", [Boxes, Module])
def test_the_user_s_own_line_is_named(build: type[nn.Module], by_export: bool) -> None:
    line = build.forward.__code__.co_firstlineno + 1
    with pytest.raises(UnsupportedOpsError, match=rf"test_user_lines\.py:{line}\b"):
        adfify.adfify(ByExport(build()) if by_export else build(), example_inputs=(torch.randn(1, 1, 6, 6),))


def test_a_module_of_torchvision_s_that_is_the_model_is_named_by_its_own_line() -> None:
    tracer = fx.Tracer()
    tracer.record_stack_traces = True
    graph = tracer.trace(ops.FrozenBatchNorm2d(3))
    lines = [locations.source_line(node) for node in graph.nodes if node.op == "call_function"]
    assert lines
    assert all(re.search(r"torchvision/ops/misc\.py:\d+$", line) for line in lines)
