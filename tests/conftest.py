"""Shared by all tests: one thread a worker, since pytest-xdist already uses every core."""

import torch

torch.set_num_threads(1)
