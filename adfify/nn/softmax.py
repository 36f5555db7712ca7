"""Softmax and its logarithm: not elementwise, and not exact."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adfify import gaussian
from adfify.moments import Moments
from adfify.nn.module import ADFModule
from adfify.registry import Uncertain, case, register

SOURCE = "see gaussian.softmax"
