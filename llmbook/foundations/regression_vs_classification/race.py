"""How many steps each loss needs: the same networks, many learning rates and seeds at once, counted."""

from typing import NamedTuple

import torch

from .logit_losses import LOSSES

Tensor = torch.Tensor
CLASSES, FEATURES, WIDTH, EXAMPLES = 10, 8, 16, 100
WANTED, NEVER = 0.95, 10**6
RATES = {
    "gradient descent": {
        "cross-entropy": (0.5, 1.0, 2.0, 4.0, 8.0),
        "MSE on probabilities": (16.0, 32.0, 64.0, 128.0, 256.0),
        "MSE on logits": (0.25, 0.5, 1.0, 2.0, 4.0),
    },
    "Adam": dict.fromkeys(LOSSES, (0.01, 0.03, 0.1, 0.3, 1.0)),
}
STARTS = ("fresh", "confidently wrong")


class Race(NamedTuple):
    """Accuracy after every step, [steps + 1, seeds, rates], the rates, and the trained weights."""

    accuracy: Tensor
    rates: tuple[float, ...]
    weights: list[Tensor]

    def steps_to(self, wanted: float) -> Tensor:
        """First step at which a run has that accuracy, [seeds, rates]; NEVER if none."""
        hit = self.accuracy >= wanted
        return torch.where(hit.any(0), hit.int().argmax(0), NEVER)

    def best(self, wanted: float) -> int:
        """The rate whose median over the seeds needs the fewest steps."""
        return int(self.steps_to(wanted).median(0).values.argmin())


def problem(seeds: int, examples: int = EXAMPLES) -> tuple[Tensor, Tensor]:
    """Ten overlapping clusters in eight dimensions, others for each seed: x [seeds, n, 8], labels [n]."""
    labels, drawn = torch.arange(examples) % CLASSES, []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        centre = 1.2 * torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
        noise = 0.7 * torch.randn(examples, FEATURES, generator=generator, dtype=torch.float64)
        drawn.append(centre[labels] + noise)
    return torch.stack(drawn), labels


def fresh(seeds: int, width: int = WIDTH) -> list[Tensor]:
    """Weights and biases of 8 → width → 10 networks, one for each seed."""
    shapes = ((FEATURES, width), (1, width), (width, CLASSES), (1, CLASSES))
    networks = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(1000 + seed)
        networks.append([
            torch.randn(a, b, generator=generator, dtype=torch.float64) / a**0.5 * (a > 1) for a, b in shapes
        ])
    return [torch.stack(parts) for parts in zip(*networks, strict=True)]


def features_and_logits(weights: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """h = tanh(x W₁ + b₁) and h W₂ + b₂, every network at once: [..., n, 8] → [..., n, width], [..., n, 10]."""
    h = (x @ weights[0] + weights[1]).tanh()
    return h, h @ weights[2] + weights[3]


def gradients(weights: list[Tensor], x: Tensor, h: Tensor, dz: Tensor) -> list[Tensor]:
    """From ∂L/∂logits to every weight and bias: two linear layers and a tanh."""
    dh = dz @ weights[2].mT * (1 - h * h)
    return [x.mT @ dh, dh.sum(-2, keepdim=True), h.mT @ dz, dz.sum(-2, keepdim=True)]


def run(
    loss: str, optimizer: str, weights: list[Tensor], x: Tensor, labels: Tensor,
    rates: tuple[float, ...], steps: int,
) -> Race:
    """Full-batch training of every seed with every rate; accuracy is kept.

    Args:
        loss: a key of LOSSES. optimizer: a key of RATES.
        weights: from `fresh`. x: [seeds, n, 8]. labels: [n].
    """
    rate = x.new_tensor(rates)[:, None, None]
    w = [p[:, None].repeat(1, len(rates), 1, 1) for p in weights]
    first, second = ([torch.zeros_like(p) for p in w] for _ in range(2))
    x, kept = x[:, None], []
    hot = torch.nn.functional.one_hot(labels, CLASSES).to(x)
    for t in range(1, steps + 2):
        h, z = features_and_logits(w, x)
        kept.append((z.argmax(-1) == labels).to(x.dtype).mean(-1))
        dz = LOSSES[loss].gradient(z, hot) / len(labels)
        move = gradients(w, x, h, dz)
        if optimizer == "Adam":
            first = [m.lerp(g, 0.1) for m, g in zip(first, move, strict=True)]
            second = [v.lerp(g * g, 0.001) for v, g in zip(second, move, strict=True)]
            move = [
                m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                for m, v in zip(first, second, strict=True)
            ]
        w = [p - rate * g for p, g in zip(w, move, strict=True)]
    return Race(torch.stack(kept), rates, w)


def confidently_wrong(weights: list[Tensor], x: Tensor, labels: Tensor) -> list[Tensor]:
    """The networks after 200 steps of cross-entropy on labels that are all off by one class."""
    trained = run("cross-entropy", "gradient descent", weights, x, (labels + 1) % CLASSES, (1.0,), 200)
    return [p[:, 0] for p in trained.weights]


def everything(
    seeds: int = 9, steps: int = 130, *, starts: tuple[str, ...] = STARTS,
    examples: int = EXAMPLES, width: int = WIDTH,
) -> dict[tuple[str, str, str], Race]:
    """Start × optimizer × loss → its race over all of its rates."""
    x, labels = problem(seeds, examples)
    begin = fresh(seeds, width)
    ready = {STARTS[0]: begin, STARTS[1]: confidently_wrong(begin, x, labels)}
    return {
        (start, optimizer, loss): run(loss, optimizer, ready[start], x, labels, rates[loss], steps)
        for start in starts
        for optimizer, rates in RATES.items()
        for loss in LOSSES
    }
