"""RoPE four ways, and the permutation from one layout to the other (Su et al. 2021, arXiv 2104.09864)."""

import torch
from torch import Tensor


def frequencies(head_dim: int, base: float = 10_000.0) -> Tensor:
    """How far each pair turns per token: θ_i = base^(−2i/d), in radians.

    Args:
        head_dim: d, width of one head (not of the embedding); even.
        base: b, `rope_theta` in configurations.

    Returns:
        θ, [d/2], float64, falling from 1 (RoFormer §3.2.2).

    Raises:
        ValueError: an odd or non-positive d, or a base not above 0.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(
            f"head_dim must be even and at least 2, not {head_dim}: "
            "RoPE turns dimensions in pairs"
        )
    if not base > 0:
        raise ValueError(f"base must be above 0, not {base}")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return base**-exponent


def tables(
    positions: Tensor, theta: Tensor, dtype: torch.dtype = torch.float32,
    attention_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """cos(mθ_i) and sin(mθ_i) for every position m and pair i.

    Args:
        positions: m, [S] or [B, S], any integer or float type.
        theta: [d/2], radians per token.
        dtype: of the result. The angles are always float64: at position
            10⁶ a float32 angle is off by up to 0.06 radians.
        attention_factor: multiplies both tables (YaRN); 1 otherwise.

    Returns:
        cos and sin, [S, d/2] or [B, S, d/2].
    """
    angle = positions[..., None].double() * theta.double()
    cos, sin = angle.cos(), angle.sin()
    return (
        (cos * attention_factor).to(dtype),
        (sin * attention_factor).to(dtype),
    )


def rotate_by_matrix(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R(m) x with the d×d block-diagonal matrix written out (eq. 15).

    Shapes as in `rotate_interleaved`, which gives the same result: d
    multiply-adds per element here, where 2 would do.
    """
    half = cos.shape[-1]
    even = 2 * torch.arange(half, device=x.device)
    matrix = cos.new_zeros(*cos.shape[:-1], 2 * half, 2 * half)
    matrix[..., even, even] = cos
    matrix[..., even, even + 1] = -sin
    matrix[..., even + 1, even] = sin
    matrix[..., even + 1, even + 1] = cos
    return torch.einsum("...sij,...shj->...shi", matrix, x)


def rotate_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (a, b) of neighbours as the number a + jb, times cis(mθ_i).

    As in Meta's Llama. Shapes as in `rotate_interleaved`; float32 or
    float64, because there is no complex bfloat16.
    """
    pairs = x.unflatten(-1, (x.shape[-1] // 2, 2))
    z = torch.view_as_complex(pairs.contiguous())
    cis = torch.complex(cos, sin).unsqueeze(-2)
    return torch.view_as_real(z * cis).flatten(-2)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the neighbours (x_2i, x_2i+1): the paper's layout, DeepSeek's.

    Args:
        x: queries or keys, [S, H, d] or [B, S, H, d].
        cos, sin: [S, d/2] or [B, S, d/2] in the dtype of x.

    Returns:
        R(m) x in the shape of x (RoFormer eq. 34).
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    a, b = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned.flatten(-2)


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (x_i, x_{i+d/2}): Llama's layout in Hugging Face, GPT-NeoX's.

    Shapes as in `rotate_interleaved`.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def half_split_order(head_dim: int) -> Tensor:
    """Where half-split's dimensions come from: [0, 2, 4, …, 1, 3, 5, …].

    `rotate_half_split(x[..., order])` equals
    `rotate_interleaved(x)[..., order]`. Returns [d], int64.
    """
    return torch.arange(head_dim).view(-1, 2).T.flatten()


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of wq or wk, head by head, interleaved → half-split.

    Args:
        weight: [H·d, D], or a bias [H·d].
        heads: H; for wk the number of key heads.

    Returns:
        A copy in the same shape; a model that turns halves then has the
        scores the other had that turned neighbours.

    Raises:
        ValueError: the rows do not divide into heads of even width.
    """
    rows = weight.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise ValueError(
            f"{rows} rows do not divide into {heads} heads of even width"
        )
    order = half_split_order(rows // heads)
    return weight.unflatten(0, (heads, -1))[:, order].flatten(0, 1)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_half_split`; same arguments and errors."""
    rows = weight.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise ValueError(
            f"{rows} rows do not divide into {heads} heads of even width"
        )
    order = half_split_order(rows // heads).argsort()
    return weight.unflatten(0, (heads, -1))[:, order].flatten(0, 1)
