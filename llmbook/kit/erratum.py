"""Counter-examples that run: each is shown in its chapter and collected in the book's errata page."""

import html
from dataclasses import asdict, dataclass
from typing import Any

MIME = "application/vnd.llmbook.erratum+json"
VERDICTS = {"wrong": "Wrong", "loose": "Loosely stated", "right": "Holds"}


@dataclass(frozen=True)
class Erratum:
    """A claim of the notes, the verdict that the cell's own run gives, and the statement that holds."""

    section: str
    claim: str
    verdict: str
    holds: str
    shown: str

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        parts = {key: html.escape(value) for key, value in asdict(self).items()}
        title = f"{VERDICTS[self.verdict]} (notes {parts['section']})"
        page = (
            f'<div class="admonition {"tip" if self.verdict == "right" else "warning"}">'
            f'<p class="admonition-title">{title}</p><p><em>Claim:</em> {parts["claim"]}</p>'
            f"<p><em>This run:</em> {parts['shown']}</p><p><em>What holds:</em> {parts['holds']}</p></div>"
        )
        words = f"{title}\nClaim: {self.claim}\nThis run: {self.shown}\nWhat holds: {self.holds}"
        return {"text/plain": words, "text/html": page, MIME: asdict(self)}


def erratum(section: str, claim: str, verdict: str, proof: Any, *, shown: str, holds: str) -> Erratum:
    """State what became of a claim, on the strength of a condition that was just computed.

    Args:
        section: the notes' own numbering, "§1.7".
        claim: the claim in the book's words.
        verdict: "wrong", "loose" or "right".
        proof: the computed condition that bears the verdict out; a false one is an error, not a verdict.
        shown: what the run showed, with its numbers.
        holds: the statement that is true.

    Raises:
        AssertionError: `proof` is false: the verdict is not borne out.
        ValueError: an unknown verdict.
    """
    if verdict not in VERDICTS:
        raise ValueError(f"a verdict is one of {sorted(VERDICTS)}, not {verdict!r}")
    assert bool(proof), f"the run does not bear out the verdict {verdict!r} on: {claim}"
    return Erratum(section, claim, verdict, holds, shown)
