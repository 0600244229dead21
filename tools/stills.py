"""Still pictures of explorers, for viewers that show no widgets (GitHub), drawn from the saved widget state."""

import base64
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import resvg_py

FONTS = Path(mpl.get_data_path()) / "fonts/ttf"


def add_stills(notebook: Any) -> None:
    """Put a PNG beside every widget view whose visible picture is an SVG."""
    saved = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    state = saved.get("state", {})
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            view = data.get("application/vnd.jupyter.widget-view+json")
            markup = _visible(state, view["model_id"]) if view else None
            if markup:
                data["image/png"] = to_png(markup)


def _visible(state: dict[str, Any], model: str) -> str | None:
    """The first SVG under this model that a reader sees before moving anything."""
    values = state.get(model, {}).get("state", {})
    found = re.search(r"<svg.*</svg>", str(values.get("value", "")), flags=re.S)
    if found:
        return found.group()
    children = [child.removeprefix("IPY_MODEL_") for child in values.get("children") or []]
    if "selected_index" in values:
        index = values["selected_index"]
        children = [] if index is None else [children[index]]
    return next((markup for child in children if (markup := _visible(state, child))), None)


def to_png(markup: str) -> str:
    """A PNG of the SVG on white, base64. matplotlib's own fonts make it the same on every machine."""
    markup = re.sub(r' style="width:100%[^"]*"', "", markup, count=1)  # the page's size, not the picture's
    markup = markup.replace("currentColor", "#1f2328").replace("&nbsp;", "&#160;")
    if "xmlns=" not in markup:
        markup = markup.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    png = resvg_py.svg_to_bytes(
        svg_string=markup, background="#ffffff", skip_system_fonts=True, zoom=1.5, font_family="DejaVu Sans",
        sans_serif_family="DejaVu Sans", monospace_family="DejaVu Sans Mono",
        font_files=[str(FONTS / name) for name in (
            "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf",
            "DejaVuSans-Oblique.ttf",
        )],
    )
    return base64.b64encode(bytes(png)).decode()
