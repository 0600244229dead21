"""Regression by classification: a number as a distribution over bins, and back."""

import torch

Tensor = torch.Tensor


def centres(edges: Tensor) -> Tensor:
    """The middle of every bin. edges: [K + 1], increasing. Returns [K]."""
    return (edges[1:] + edges[:-1]) / 2


def bin_of(values: Tensor, edges: Tensor) -> Tensor:
    """The bin in which each value lies; beyond the ends, the end bin.

    Args:
        values: [...], finite.
        edges: [K + 1], strictly increasing. A value on an inner edge
            belongs to the bin on its right.

    Returns: [...], ids 0 … K−1.

    Raises:
        ValueError: fewer than two edges, edges that do not increase, or a
            value that is not finite.
    """
    if edges.ndim != 1 or len(edges) < 2 or not (edges.diff() > 0).all():
        raise ValueError("edges must be a vector of two or more, increasing")
    if not values.isfinite().all():
        raise ValueError("a value that is NaN or infinite lies in no bin")
    return torch.bucketize(values, edges[1:-1].contiguous(), right=True)


def hl_gauss(values: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """A Gaussian around each value, cut into bins: the target of HL-Gauss.

    Args:
        values: [...]. edges: [K + 1], increasing.
        sigma: width of the Gaussian, > 0, in the units of the values.

    Returns: [..., K], rows that sum to 1 (what falls outside is rescaled).

    Raises:
        ValueError: sigma is not positive, or a value is outside the edges.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, not {sigma:g}")
    if ((values < edges[0]) | (values > edges[-1])).any():
        raise ValueError(
            f"values must lie within {edges[0]:g} … {edges[-1]:g}: "
            "clip them, or widen the edges"
        )
    below = torch.special.ndtr((edges - values[..., None]) / sigma)
    return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])
