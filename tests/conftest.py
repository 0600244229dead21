"""Tests run kernels in Triton's interpreter, on one thread, without a GPU: the same everywhere."""

import os

os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", MPLBACKEND="agg")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "book", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("book")
