"""One picture per part: what the part is about, and where in it each chapter stands. A chapter's box is a link."""

from collections.abc import Callable

import svg

from llmbook.kit import draw
from llmbook.kit.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, TEAL, YELLOW, to_svg
from tools.chapters import Chapter

Places = dict[str, tuple[float, float]]
WIDTH = 800


def link(chapter: Chapter, x: float, y: float) -> draw.Elements:
    """The chapter's short name in a frame whose middle is at x, y."""
    name = chapter.title().split(":")[0]
    wide = 7.6 * len(name) + 20
    frame = svg.Rect(
        x=round(x - wide / 2), y=round(y - 14), width=round(wide), height=28, rx=14, stroke=TEAL, stroke_width=2,
        fill="var(--pst-color-background, #fff)",
    )
    words = draw.text(x, y + 4.5, name, anchor="middle", bold=True)
    return [svg.A(href=f"../../{chapter.file}.html", elements=[frame, *words])]


def block(x: float, y: float, wide: float, tall: float, color: str, words: str, under: str = "") -> draw.Elements:
    """Something that data passes through, with its shape or size under its name."""
    shapes = draw.box(x, y, wide, tall, color, opacity=0.25, stroke=color)
    middle = y + tall / 2 + (-3 if under else 5)
    shapes += draw.text(x + wide / 2, middle, words, anchor="middle", bold=True)
    return shapes + (draw.text(x + wide / 2, middle + 18, under, anchor="middle", size=12) if under else [])


def foundations() -> tuple[draw.Elements, float, Places]:
    """Forward along the top, backward along the bottom, and what is kept between them."""
    stops = {
        "text": "ids [B, S]", "embedding": "[B, S, D]", "L blocks": "[B, S, D]", "logits": "[B, S, V]",
        "loss": "one number",
    }
    parts: draw.Elements = []
    for n, (name, shape) in enumerate(stops.items()):
        x = 10 + 160 * n
        parts += block(x, 80, 118, 56, BLUE, name, shape)
        parts += block(x, 290, 118, 56, ORANGE, "∂ " + name if n else "stops here")
        if n < 4:
            parts += draw.line(x + 122, 108, x + 156, 108, color=BLUE, width=3, arrow=True)
        if n:
            parts += draw.line(x - 4, 318, x - 38, 318, color=ORANGE, width=3, arrow=True)
            parts += draw.line(x + 59, 140, x + 59, 286, color=GREEN, width=3, dashed=n < 4, arrow=True)
    parts += draw.text(10, 66, "forward: shapes, bytes, FLOPs", bold=True)
    words = "backward: each arrow multiplies by one derivative, and needs what the dashed lines kept"
    parts += draw.text(10, 370, words, bold=True)
    return parts, 384, {
        "tokens_to_logits": (329, 26), "tensor_toolbox": (134, 182), "dropout": (389, 182),
        "matrix_calculus": (229, 246), "backprop": (469, 246), "regression_vs_classification": (664, 182),
    }


def inside() -> tuple[draw.Elements, float, Places]:
    """A residual stream with its two branches; what each is made of beside it."""
    parts = draw.line(80, 420, 80, 20, color=BLUE, width=6, arrow=True)
    parts += draw.text(10, 440, "residual stream, [B, S, D]")
    for y, name, color in ((290, "attention", ORANGE), (110, "feed-forward", PURPLE)):
        parts += block(130, y + 76, 120, 40, GREEN, "norm") + block(130, y, 120, 40, color, name)
        parts += draw.line(83, y + 96, 126, y + 96, color=color, width=2.5, arrow=True)
        parts += draw.line(190, y + 72, 190, y + 44, color=color, width=2.5, arrow=True)
        parts += draw.line(128, y + 20, 90, y + 20, color=color, width=2.5, arrow=True)
        parts.append(svg.Circle(cx=80, cy=y + 20, r=11, fill=color))
        parts += draw.text(80, y + 25, "+", anchor="middle", bold=True, color="#000000", size=16)
    for y, color in ((310, ORANGE), (130, PURPLE), (386, GREEN)):
        parts += draw.line(254, y, 310, y, color=color, dashed=True)
    parts += draw.text(320, 254, "which token looks at which, and what is kept of those before", bold=True)
    parts += draw.text(320, 74, "what a token does on its own: one network, or a few of many", bold=True)
    parts += draw.text(320, 376, "keeps the stream's numbers of one size", bold=True)
    parts += draw.text(320, 24, "all of it, stacked, trained and asked", bold=True)
    return parts, 456, {
        "rope": (356, 290), "attention_and_kv_cache": (520, 290), "mla": (450, 328), "norms": (360, 404),
        "switch_routing": (390, 110), "deepseek_moe": (560, 110), "llama": (660, 24),
    }


