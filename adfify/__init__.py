"""Turn a trained PyTorch network into one that carries a mean and a variance through every operation."""

from adfify import nn
from adfify.conversion import adfify, inspect
from adfify.errors import UnsupportedOpsError
from adfify.moments import JointMoments, Moments
from adfify.registry import register, supported

__all__ = ["JointMoments", "Moments", "UnsupportedOpsError", "adfify", "inspect", "nn", "register", "supported"]
