"""Explorers: pictures that move in the browser, with no kernel behind the page.

Every combination of the choices is drawn once, and sliders switch between the drawings (`Stack` + `jslink`), so a
static page, Jupyter and an exported HTML file behave alike. Where ipywidgets has no `Stack` (7.x, Colab) the same
call answers through the kernel.
"""

import html
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets

from .style import to_svg

MAX_FRAMES = 300
MAX_BYTES = 2_000_000

Draw = Callable[..., Any]
Caption = Callable[..., str]
Choice = Sequence[Any] | Callable[..., Sequence[Any]]


class Explorer(widgets.VBox):
    """What `explore` returns: a box of controls and pictures whose repr stays short."""

    summary = ""

    def __repr__(self) -> str:
        return self.summary


def explore(draw: Draw, caption: Caption, *, start: dict[str, Any] | None = None, **choices: Choice) -> Explorer:
    """A picture per combination of choices, and controls that switch between them in the browser.

    Args:
        draw: `draw(**chosen)` returns a `svg.SVG` or a matplotlib `Figure`.
        caption: `caption(**chosen)` returns the sentence that states what the picture shows; also its alt text.
        start: the combination shown first; what it leaves out starts at its first value.
        **choices: name → its values, in order; or a function of earlier choices that returns them (a recording
            whose number of steps depends on the size, say). Strings become a menu, other values a slider, and a
            choice named `step` gets a Play button. No choice at all makes a still picture.

    Raises:
        ValueError: an empty choice, an unhashable or repeated value, more than 300 pictures, or more than 2 MB.
        RuntimeError: `draw` or `caption` raised; says for which combination.
    """
    start = start or {}
    if unknown := set(start) - set(choices):
        raise ValueError(f"start names {sorted(unknown)}, but the choices are {sorted(choices)}")
    combinations = _combinations(choices)
    if len(combinations) > MAX_FRAMES:
        raise ValueError(
            f"{len(combinations)} pictures are too many for a page: at most {MAX_FRAMES}; offer fewer values"
        )
    if not hasattr(widgets, "Stack"):
        explorer = _through_kernel(draw, caption, choices, start)
    else:
        pictures = {tuple(chosen.values()): picture(draw, caption, chosen) for chosen in combinations}
        total = sum(len(markup) for markup in pictures.values())
        if total > MAX_BYTES:
            raise ValueError(
                f"the pictures take {total / 1e6:.1f} MB, {total // len(pictures):,} bytes each; "
                f"at most {MAX_BYTES / 1e6:.0f} MB: draw less in each, or offer fewer values"
            )
        explorer = _in_browser(pictures, choices, start)
    names = " × ".join(choices) or "still"
    explorer.summary = f"Explorer({names}: {len(combinations)} picture{'s' * (len(combinations) != 1)})"
    return explorer


def picture(draw: Draw, caption: Caption, chosen: dict[str, Any]) -> str:
    """One combination as HTML: the figure over its caption."""
    try:
        words = caption(**chosen)
        markup = to_svg(draw(**chosen), words)
    except Exception as error:
        where = ", ".join(f"{name}={value!r}" for name, value in chosen.items()) or "no choices"
        raise RuntimeError(f"drawing failed for {where}: {type(error).__name__}: {error}") from error
    scroll = "overflow-x:auto;overflow-y:hidden"
    return (
        f'<figure class="gg" style="margin:0"><div style="{scroll}" tabindex="0">{markup}</div>'
        f'<figcaption aria-live="polite" style="line-height:1.5">{html.escape(words)}</figcaption></figure>'
    )


