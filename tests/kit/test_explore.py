"""Explorers and quizzes: every picture drawn, every control linked, every error a sentence."""

import re

import ipywidgets as widgets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbook.kit import draw
from llmbook.kit.explore import explore, picture
from llmbook.kit.quiz import quiz
from llmbook.kit.style import plot, text_on

needs_stack = pytest.mark.skipif(
    not hasattr(widgets, "Stack"),
    reason="ipywidgets 7 has no Stack: explorers and quizzes answer through the kernel there, tested below",
)


def dot(**chosen):
    return draw.canvas(50, 50, draw.text(0, 20, " ".join(map(str, chosen.values())) or "still"))


def say(**chosen):
    return f"shows {chosen}"


def walk(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


def shown(widget):
    """The pictures a reader sees: what html-manager mounts."""
    if isinstance(widget, widgets.HTML):
        return [widget.value]
    children = widget.children if hasattr(widget, "children") else ()
    if isinstance(widget, widgets.Stack):
        children = () if widget.selected_index is None else (children[widget.selected_index],)
    return [value for child in children for value in shown(child)]


@needs_stack
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_every_combination_is_reachable_and_right(a, b, data):
    explorer = explore(dot, say, first=range(a), second=[f"v{i}" for i in range(b)])
    controls = [w for w in walk(explorer) if isinstance(w, widgets.SelectionSlider | widgets.Dropdown)]
    stacks = [w for w in walk(explorer) if isinstance(w, widgets.Stack)]
    assert len(controls) == 2
    assert len(stacks) == 1 + a
    i, j = data.draw(st.integers(0, a - 1)), data.draw(st.integers(0, b - 1))
    stacks[0].selected_index = i
    for stack in stacks[1:]:
        stack.selected_index = j
    assert f">{i} v{j}</text>" in shown(explorer)[0]


@needs_stack
def test_the_controls_are_linked_in_the_browser(monkeypatch):
    linked = set()
    monkeypatch.setattr(widgets, "jslink", lambda source, target: linked.add((source[0], target[0])))
    explorer = explore(dot, say, a=(1, 2), b=(1, 2, 3))
    slider_a, slider_b = [w for w in walk(explorer) if isinstance(w, widgets.SelectionSlider)]
    outer, *inner = [w for w in walk(explorer) if isinstance(w, widgets.Stack)]
    assert (slider_a, outer) in linked
    assert all((slider_b, stack) in linked for stack in inner)


@needs_stack
def test_start_and_dependent_choices():
    explorer = explore(dot, say, n=(2, 3), step=lambda n: range(n), start={"n": 3, "step": 2})
    assert ">3 2</text>" in shown(explorer)[0]
    assert sum(isinstance(w, widgets.Play) for w in walk(explorer)) == 2  # one per n: their lengths differ
    assert repr(explorer) == "Explorer(n × step: 5 pictures)"


@needs_stack
def test_no_choice_makes_a_still_picture():
    explorer = explore(dot, say)
    assert ">still</text>" in shown(explorer)[0]


def test_a_picture_carries_its_description_and_follows_the_theme():
    markup = picture(dot, lambda **_: "a < b & c's", {"x": 1})
    assert "aria-label='a &lt; b &amp; c&#x27;s'" in markup or 'aria-label="a &lt; b &amp; c&#x27;s"' in markup
    assert "<figcaption" in markup
    assert "currentColor" in markup


def test_a_matplotlib_figure_is_the_same_each_time_and_uses_the_pages_ink():
    def curve(x):
        with plot(3, 2) as (figure, axes):
            axes.plot([0, x], [1, 2])
            axes.set(title="a title")
        return figure

    once, twice = (picture(curve, lambda x: "curve", {"x": 3}) for _ in range(2))
    assert once == twice
    assert "currentColor" in once
    assert "#010203" not in once
    assert ">a title</text>" in once
    assert not re.search(r"<style", once), "matplotlib's rule for * would reach the whole page"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"a": []}, "choice 'a' is empty"),
        ({"a": [[1], [2]]}, "unhashable"),
        ({"a": [1, 1]}, "repeats"),
        ({"a": range(20), "b": range(20)}, "400 pictures are too many"),
        ({"a": range(10**5)}, "too many"),
        ({"a": lambda b: [b], "b": [1]}, "'a' depends on"),
    ],
)
def test_bad_choices_are_refused_in_a_sentence(choices, message):
    with pytest.raises(ValueError, match=message):
        explore(dot, say, **choices)


def test_a_start_that_names_no_choice_is_refused():
    with pytest.raises(ValueError, match="start names"):
        explore(dot, say, a=[1], start={"b": 1})


@needs_stack
def test_a_draw_that_raises_names_its_combination():
    def broken(a, b):
        return dot(a=1 / (a - b))

    with pytest.raises(RuntimeError, match=r"a=2, b=2: ZeroDivisionError"):
        explore(broken, say, a=(1, 2), b=(2, 3))


def test_a_draw_that_returns_something_else_is_refused():
    with pytest.raises(RuntimeError, match=r"svg.SVG or a matplotlib Figure, but draw returned str"):
        explore(lambda: "no", say)


@needs_stack
def test_too_many_bytes_are_refused():
    def heavy(a):
        return draw.canvas(9, 9, draw.text(0, 9, "x" * 300_000))

    with pytest.raises(ValueError, match="MB"):
        explore(heavy, say, a=range(8))


def test_without_stack_the_kernel_answers(monkeypatch):
    """ipywidgets 7 (Colab) has no Stack."""
    monkeypatch.delattr(widgets, "Stack", raising=False)
    explorer = explore(dot, say, n=(2, 3), step=lambda n: range(n), start={"n": 3})
    page = explorer.children[-1]
    assert ">3 0</text>" in page.value
    slider = next(w for w in walk(explorer) if isinstance(w, widgets.SelectionSlider) and w.description == "step")
    slider.value = 2
    assert ">3 2</text>" in page.value
    first = next(w for w in walk(explorer) if isinstance(w, widgets.SelectionSlider) and w.description == "n")
    first.value = 2
    assert ">2 " in page.value


@needs_stack
def test_a_quiz_answers_each_choice():
    asked = quiz("Which?", {"this": "Right, because.", "that": "No, since."})
    stack = asked.children[-1]
    assert shown(asked)[-1].startswith("<strong>")
    stack.selected_index = 1
    assert "No, since." in shown(asked)[-1]
    assert "Which?" in repr(asked)


def test_a_quiz_answers_through_the_kernel_without_stack(monkeypatch):
    monkeypatch.delattr(widgets, "Stack", raising=False)
    asked = quiz("Which?", {"this": "Right.", "that": "No."})
    asked.children[1].index = 1
    assert "No." in asked.children[-1].value


@pytest.mark.parametrize("feedback", [{"one": "x"}, {"one": "x", "two": " "}])
def test_a_quiz_without_alternatives_or_feedback_is_refused(feedback):
    with pytest.raises(ValueError, match=r"a quiz needs|every choice needs"):
        quiz("Which?", feedback)


@given(st.integers(0, 0xFFFFFF))
def test_text_on_a_fill_has_at_least_the_contrast_of_large_text(color):
    fill = f"#{color:06x}"
    ink = text_on(fill)

    def luminance(c):
        parts = [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(fill), luminance(ink)))
    assert (high + 0.05) / (low + 0.05) >= 4.5
