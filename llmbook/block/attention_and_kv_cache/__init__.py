"""Attention and the KV cache."""

# First of all: it chooses Triton's interpreter, and PyTorch's FLOP counter would import Triton without it.
from llmbook.kit import kernels as _kernels  # noqa: F401
