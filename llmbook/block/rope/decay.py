"""Score against distance: RoFormer's bound (§3.4.3), and what scores do.

With the pairs as complex numbers, h_i = q_i · conj(k_i), δ = m − n and S_j = Σ_{i<j} cis(δθ_i), the score is
Re Σ h_i cis(δθ_i). Summation by parts bounds it by max_i |h_{i+1} − h_i| · Σ_j |S_j|, with h_{d/2} = 0.
"""

import torch
from torch import Tensor


def partial_sums(distances: Tensor, theta: Tensor) -> Tensor:
    """S_1 … S_{d/2} for every distance: [N] and [d/2] → [N, d/2], complex."""
    angle = distances[:, None].double() * theta.double()
    return torch.polar(torch.ones_like(angle), angle).cumsum(-1)


def relative_bound(distances: Tensor, theta: Tensor) -> Tensor:
    """RoFormer's figure 2: the mean of |S_j| over j; [N], float64.

    It depends on the frequencies and the distance alone, not on q, k or
    the layout. At distance 0 it is (d/2 + 1)/2, its largest value.
    """
    return partial_sums(distances, theta).abs().mean(-1)


def pair_products(q: Tensor, k: Tensor) -> Tensor:
    """h_i = q_i · conj(k_i) of neighbours: [d] and [d] → [d/2], complex."""
    pairs = [torch.view_as_complex(x.double().reshape(-1, 2)) for x in (q, k)]
    return pairs[0] * pairs[1].conj()


def scores(q: Tensor, k: Tensor, distances: Tensor, theta: Tensor) -> Tensor:
    """⟨R(m)q, R(n)k⟩ for every m − n: [d], [d], [N], [d/2] → [N], float64."""
    angle = distances[:, None].double() * theta.double()
    turning = torch.polar(torch.ones_like(angle), angle)
    return (turning * pair_products(q, k)).sum(-1).real


def score_bound(
    q: Tensor, k: Tensor, distances: Tensor, theta: Tensor
) -> Tensor:
    """No |score| exceeds max |h_{i+1} − h_i| · Σ_j |S_j|; [N], float64."""
    h = pair_products(q, k)
    steps = torch.cat((h, h.new_zeros(1))).diff().abs()
    return steps.max() * partial_sums(distances, theta).abs().sum(-1)
