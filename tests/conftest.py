"""Settings that all tests share."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# One thread a process: the tiny models of the tests gain nothing from two, and threads that wait for a busy core lose much.
torch.set_num_threads(1)
