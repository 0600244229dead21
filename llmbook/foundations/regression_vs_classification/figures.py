"""What the chapter draws: two heads on a fork, three loss surfaces, gradients by margin, and reliability."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import contourpy
import svg
import torch

from llmbook.kit import draw
from llmbook.kit.style import BLUE, GREEN, GREY, ORANGE, RED

from .bins import centres
from .calibration import judge, overfit
from .likelihoods import gaussian_nll
from .logit_losses import LOSSES, at_margin, by_margin
from .surface import BINARY, Path, mean_loss, output, quickest, sample
from .two_heads import LEFT, Snapshot, draw_drivers, swerve, train, true_density

Tensor = torch.Tensor
WIDTH = 780
HIGH = str.maketrans("-2468", "⁻²⁴⁶⁸")
DASH = ("", "7 4", "2 3")
INKS = dict(zip(LOSSES, (BLUE, RED, ORANGE), strict=True))


class Panel(NamedTuple):
    """A plot area on an SVG: its place in pixels, and the numbers at its edges."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        across, up = (x - self.x[0]) / (self.x[1] - self.x[0]), (y - self.y[0]) / (self.y[1] - self.y[0])
        return round(self.left + across * self.width, 1), round(self.top + (1 - up) * self.height, 1)

    def frame(
        self, title: str, xs: Sequence[float], ys: Sequence[float], *, under: str, power: bool = False,
    ) -> draw.Elements:
        """Border, title, ticks; `power` writes the y ticks as powers of ten."""
        shapes = draw.box(self.left, self.top, self.width, self.height, GREY, opacity=0.08)
        shapes += draw.text(self.left, self.top - 9, title, bold=True, size=14)
        for value in xs:
            words = f"{value:g}".replace("-", "−")
            shapes += draw.text(self.at(value, 0)[0], self.top + self.height + 15, words, size=12, anchor="middle")
        for value in ys:
            words = (f"10{value:g}".translate(HIGH) if value else "1") if power else f"{value:g}".replace("-", "−")
            shapes += draw.text(self.left - 6, self.at(0, value)[1] + 4, words, size=12, anchor="end")
        middle = self.left + self.width / 2
        return shapes + draw.text(middle, self.top + self.height + 31, under, size=12.5, anchor="middle")

    def curve(self, x: Any, y: Any, color: str, width: float = 2.5, dash: str = "") -> draw.Elements:
        """A line through the points that lie inside the panel."""
        points = [self.at(a, b) for a, b in zip(x, y, strict=True) if self.y[0] <= b <= self.y[1]]
        if not points:
            return []
        look = {"stroke-dasharray": dash} if dash else {}
        path = "M" + "L".join(f"{a:g} {b:g}" for a, b in points)
        return [svg.Path(fill="none", stroke=color, stroke_width=width, extra={"d": path, **look})]

    def area(self, x: Any, y: Any, color: str) -> draw.Elements:
        """What lies between the points and the panel's left edge."""
        points = [self.at(a, b) for a, b in [(0, y[0]), *zip(x, y, strict=True), (0, y[-1])]]
        path = "M" + "L".join(f"{a:g} {b:g}" for a, b in points) + "z"
        return [svg.Path(fill=color, fill_opacity=0.75, extra={"d": path})]

    def dots(self, x: Any, y: Any, color: str, size: float, opacity: float = 1) -> draw.Elements:
        """Round dots, as one path."""
        points = (self.at(a, b) for a, b in zip(x, y, strict=True))
        path = "".join(f"M{a:g} {b:g}h0" for a, b in points)
        return [svg.Path(stroke=color, stroke_width=size, stroke_linecap="round", opacity=opacity, extra={"d": path})]


def _tiles(panel: Panel, values: Tensor, color: str, levels: int = 8) -> draw.Elements:
    """values [columns, rows], 0 to 1, as tiles whose opacity says the value; row 0 is at the bottom."""
    columns, rows = values.shape
    wide, tall = panel.width / columns, panel.height / rows
    bands = (values.clamp(0, 1) * levels).round().int().T.tolist()
    paths = [""] * (levels + 1)
    for r, row in enumerate(bands):
        c = 0
        for band, run in itertools.groupby(row):
            length = len(list(run))
            place = f"M{panel.left + c * wide:.1f} {panel.top + (rows - 1 - r) * tall:.1f}"
            paths[band] += f"{place}h{length * wide:.1f}v{tall:.1f}h-{length * wide:.1f}z"
            c += length
    return [
        svg.Path(fill=color, fill_opacity=round(0.95 * band / levels, 2), extra={"d": path})
        for band, path in enumerate(paths) if band and path
    ]


