"""TITLE: the mechanism."""

import torch


def running_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of values[: i + 1] for every i, in one pass.

    Args:
        values: [n], float. Returns the same shape.

    Raises:
        ValueError: values is not a vector.
    """
    if values.dim() != 1:
        raise ValueError(f"values must be a vector [n], not {list(values.shape)}")
    return values.cumsum(0) / torch.arange(1, len(values) + 1, dtype=values.dtype)
