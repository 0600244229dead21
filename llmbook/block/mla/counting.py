"""The two forms run and counted operation by operation."""

from typing import NamedTuple

import torch
from torch import nn

from llmbook.foundations.tokens_to_logits.tracer import Tracer

from .attention import attend_absorbed, attend_rebuilt
from .cost import FORMS
from .sizes import Sizes


class Counted(NamedTuple):
    """FLOPs, and bytes that the matrix products read and write, scores apart."""

    flop: int
    bytes: int


def count(s: Sizes, form: str, queries: int, keys: int, batch: int = 1) -> Counted:
    """Run one form in float64 on random numbers under the shape tracer.

    Raises:
        ValueError: a form that attends to something else than latent rows.
    """
    if form not in FORMS[:2]:
        raise ValueError(f"the form is one of {FORMS[:2]}, not {form!r}")
    attend = attend_absorbed if form == "absorbed" else attend_rebuilt
    q, q_r = (
        torch.randn(batch, s.heads, queries, n, dtype=torch.float64)
        for n in (s.nope, s.rope)
    )
    rows = torch.randn(batch, keys, s.row, dtype=torch.float64)
    up = torch.randn(s.heads, s.nope + s.v, s.latent, dtype=torch.float64)
    seen = torch.ones(batch, queries, keys, dtype=torch.bool)
    with Tracer(nn.Identity()) as log:
        attend(q, q_r, rows, up, 1.0, seen)
    products = [op for op in log.ops if op.flop]
    through = sum(spec.bytes for op in products for spec in (*op.inputs, *op.outputs))
    # Written twice, for both parts of the key, and read as probabilities.
    return Counted(log.flop, through - 3 * 8 * batch * s.heads * queries * keys)