STEPS, EDGES = (0, 5, 10, 20, 40, 80, 160, 300), torch.linspace(-1.4, 1.4, 29, dtype=torch.float64)
GRID, PLACES = torch.linspace(0, 1, 41, dtype=torch.float64), (0.1, 0.3, 0.4, 0.55, 0.8)


@functools.cache
def heads() -> dict[int, Snapshot]:
    """The chapter's own training run, recorded."""
    return train(*draw_drivers(2000, 0), EDGES, GRID[:, None], STEPS)


def fork(x: float, step: int) -> svg.SVG:
    """Left: the road with both heads' answers. Right: what they say about one place."""
    now, row, bin_width = heads()[step], int((GRID - x).abs().argmin()), float(EDGES[1] - EDGES[0])
    road = Panel(34, 36, 448, 320, (-0.0125, 1.0125), (-1.4, 1.4))
    side = Panel(540, 36, 226, 320, (0, 3.6), (-1.4, 1.4))
    drivers, offsets = draw_drivers(2000, 0)
    parts = road.frame(f"Step {step}: the road from above", (0, 0.5, 1), (-1, 0, 1), under="position x along the road")
    parts += _tiles(road, now.p / bin_width / 2.6, BLUE)
    parts += road.dots(drivers[:160, 0].tolist(), offsets[:160].tolist(), "currentColor", 3, 0.55)
    cx, cy = road.at(0.55, 0)
    parts.append(svg.Circle(cx=cx, cy=cy, r=42, fill=GREY, stroke="currentColor", stroke_width=2))
    parts += draw.text(cx, cy + 18, "obstacle", anchor="middle", size=12, color="#000000")
    parts += road.curve(GRID.tolist(), now.mean.tolist(), RED, 4)
    parts += draw.line(*road.at(x, -1.4), *road.at(x, 1.4), dashed=True)
    y = torch.linspace(-1.4, 1.4, 85, dtype=torch.float64)
    parts += side.frame(f"What is said about x = {x:g}", (0, 1, 2, 3), (), under="probability per unit of y")
    bars = (now.p[row] / bin_width).clamp(max=3.6).repeat_interleave(2).tolist()
    parts += side.area(bars, EDGES.repeat_interleave(2)[1:-1].tolist(), BLUE)
    bell = gaussian_nll(now.mean[row].expand(len(y)), y, now.mse).neg().exp()
    for values, color, dash in ((bell, RED, ""), (true_density(GRID[row : row + 1], y)[0], "currentColor", "2 3")):
        parts += side.curve(values.clamp(max=3.6).tolist(), y.tolist(), color, 2.5, dash)
    parts += side.dots([0.04], [float(now.mean[row])], RED, 12)
    names = (("value head, MSE", RED), ("bin head, cross-entropy", BLUE), ("drivers, true density", "currentColor"))
    for n, (name, color) in enumerate(names):
        parts += draw.box(34 + n * 215, 402, 22, 12, color) + draw.text(62 + n * 215, 413, name)
    return draw.canvas(WIDTH, 422, parts)


def fork_caption(x: float, step: int) -> str:
    now, row = heads()[step], int((GRID - x).abs().argmin())
    best, away = centres(EDGES)[now.p[row].argmax()], float(swerve(GRID[row]))
    near = float(now.p[row][(centres(EDGES) - now.mean[row]).abs() < 0.15].sum())
    return (
        f"Step {step}, x = {x:g}: drivers are near {away:+.2f} ({LEFT:.0%}) or {-away:+.2f}. The value head says "
        f"{float(now.mean[row]):+.2f}; the bin head's likeliest bin is at {float(best):+.2f}, and it gives the value "
        f"head's surroundings (±0.15) {near:.0%}. MSE {now.mse:.3f}, cross-entropy {now.cross_entropy:.2f} nats."
    )


SURFACE_STEPS = (0, 1, 2, 3, 4, 8, 16, 24, 32, 64, 128, 200)
POINTS = {"fresh": (0.0, 0.0), "confidently wrong": (-5.0, 3.0)}
POWERS = tuple(2.0**k for k in range(-4, 8))
ALIKE, OWN = "0.25 for all", "each its best"
WINDOW = (-7.0, 6.0), (-4.0, 7.0)


@functools.cache
def walk(name: str, begin: str, rates: str) -> tuple[float, Path]:
    """The learning rate and its path."""
    return quickest(name, POINTS[begin], POWERS if rates == OWN else (0.25,), 200, *sample())


