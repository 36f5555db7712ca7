"""Turn a trained PyTorch network into one that carries a mean and a variance through every operation."""

from adfify import models, nn
from adfify import published as published
from adfify.checkpoint import load, save
from adfify.conversion import adfify, inspect
from adfify.errors import UnsupportedOpsError
from adfify.moments import JointMoments, Moments
from adfify.registry import register, supported
from adfify.sampling import monte_carlo, predict

__version__ = "0.1.0"

__all__ = [
    "JointMoments",
    "Moments",
    "UnsupportedOpsError",
    "adfify",
    "inspect",
    "load",
    "models",
    "monte_carlo",
    "nn",
    "predict",
    "register",
    "save",
    "supported",
]
