"""One visual language: the palette, and the way a figure becomes a picture that fits a page, light or dark."""

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import svg
from matplotlib.figure import Figure

# Okabe-Ito and Paul Tol hues: told apart by readers who see colours differently, and bright
# enough to stand on a white page as well as on a dark one.
BLUE, ORANGE, GREEN, RED = "#4393c9", "#e08214", "#2ca25f", "#e0526b"
PURPLE, YELLOW, TEAL, GREY = "#9b6bcc", "#d9b526", "#1fa8a0", "#8a929c"

COLORS = {
    # attention
    "Q": BLUE, "K": ORANGE, "V": GREEN, "S": YELLOW, "P": RED, "O": PURPLE, "m": TEAL, "l": GREY,
    # a pipeline's operations: forward, whole backward, input gradient, weight gradient
    "F": BLUE, "B": ORANGE, "I": RED, "W": GREEN, "send": TEAL, "idle": GREY,
    # what fills a GPU's memory
    "parameters": BLUE, "gradients": ORANGE, "optimizer": PURPLE, "activations": GREEN, "kv": TEAL,
    # where bytes live
    "hbm": GREY, "sram": TEAL,
}
RANKS = [BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, YELLOW, GREY]

# matplotlib wants a real colour; this one stands for "the page's own ink" and is replaced in the SVG.
INK = "#010203"
FONT = "system-ui, -apple-system, Segoe UI, DejaVu Sans, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, DejaVu Sans Mono, monospace"


def rank_color(rank: int) -> str:
    """The colour of a rank (or a stage, an expert, a device), the same in every chapter."""
    return RANKS[rank % len(RANKS)]


def text_on(fill: str) -> str:
    """Black or white, whichever has the better WCAG contrast on the hex colour `fill`."""
    channels = [int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#ffffff"


@contextmanager
def plot(width: float = 7.2, height: float = 3.6, **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """A matplotlib figure in the book's style, closed afterwards so that it is drawn once only.

    Args:
        width, height: inches.
        **subplots: passed to `plt.subplots`.
    """
    cycle = mpl.rcsetup.cycler(color=[BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, YELLOW, GREY])
    look: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "llmbook", "figure.dpi": 100, "savefig.dpi": 200,
        "font.size": 11, "axes.titlesize": 12, "axes.prop_cycle": cycle, "lines.linewidth": 2.2,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.18,
        "legend.frameon": False, "figure.constrained_layout.use": True,
        "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "grid.color": INK,
        "xtick.color": INK, "ytick.color": INK,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    }
    with mpl.rc_context(look):
        figure, axes = plt.subplots(figsize=(width, height), **subplots)
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def to_svg(figure: Any, label: str) -> str:
    """An SVG string that follows the page's theme and carries its own description.

    Args:
        figure: a `svg.SVG` (schematics) or a matplotlib `Figure` (plots).
        label: what the picture shows; becomes its accessible name.

    Raises:
        TypeError: `figure` is neither.
    """
    if isinstance(figure, svg.SVG):
        width, markup = float(figure.width or 0), figure.as_str()  # type: ignore[arg-type]
    elif isinstance(figure, Figure):
        width, markup = figure.get_figwidth() * 100, _from_matplotlib(figure)
    else:
        raise TypeError(
            f"a figure must be a svg.SVG or a matplotlib Figure, but draw returned {type(figure).__name__}"
        )
    # On a phone a wide picture scrolls sideways before its text becomes too small to read.
    size = f"width:100%;max-width:{width:.0f}px;min-width:{0.85 * width if width > 400 else width:.0f}px;height:auto"
    attributes = f'role="img" aria-label="{html.escape(label)}" style="{size}"'
    markup = markup.replace("<svg", f"<svg {attributes}", 1)
    # Saved pages keep pictures inside JSON, where each double quote costs two bytes.
    return re.sub(r"<[^>]*>", lambda tag: tag.group() if "'" in tag.group() else tag.group().replace('"', "'"), markup)


def _from_matplotlib(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmbook"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :]
    # matplotlib's style rule is for "*", the page included; its ids of groups would stand there many times.
    markup = re.sub(r"\s*<metadata>.*?</metadata>|<style.*?</style>", "", markup, flags=re.S)
    markup = re.sub(r'<g id="[^"]*"', "<g", markup)
    markup = re.sub(r"(?m)^\s+|<!--.*?-->", "", markup)
    markup = re.sub(r"(\d\.\d{2})\d+", r"\1", markup)
    # Units of pt would fight with the CSS size; the viewBox alone gives the shape.
    markup = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", markup, count=1)
    return markup.replace(INK, "currentColor").strip()