def _corners(points: Any) -> list[list[float]]:
    """A closed outline [n, 2] without the points at which it goes straight on."""
    closed = torch.as_tensor(points)[:-1]
    before, after = closed - closed.roll(1, 0), closed.roll(-1, 0) - closed
    bend = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return closed[bend.abs() > 2e-4].tolist()


@functools.cache
def _bands(name: str, panel: Panel) -> draw.Elements:
    """The surface below each of ten equally spaced heights, laid over one another: the lower, the darker."""
    across, up = (torch.linspace(*window, 41, dtype=torch.float64) for window in WINDOW)
    height = mean_loss(name, torch.cartesian_prod(across, up), *sample()).view(41, 41).T
    low, high = float(height.min()), float(height.max())
    cut = contourpy.contour_generator(across, up, height, fill_type="OuterOffset")
    shapes: draw.Elements = []
    for n in range(1, 11):
        path = ""
        for points, ends in zip(*cut.filled(low - 1, low + n * (high - low) / 10), strict=True):
            for a, b in itertools.pairwise(ends):
                path += "M" + " ".join("{:.0f} {:.0f}".format(*panel.at(*point)) for point in _corners(points[a:b]))
        ink = INKS[name]
        shapes.append(svg.Path(fill=ink, fill_opacity=0.1, stroke=ink, stroke_width=0.8, extra={"d": path}))
    return shapes


def surfaces(begin: str, rates: str, step: int) -> svg.SVG:
    """Three loss surfaces with gradient descent on each, and below what the three fits say."""
    x, labels = sample()
    below = Panel(34, 334, 732, 150, (-3.5, 3.5), (-0.3, 1.3))
    parts = below.frame("The 40 examples, and what each fit says", range(-3, 4), (0, 1), under="feature x")
    parts += below.dots(x.tolist(), labels.tolist(), "currentColor", 8, 0.5)
    grid = torch.linspace(-3.5, 3.5, 71, dtype=torch.float64)
    for n, name in enumerate(BINARY):
        panel = Panel(34 + n * 250, 36, 232, 226, *WINDOW)
        rate, path = walk(name, begin, rates)
        ticks = (-3, 0, 3, 6)
        parts += panel.frame(name, ticks, () if n else ticks, under="weight w") + _bands(name, panel)
        low, high = torch.tensor(WINDOW).T
        ws, bs = path.weights[[one for one in SURFACE_STEPS if one <= step]].clamp(low, high).T.tolist()
        parts += panel.curve(ws, bs, "currentColor", 2) + panel.dots(ws, bs, "currentColor", 6)
        parts += panel.dots(ws[-1:], bs[-1:], "currentColor", 14) + panel.dots(ws[-1:], bs[-1:], INKS[name], 9)
        words = f"η = {rate:g}, accuracy {float(path.accuracy[step]):.0%}"
        parts += draw.text(panel.left + 6, panel.top + panel.height - 8, words, bold=True)
        z = output(path.weights[step], grid)
        said = z if name == "MSE on logits" else z.sigmoid()
        parts += below.curve(grid.tolist(), said.tolist(), INKS[name], 3, DASH[n])
    return draw.canvas(WIDTH, 520, parts, draw.text(22, 32, "b", anchor="end", bold=True))


def surfaces_caption(begin: str, rates: str, step: int) -> str:
    told = []
    for name in BINARY:
        rate, path = walk(name, begin, rates)
        told.append(f"{name} (η = {rate:g}) {float(path.losses[step]):.3f}, {float(path.accuracy[step]):.0%} right")
    return f"From a {begin} start, after {step} step{'s' * (step != 1)}: " + "; ".join(told) + "."


MARGINS, CLASSES = tuple(range(-14, 9)), (2, 10, 1000)
AXIS = tuple(m / 2 for m in range(-28, 17))


