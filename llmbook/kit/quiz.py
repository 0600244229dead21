"""A question in the page: choose, and the page answers, with no kernel behind it."""

import html

import ipywidgets as widgets


class Quiz(widgets.VBox):
    """What `quiz` returns; its repr is the question, for viewers without widgets."""

    summary = ""

    def __repr__(self) -> str:
        return self.summary


def quiz(question: str, feedback: dict[str, str]) -> Quiz:
    """Ask before showing: a reader who predicted remembers.

    Args:
        question: one sentence.
        feedback: choice → what to say to a reader who chose it (why it is right, or what it overlooks).

    Raises:
        ValueError: fewer than two choices, or a choice without feedback.
    """
    if len(feedback) < 2:
        raise ValueError(f"a quiz needs at least two choices; {question!r} has {len(feedback)}")
    if silent := [choice for choice, words in feedback.items() if not words.strip()]:
        raise ValueError(f"every choice needs feedback; {silent[0]!r} has none")
    layout = widgets.Layout(width="100%")
    asked = widgets.HTML(f"<strong>{html.escape(question)}</strong>", layout=layout)
    buttons = widgets.RadioButtons(options=list(feedback), index=None, layout=layout)
    answers = [f'<p aria-live="polite"><em>{html.escape(words)}</em></p>' for words in feedback.values()]
    if hasattr(widgets, "Stack"):
        answer = widgets.Stack([widgets.HTML(words, layout=layout) for words in answers], selected_index=None)
        widgets.jslink((buttons, "index"), (answer, "selected_index"))
    else:  # ipywidgets 7: through the kernel
        answer = widgets.HTML(layout=layout)
        buttons.observe(lambda change: setattr(answer, "value", answers[change["new"]]), "index")
    box = Quiz([asked, buttons, answer])
    box.summary = f"Quiz: {question} ({' / '.join(feedback)})"
    return box
