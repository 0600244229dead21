"""Softmax as an operation of its own, as attention needs it: the engine extended from outside."""

import torch

from .engine import Edge, Var, result

Tensor = torch.Tensor


def softmax_vjp(g: Tensor, p: Tensor) -> Tensor:
    """(diag(p) − p pᵀ) g without the matrix: p ∘ (g − ⟨g, p⟩). g, p: [..., n]."""
    return p * (g - (g * p).sum(-1, keepdim=True))


def softmax(a: Var) -> Var:
    """Over the last axis. Backward needs the output alone."""
    p = (a.value - a.value.amax(-1, keepdim=True)).exp()
    p = p / p.sum(-1, keepdim=True)
    return result("softmax", p, Edge(a, softmax_vjp, p))
