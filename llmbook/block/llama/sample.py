"""From logits to tokens: greedy, by temperature, from the nucleus (Holtzman et al. 2020, arXiv 1904.09751)."""

import math

import torch
from torch import Tensor

from llmbook.block.attention_and_kv_cache.cache import Cache

from .model import Llama


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens whose probabilities reach top_p.

    Args:
        p: [..., V], probabilities.
        top_p: above 0, at most 1. At least one token stays.

    Returns:
        Which tokens are in it, [..., V], bool.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    falling, token = p.sort(dim=-1, descending=True, stable=True)
    before = falling.cumsum(-1) - falling  # what likelier tokens sum to
    kept = (before < top_p) & (falling > 0)
    return torch.zeros_like(kept).scatter(-1, token, kept)


def distribution(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """The probabilities that the next token is drawn from.

    Args:
        logits: [..., V]; −∞ forbids a token.
        temperature: divides the logits; 0 puts everything on the largest.

    Returns:
        [..., V], float64, each row's sum is 1.

    Raises:
        ValueError: NaN or +∞ among the logits, a row of −∞, a temperature
            below 0 or not finite, a top_p outside (0, 1].
    """
    refuse_logits(logits)
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    wide = logits.double()
    if temperature == 0:
        best = wide.argmax(-1, keepdim=True)
        return torch.zeros_like(wide).scatter(-1, best, 1.0)
    # The largest becomes 0 first: a tiny temperature overflows nothing.
    p = ((wide - wide.amax(-1, keepdim=True)) / temperature).softmax(-1)
    p = p.where(nucleus(p, top_p), 0)
    return p / p.sum(-1, keepdim=True)


def refuse_logits(logits: Tensor) -> None:
    """Refuse rows that no distribution follows from."""
    highest = logits.amax(-1)  # NaN if a row has one
    if not highest.isfinite().all():
        row = int((~highest.isfinite()).flatten().nonzero()[0])
        raise ValueError(
            f"the logits of row {row} have {highest.flatten()[row].item()} as their largest: "
            "nothing can be drawn from them; look for an overflow in the model"
        )


@torch.no_grad()
def generate(
    model: Llama, prompt: Tensor, new: int, *, temperature: float = 0.0,
    top_p: float = 1.0, generator: torch.Generator | None = None,
    counts: Tensor | None = None, cache: Cache | None = None,
) -> Tensor:
    """Write `new` tokens after each prompt: one prefill, then a token a step.

    Args:
        prompt: [B, S], int64. counts: [B], real tokens of each row, if
            prompts differ in length; what stands behind them is ignored.
        temperature, top_p: as in `distribution`; greedy if not given.
        cache: an empty one to fill, on pages say; by default a static one.

    Returns:
        The new tokens, [B, new].

    Raises:
        ValueError: an empty prompt, or more tokens than the context has.
    """
    counts = refuse_prompt(model, prompt, new, counts)
    B = len(prompt)
    cache = model.cache(B, int(counts.max()) + new) if cache is None else cache
    logits = model(prompt, cache, counts)
    last = logits[torch.arange(B, device=logits.device), counts - 1]
    tokens: list[Tensor] = []
    while len(tokens) < new:
        p = distribution(last, temperature, top_p)
        tokens.append(torch.multinomial(p, 1, generator=generator))
        if len(tokens) < new:
            last = model(tokens[-1], cache)[:, -1]
    return torch.cat(tokens, 1) if tokens else prompt[:, :0]


def refuse_prompt(model: Llama, prompt: Tensor, new: int, counts: Tensor | None) -> Tensor:
    """Refuse what cannot be continued; the number of real tokens per row."""
    if prompt.dim() != 2 or not prompt.numel():
        raise ValueError(f"a prompt must be [B, S] with at least one token, not {list(prompt.shape)}: begin with BOS")
    if counts is None:
        counts = torch.full((len(prompt),), prompt.shape[1], device=prompt.device)
    if int(counts.min()) < 1:
        raise ValueError(f"prompt {int(counts.argmin())} has no token: begin with BOS")
    longest, context = int(counts.max()), model.config.context
    if new < 0 or longest + max(new - 1, 0) > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones do not fit a context of {context}: "
            "shorten the prompt, or ask for fewer"
        )
    return counts
