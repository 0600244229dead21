"""Jacobians written down: softmax, inner product, and a product with a matrix."""

import torch

Tensor = torch.Tensor


def softmax_jacobian(p: Tensor) -> Tensor:
    """diag(p) - p pᵀ, symmetric. p: [n], a softmax's output. Returns [n, n]."""
    return torch.diag(p) - torch.outer(p, p)


def inner_product_jacobian(
    u: Tensor, v: Tensor, du: Tensor, dv: Tensor
) -> Tensor:
    """Of ⟨u(x), v(x)⟩ in numerator layout: the row uᵀ ∂v/∂x + vᵀ ∂u/∂x.

    Args:
        u, v: [m].
        du, dv: [m, n], ∂u/∂x and ∂v/∂x in numerator layout.

    Returns: [1, n].

    Raises:
        ValueError: shapes that do not match; says which.
    """
    for name, at, jacobian in (("u", u, du), ("v", v, dv)):
        if at.shape != u.shape or jacobian.shape[0] != len(at):
            raise ValueError(
                f"{name} {list(at.shape)} and ∂{name}/∂x "
                f"{list(jacobian.shape)} should have u's {len(u)} rows"
            )
    if du.shape != dv.shape:
        raise ValueError(
            f"∂u/∂x {list(du.shape)} and ∂v/∂x {list(dv.shape)} "
            "should have one shape"
        )
    return (u @ dv + v @ du)[None]


def weight_jacobian(x: Tensor, columns: int) -> Tensor:
    """∂vec(XW)/∂vec(W) = X ⊗ I, vec taken row by row as PyTorch stores.

    Args:
        x: X, [t, n].
        columns: m, the number of columns of W [n, m].

    Returns: [t·m, n·m], numerator layout.
    """
    identity = torch.eye(columns, dtype=x.dtype, device=x.device)
    return torch.kron(x, identity)
