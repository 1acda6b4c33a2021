"""What all tests share."""

from __future__ import annotations

import torch

# The models of the tests are too small to share among threads, and sums in one thread are the same on every machine.
torch.set_num_threads(1)
