"""From logits to one number: shift, flatten, log-softmax, and the mean over the tokens that count."""

import torch

Tensor = torch.Tensor


def shifted(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Position t's target is token t + 1; the last has none. [B, S] → [B, S]."""
    return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """The mean of −log p[target] over the targets that are not ignored.

    Args:
        logits: [N, V], floating point. targets: [N], int64, in [0, V).

    Returns: a scalar; NaN if every target is ignored, as F.cross_entropy gives.

    Raises:
        ValueError: shapes that do not match, or a target out of range.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            "logits [N, V] need targets [N], but these are "
            f"{list(logits.shape)} and {list(targets.shape)}"
        )
    counted = targets != ignore_index
    at = torch.where(counted, targets, 0)
    log_p = logits.log_softmax(-1)
    try:
        picked = log_p.gather(1, at[:, None])[:, 0]
    except (IndexError, RuntimeError) as error:  # looked at only now: a check costs
        outside = at[(at < 0) | (at >= logits.shape[1])]
        if not len(outside):
            raise
        raise ValueError(
            f"label {outside[0].item()} is neither in [0, {logits.shape[1]}) nor "
            f"the ignored {ignore_index}"
        ) from error
    return -(picked * counted).sum() / counted.sum()


def next_token_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """What training minimises. logits: [B, S, V]; labels: [B, S], the input ids
    with `ignore_index` at the padding.

    Raises:
        ValueError: as `cross_entropy`, or B and S that differ.
    """
    if logits.shape[:-1] != labels.shape or labels.dim() != 2:
        raise ValueError(
            "logits [B, S, V] need labels [B, S], but these are "
            f"{list(logits.shape)} and {list(labels.shape)}"
        )
    targets = shifted(labels, ignore_index)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index)
