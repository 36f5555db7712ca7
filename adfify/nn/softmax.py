"""Softmax and its logarithm: not elementwise, and not exact."""

from __future__ import annotations

SOURCE = "see gaussian.softmax"