def _signed(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−") if value else "0"


def slopes(classes: int, margin: int) -> svg.SVG:
    """Loss and gradient of three losses against the margin, and the gradient at one margin in numbers."""
    loss = Panel(38, 36, 324, 230, (-14, 8), (0, 14))
    steep = Panel(440, 36, 326, 230, (-14, 8), (-9, 2))
    parts = loss.frame("The loss", (-12, -8, -4, 0, 4, 8), (0, 5, 10), under="margin: true logit − rival's logit")
    parts += steep.frame(
        "Size of its slope at the true logit", (-12, -8, -4, 0, 4, 8), (-8, -6, -4, -2, 0, 2), power=True,
        under="← confidently wrong · confidently right →",
    )
    z, y = at_margin(classes, margin)
    words = f"∂L/∂z at margin {_signed(margin)}, true class at p = {float(z.softmax(-1)[0]):.2g}"
    parts += draw.text(38, 326, words, bold=True, size=14)
    for column, name in enumerate(("true class", "rival", "each other class")):
        parts += draw.text(330 + column * 160, 346, name, anchor="middle")
    for n, name in enumerate(LOSSES):
        values, slope = by_margin(name, classes, AXIS)
        parts += loss.curve(AXIS, values, INKS[name], 3, DASH[n]) + steep.curve(AXIS, slope, INKS[name], 3, DASH[n])
        at = AXIS.index(margin)
        if values[at] <= 14:
            parts += loss.dots([margin], [values[at]], INKS[name], 11)
        else:
            parts += draw.text(354, 54, f"{name}: {values[at]:.0f}, off the scale", anchor="end", color=INKS[name])
        parts += steep.dots([margin], [max(slope[at], -9)], INKS[name], 11)
        top = 354 + n * 32
        parts += Panel(38, top, 36, 28, (0, 1), (0, 1)).curve((0, 1), (0.5, 0.5), INKS[name], 3, DASH[n])
        parts += draw.text(82, top + 18, name, bold=True)
        entries = LOSSES[name].gradient(z, y)[:3].tolist()
        for column, value in enumerate(entries):
            strong = 0.85 if abs(value) > 0.1 else 0.4 if abs(value) > 1e-3 else 0.12
            parts += draw.box(254 + column * 160, top, 152, 26, INKS[name], _signed(value), opacity=strong, size=14)
    for panel in (loss, steep):
        parts += draw.line(*panel.at(margin, panel.y[0]), *panel.at(margin, 0.9 * panel.y[1]), dashed=True, opacity=0.6)
    return draw.canvas(WIDTH, 456, parts)


def slopes_caption(classes: int, margin: int) -> str:
    z, y = at_margin(classes, margin)
    told = ", ".join(f"{name} {float(loss.gradient(z, y)[0]):.2g}" for name, loss in LOSSES.items())
    where = "the rival leads" if margin < 0 else "a tie" if margin == 0 else "the true class leads"
    return f"{classes} classes, margin {margin:+d} ({where}): the slope at the true logit is, by loss, {told}."


TRAINED, TEMPERATURES = (20, 50, 100, 200, 400), ("1", "fitted")


def calibrated(temperature: str, step: int) -> svg.SVG:
    """Accuracy against confidence, and how many answers have that confidence."""
    _, right, found = judge(overfit(TRAINED)[step], temperature == "fitted")
    panel, many = Panel(44, 36, 340, 270, (0.3, 1), (0, 1)), Panel(440, 36, 326, 270, (0.3, 1), (0, 1))
    parts = panel.frame("How often it is right", (0.4, 0.6, 0.8, 1), (0, 0.5, 1), under="when it says it is this sure")
    parts += many.frame("How often it says so", (0.4, 0.6, 0.8, 1), (0, 0.5, 1), under="confidence")
    for n in range(3, 10):
        if found.counts[n] < 20:
            continue  # too few to speak of a share
        right_too, sure_too = float(found.accuracy[n]), float(found.confidence[n])
        (left, top), low = panel.at(n / 10 + 0.005, max(right_too, sure_too)), panel.at(0, min(right_too, sure_too))[1]
        parts += draw.box(left, low, 42, panel.at(0, 0)[1] - low, GREEN, opacity=0.85)
        parts += draw.box(left, top, 42, low - top, RED if sure_too > right_too else GREEN, opacity=0.4)
        left, top = many.at(n / 10 + 0.005, float(found.counts[n] / found.counts.sum()))
        parts += draw.box(left, top, 40, many.at(0, 0)[1] - top, BLUE)
    parts += panel.curve((0.3, 1), (0.3, 1), "currentColor", 2, "5 4")
    sure = float((found.counts * found.confidence).sum() / found.counts.sum())
    for value, name, color, height in ((right, "right", GREEN, 0.93), (sure, "sure", RED, 0.85)):
        parts += draw.line(*many.at(value, 0), *many.at(value, height - 0.02), color=color, width=3)
        parts += draw.text(*many.at(value, height), f"{name} {value:.0%}", anchor="middle", bold=True)
    return draw.canvas(WIDTH, 350, parts)


def calibrated_caption(temperature: str, step: int) -> str:
    t, right, found = judge(overfit(TRAINED)[step], temperature == "fitted")
    return (
        f"After {step} steps, logits divided by {t:.2f}: {right:.1%} right, calibration error (the pale gaps, "
        f"weighted) {found.ece:.3f}. On the dashed line, confidence would be accuracy."
    )