def _values(name: str, choice: Choice, chosen: dict[str, Any]) -> list[Any]:
    """A choice's values, given the choices made before it."""
    if callable(choice):
        wanted = inspect.signature(choice).parameters
        if missing := set(wanted) - set(chosen):
            raise ValueError(f"choice '{name}' depends on {sorted(missing)}, which must come before it")
        choice = choice(**{key: chosen[key] for key in wanted})
    values = list(choice)
    if not values:
        raise ValueError(f"choice '{name}' is empty: give it at least one value")
    try:
        if len(set(values)) < len(values):
            raise ValueError(f"choice '{name}' repeats a value: {values}")
    except TypeError:
        raise ValueError(f"choice '{name}' has unhashable values: use numbers, strings or tuples") from None
    return values


def _combinations(choices: dict[str, Choice]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}]
    for name, choice in choices.items():
        found = [{**chosen, name: value} for chosen in found for value in _values(name, choice, chosen)]
        if len(found) > 100 * MAX_FRAMES:  # enough to refuse; listing millions would only hang
            break
    return found


def _control(name: str, values: list[Any], start: dict[str, Any]) -> tuple[Any, Any]:
    """The control a reader moves, and the widget to show (the same one, or it with a Play button)."""
    label = name.replace("_", " ")
    options = [(str(value), value) for value in values]
    first = start.get(name, values[0])
    index = values.index(first) if first in values else 0
    layout = widgets.Layout(width="100%", max_width="500px")
    style = {"description_width": "140px"}
    kind = widgets.Dropdown if isinstance(values[0], str) else widgets.SelectionSlider
    control = kind(options=options, index=index, description=label, layout=layout, style=style)
    if name != "step" or len(values) == 1:
        return control, control
    play = widgets.Play(
        min=0, max=len(values) - 1, value=index, interval=700, layout=widgets.Layout(width="auto")
    )
    widgets.jslink((play, "value"), (control, "index"))
    row = widgets.Layout(flex_flow="row wrap", align_items="center")
    return control, widgets.HBox([play, control], layout=row)


def _in_browser(pictures: dict[tuple, str], choices: dict[str, Choice], start: dict[str, Any]) -> Explorer:
    shared: dict[str, Any] = {}
    shown: list[Any] = []
    for name, choice in choices.items():
        if not callable(choice):
            shared[name], widget = _control(name, _values(name, choice, {}), start)
            shown.append(widget)

    # One layout and one style for all pictures: they are part of the saved page.
    layout, look = widgets.Layout(width="100%"), widgets.HTML().style

    def build(chosen: dict[str, Any], names: list[str]) -> Any:
        if not names:
            return widgets.HTML(pictures[tuple(chosen.values())], layout=layout, style=look)
        name, *rest = names
        values = _values(name, choices[name], chosen)
        stack = widgets.Stack([build({**chosen, name: value}, rest) for value in values])
        if name in shared:
            control, above = shared[name], []
        else:  # its values depend on earlier choices: each combination has a control of its own
            control, widget = _control(name, values, start)
            above = [widget]
        stack.selected_index = control.index
        widgets.jslink((control, "index"), (stack, "selected_index"))
        return widgets.VBox([*above, stack]) if above else stack

    return Explorer([*shown, build({}, list(choices))])


def _through_kernel(draw: Draw, caption: Caption, choices: dict[str, Choice], start: dict[str, Any]) -> Explorer:
    """The same explorer for ipywidgets 7: a moved control asks the kernel for its picture."""
    shown = widgets.HTML()
    box = Explorer([])
    controls: dict[str, Any] = {}

    def rebuild(changed: str | None) -> None:
        chosen: dict[str, Any] = {}
        rows = []
        for name, choice in choices.items():
            values = _values(name, choice, chosen)
            known = controls.get(name)
            if known is None or [value for _, value in known[0].options] != values:
                known = controls[name] = _control(name, values, start)
                known[0].observe(lambda _, name=name: rebuild(name), "value")
            chosen[name] = known[0].value
            rows.append(known[1])
        shown.value = picture(draw, caption, chosen)
        if changed is None or box.children != (*rows, shown):
            box.children = (*rows, shown)

    rebuild(None)
    return box