def gpu() -> tuple[draw.Elements, float, Places]:
    """Far and slow on the left, near and fast on the right."""
    parts = block(10, 60, 150, 330, GREY, "HBM", "tens of GB") + block(300, 110, 120, 230, YELLOW, "L2", "tens of MB")
    for n in range(3):
        y = 60 + 116 * n
        parts += draw.box(540, y, 250, 98, TEAL, opacity=0.15, stroke=TEAL)
        parts += block(552, y + 34, 108, 54, GREEN, "SRAM", "hundreds of KB")
        parts += block(676, y + 34, 104, 54, PURPLE, "tensor cores")
        parts += draw.text(552, y + 22, f"multiprocessor {n}" if n < 2 else "… more than a hundred", bold=True)
        parts += draw.line(664, y + 61, 673, y + 61, arrow=True)
        parts += draw.line(424, 225, 536, y + 49, color=TEAL, width=3, arrow=True)
    parts += draw.line(164, 225, 296, 225, color=RED, width=8, arrow=True)
    parts += draw.text(230, 206, "a few TB/s", anchor="middle")
    parts += draw.text(85, 412, "far, large, slow", anchor="middle", bold=True)
    parts += draw.text(790, 412, "near, small, fast: hundreds of TFLOP/s", anchor="end", bold=True)
    return parts, 436, {
        "roofline": (230, 172), "attention_on_the_roofline": (350, 84), "online_softmax": (350, 376),
        "flash_attention": (350, 412), "flash_attention_2": (665, 26),
    }


def parallel() -> tuple[draw.Elements, float, Places]:
    """A model cut into stages; the batch cut into micro-batches that follow each other through them."""
    parts: draw.Elements = []
    for n, color in enumerate((BLUE, ORANGE, GREEN, PURPLE)):
        x = 20 + 200 * n
        parts += block(x, 100, 150, 120, color, f"GPU {n}", f"layers {8 * n} to {8 * n + 7}")
        if n < 3:
            parts += draw.line(x + 154, 140, x + 196, 140, color=BLUE, width=3, arrow=True)
            parts += draw.line(x + 196, 180, x + 154, 180, color=ORANGE, width=3, arrow=True)
    parts += draw.text(20, 86, "activations to the right, gradients to the left: who works, and who waits?", bold=True)
    return parts, 240, {"pipeline_parallel": (400, 30)}


MAPS: dict[str, Callable[[], tuple[draw.Elements, float, Places]]] = {
    "foundations": foundations, "block": inside, "gpu": gpu, "parallel": parallel,
}


def picture(part: str, chapters: list[Chapter], alt: str) -> str:
    """The part's map as HTML. A chapter without a place in it stands in a row beneath."""
    shapes, tall, places = MAPS[part]()
    left = [chapter for chapter in chapters if chapter.name not in places]
    for chapter in chapters:
        if chapter.name in places:
            shapes = shapes + link(chapter, *places[chapter.name])
    for n, chapter in enumerate(left):
        shapes = shapes + link(chapter, WIDTH / 2, tall + 20 + 36 * n)
    drawn = to_svg(draw.canvas(WIDTH, tall + 36 * len(left), shapes), alt)
    drawn = drawn.replace("role='img'", "role='group'")  # an image has no links inside
    return f'<figure class="gg"><div style="overflow-x:auto;overflow-y:hidden" tabindex="0">{drawn}</div></figure>'
