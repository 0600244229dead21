"""The two losses as negative log-likelihoods, in nats, constants and all, and what they refuse to compute."""

from math import log, pi

import torch

Tensor = torch.Tensor


def check_pair(prediction: Tensor, target: Tensor) -> None:
    """Refuse two shapes that differ, also where they would broadcast.

    Raises:
        ValueError: says both shapes, and what broadcasting would make of them.
    """
    if prediction.shape == target.shape:
        return
    shapes = f"prediction {list(prediction.shape)} and target {list(target.shape)}"
    try:
        wide = list(torch.broadcast_shapes(prediction.shape, target.shape))
    except RuntimeError:
        raise ValueError(f"{shapes} do not match: give both one shape") from None
    raise ValueError(
        f"{shapes} would broadcast to {wide}, which pairs predictions with "
        "targets of other examples: give both one shape"
    )


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """(prediction − target)², element by element; its mean is the MSE.

    Raises:
        ValueError: the shapes differ, even where they would broadcast.
    """
    check_pair(prediction, target)
    return (prediction - target).square()


def gaussian_nll(
    mean: Tensor, target: Tensor, variance: Tensor | float
) -> Tensor:
    """−ln N(target; mean, variance): ½ (error²/σ² + ln σ² + ln 2π).

    Args:
        mean, target: [...], one shape.
        variance: σ² > 0; one for all, or one each in mean's shape.

    Returns: [...], nats; of a density, so it may be negative.

    Raises:
        ValueError: shapes that differ, or a variance that is not positive.
    """
    error = squared_error(mean, target)
    spread = torch.as_tensor(variance, dtype=mean.dtype, device=mean.device)
    if spread.ndim:
        check_pair(mean, spread)
    if not (spread > 0).all():
        raise ValueError(
            f"a variance must be positive, but one is {spread.min():g}: "
            "let the network predict its logarithm"
        )
    return 0.5 * (error / spread + spread.log() + log(2 * pi))


def as_target(labels: Tensor, classes: int) -> Tensor:
    """Labels as one distribution over the classes per example.

    Args:
        labels: integer ids [...], or distributions [..., classes].
        classes: V.

    Returns: [..., V], float; ids become one-hot rows.

    Raises:
        ValueError: an id outside 0 … V−1, or a row that is no distribution.
    """
    if not labels.is_floating_point():
        if labels.numel() and not 0 <= labels.min() <= labels.max() < classes:
            at = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(
                f"label {int(at)} is outside 0 … {classes - 1}: "
                "drop masked positions before the loss"
            )
        hot = torch.nn.functional.one_hot(labels.long(), classes)
        return hot.to(torch.get_default_dtype())
    if labels.ndim == 0 or labels.shape[-1] != classes:
        raise ValueError(
            f"target rows {list(labels.shape)} should end in {classes} "
            "classes; class ids should be integers"
        )
    close = (labels.sum(-1) - 1).abs() <= 1e-5  # false for NaN
    if not (labels >= 0).all() or not close.all():
        raise ValueError(
            "a target row must be non-negative and sum to 1; independent "
            "yes-or-no labels want one sigmoid each"
        )
    return labels


def categorical_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """−Σ y ln softmax(logits): for an id, logsumexp(z) − z_label.

    Args:
        logits: z, [..., V], any real numbers.
        labels: ids [...] or distributions [..., V].

    Returns: [...], nats; never negative for an id.

    Raises:
        ValueError: as `as_target`, or labels of other examples' shape.
    """
    target = as_target(labels, logits.shape[-1]).to(logits)
    check_pair(logits, target)
    log_p = logits.log_softmax(-1)
    # A class of probability 0 costs nothing, also where ln p is −inf.
    return -torch.where(target == 0, 0, target * log_p).sum(-1)
