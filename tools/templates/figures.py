"""What the NAME chapter draws."""

import svg
import torch

from llmbook.kit import draw
from llmbook.kit.style import COLORS

from .mechanism import running_mean

HEIGHTS = (3.0, 1.0, 4.0, 1.0, 5.0, 2.0)


def bars(step: int) -> svg.SVG:
    """The first `step` values, and their mean as a line."""
    parts = [
        draw.box(
            40 + 60 * i, 190 - 30 * height, 48, 30 * height, COLORS["Q"], f"{height:g}",
            opacity=1 if i < step else 0.3,
        )
        for i, height in enumerate(HEIGHTS)
    ]
    y = 190 - 30 * float(running_mean(torch.tensor(HEIGHTS))[step - 1])
    parts.append(draw.line(30, y, 410, y, color=COLORS["K"], width=3))
    return draw.canvas(440, 210, *parts)


def caption(step: int) -> str:
    return f"The mean of the first {step} is {running_mean(torch.tensor(HEIGHTS))[step - 1]:.2f}."
