"""Checkers for the chapter's exercises."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmbook.kit.exercise import exercise, expect

from .by_axes import layer_norm_backward
from .rms import rms_norm, rms_norm_backward

ROWS, WIDTH = 8192, 4096


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-11)


@exercise
def bytes_of_a_residual(answer: tuple[int, int]) -> str:
    """Bytes of residual add and RMSNorm in bf16, [8192, 4096]: in two operations, and fused. No gain, no r."""
    expect(isinstance(answer, tuple) and len(answer) == 2, "answer with two numbers: (two operations, fused).")
    tensor = ROWS * WIDTH * 2
    passes = tuple(number / tensor for number in answer)
    expect(passes != (2.5, 2), "those are elements; an element in bf16 has 2 bytes.")
    expect(passes[1] != 5, "fused, the sum is still in registers when it is normed: nobody reads it back.")
    expect(
        passes[1] != 3, "fused, the sum must still be written once: the next residual connection needs it."
    )
    expect(passes[0] != 4, "in two operations the norm reads back the sum that the addition wrote.")
    told = f"in tensors of {tensor:,} bytes you count {passes[0]:g} and {passes[1]:g}; list each read and write."
    expect(passes == (5, 4), told)
    return "5 tensors against 4: fusing saves a fifth of the bytes, and so about a fifth of the time."


@exercise
def layer_from_rms(answer: Callable[..., Tensor]) -> str:
    """answer(rms_backward, grad, x, weight): LayerNorm's dx, by calling RMSNorm's backward once."""
    grad, x, weight = randn(5, 7), 3 + randn(5, 7, seed=1), randn(7, seed=2)
    calls = []

    def rms_backward(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        calls.append(1)
        return rms_norm_backward(grad, x, weight, 1e-5)[0]

    mine = answer(rms_backward, grad, x, weight)
    expect(isinstance(mine, torch.Tensor), f"return a tensor, not {type(mine).__name__}.")
    expect(len(calls) == 1, f"call rms_backward once; you called it {len(calls)} times.")

    def centred(t: Tensor) -> Tensor:
        return t - t.mean(-1, keepdim=True)

    raw = rms_norm_backward(grad, x, weight, 1e-5)[0]
    inner = rms_norm_backward(grad, centred(x), weight, 1e-5)[0]
    expect(not close(mine, raw), "that is RMSNorm's own gradient: nothing was centred.")
    expect(not close(mine, inner), "x was centred, its gradient was not: centring is a step of the forward pass too.")
    expect(not close(mine, centred(raw)), "the gradient was centred, but RMSNorm was given x with its mean.")
    right = layer_norm_backward(grad, x, weight, 1e-5)[0]
    expect(close(mine, right), f"off by up to {float((mine - right).abs().max()):.2g} from LayerNorm's dx.")
    return "LayerNorm is centring, then RMSNorm; backward applies the same projection after RMSNorm's."


@exercise
def running_statistics(answer: Callable[..., tuple[Tensor, Tensor]]) -> str:
    """answer(mean, variance, batch, momentum): what torch's BatchNorm1d keeps after one training step."""
    norm = torch.nn.BatchNorm1d(3, momentum=0.3, dtype=torch.float64)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for step in range(3):
        batch = 2 + 3 * randn(4, 3, seed=step)
        old = mean, variance
        norm(batch)
        mean, variance = answer(mean.clone(), variance.clone(), batch.clone(), 0.3)
        expect(mean.shape == variance.shape == (3,), "return a mean and a variance, [3] each.")
        for name, mine, right in (("mean", mean, norm.running_mean), ("variance", variance, norm.running_var)):
            assert isinstance(right, torch.Tensor)
            biased = old[1].lerp(batch.var(0, correction=0), 0.3)
            expect(
                name == "mean" or not close(mine, biased),
                "the variance is Σ/n; torch keeps the unbiased Σ/(n−1), although it divides the batch by Σ/n's root.",
            )
            swapped = (batch.mean(0) if name == "mean" else batch.var(0)).lerp(old[name == "variance"], 0.3)
            expect(not close(mine, swapped), "momentum is the weight of the new batch here, not of the old value.")
            off = float((mine - right).abs().max())
            expect(close(mine, right), f"after step {step + 1} the {name} is off by {off:.2g} from torch's.")
    return "old·(1 − momentum) + new·momentum, with the unbiased variance."


@exercise
def fold_the_gain(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """answer(gain, weight): a weight [out, in] that after a norm without gain gives what weight gave after gain."""
    gain, weight, x = randn(6), randn(4, 6, seed=1), randn(5, 6, seed=2)
    mine = answer(gain.clone(), weight.clone())
    expect(isinstance(mine, torch.Tensor), f"return a tensor, not {type(mine).__name__}.")
    expect(mine.shape == weight.shape, f"the shape must stay {list(weight.shape)}, not {list(mine.shape)}.")
    expect(not close(mine, weight), "the weight is as it was.")
    expect(not close(mine, weight / gain), "that undoes the gain a second time: multiply.")
    off = float((rms_norm(x, None) @ mine.T - rms_norm(x, gain) @ weight.T).abs().max())
    expect(
        math.isfinite(off) and off < 1e-12,
        f"the outputs differ by up to {off:.2g}: feature i of the input meets column i of the weight.",
    )
    return "column i times gain i. A BatchNorm's statistics fold away too, but only those of inference."
