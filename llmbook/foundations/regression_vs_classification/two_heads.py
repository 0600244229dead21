"""One trunk and two heads on a target with two right answers, trained together and recorded."""

from typing import NamedTuple

import torch
from torch import nn

from .bins import bin_of, centres
from .likelihoods import categorical_nll, gaussian_nll, squared_error

Tensor = torch.Tensor
NOISE, LEFT = 0.08, 0.6


def swerve(x: Tensor) -> Tensor:
    """How far to the side a driver is at x, passing what stands at x = 0.55."""
    return torch.exp(-(((x - 0.55) / 0.2) ** 2))


def draw_drivers(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n drivers at x, uniform on [0, 1], and their offsets y = ±swerve(x) + noise.

    60% pass on the left, y > 0. Returns [n, 1] and [n].
    """
    generator = torch.Generator().manual_seed(seed)
    x, coin = torch.rand(2, n, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    side = torch.where(coin < LEFT, 1.0, -1.0)
    return x[:, None], side * swerve(x) + NOISE * noise


def true_density(x: Tensor, y: Tensor) -> Tensor:
    """p(y | x) = 0.6 N(y; swerve, 0.08²) + 0.4 N(y; −swerve, 0.08²). [n], [m] → [n, m]."""
    at = swerve(x)[:, None]
    sides = ((at, LEFT), (-at, 1 - LEFT))
    return torch.stack([
        share * torch.exp(-gaussian_nll(mean.expand(-1, len(y)), y.expand(len(x), -1), NOISE**2))
        for mean, share in sides
    ]).sum(0)


class TwoHeads(nn.Module):
    """The same features for both heads: a number, and logits over bins."""

    def __init__(self, bins: int, width: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.value = nn.Linear(width, 1)
        self.bins = nn.Linear(width, bins)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [n, 1]. Returns numbers [n] and logits [n, bins]."""
        features = self.trunk(4 * x - 2)
        return self.value(features).squeeze(-1), self.bins(features)


class Snapshot(NamedTuple):
    """Both heads over a grid of x after some steps, and the two losses."""

    mean: Tensor  # [m]
    p: Tensor  # [m, K]
    mse: float
    cross_entropy: float


def train(
    x: Tensor, y: Tensor, edges: Tensor, grid: Tensor, keep: tuple[int, ...]
) -> dict[int, Snapshot]:
    """Adam on the sum of both losses, over all of x [n, 1] and y [n].

    Returns a snapshot over grid [m, 1] after each of `keep`'s steps.
    """
    torch.manual_seed(0)
    model = TwoHeads(len(edges) - 1).to(x.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    labels, kept = bin_of(y, edges), {}
    for step in range(max(keep) + 1):
        mean, logits = model(x)
        mse = squared_error(mean, y).mean()
        ce = categorical_nll(logits, labels).mean()
        if step in keep:
            with torch.no_grad():
                at, z = model(grid)
            kept[step] = Snapshot(at, z.softmax(-1), mse.item(), ce.item())
        optimizer.zero_grad()
        (mse + ce).backward()
        optimizer.step()
    return kept


def expected(p: Tensor, edges: Tensor) -> Tensor:
    """The mean of the bins' distribution, Σ p_k centre_k. p: [..., K]."""
    return p @ centres(edges)
