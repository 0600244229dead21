"""Runs that the pictures are drawn from: a sentence's tensors, a real block's sizes, a training step's memory."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .flop import forward_flop
from .llama import PUBLISHED, Attend, Config, Llama, every_tensor, fused
from .loss import next_token_loss
from .tracer import Op, Spec, Tracer

Tensor = torch.Tensor
WORDS = ("<pad>", "the", "cat", "sat", "on", "mat", "a", "dog", "ran", "home", "to", ".")
SENTENCES = ("the cat sat on the mat", "a dog ran home <pad> <pad>")
IGNORED = -100
ATTENDS: dict[str, Attend] = {"every tensor": every_tensor, "fused": fused}


def batch() -> tuple[Tensor, Tensor]:
    """The two sentences as ids, [2, 6], and their labels: the same ids, with the padding ignored."""
    ids = torch.tensor([[WORDS.index(word) for word in words.split()] for words in SENTENCES])
    return ids, torch.where(ids == 0, IGNORED, ids)


@dataclass(frozen=True)
class Stop:
    """One tensor on the way.

    Attributes:
        title, formula: what it is.
        stage: the part of the model that it belongs to.
        op: the operation that made it; None for the input.
        spec, value: the tensor.
        flop: spent since the stop before it.
    """

    title: str
    formula: str
    stage: str
    op: Op | None
    spec: Spec
    value: Tensor
    flop: int


# title, formula, stage, the module's last words, the operation ("" for the module's last one)
ROUTE = (
    ("x, embedded", "x = E[ids]", "embed", "embed_tokens", "embedding"),
    ("x, normalised", "n = RMSNorm(x)", "norm", "input_layernorm", ""),
    ("Q, before the split", "Q = n·W_Q", "Q K V", "q_proj", "mm"),
    ("Q, split into heads", "Q[b, s] cut into H pieces of d_h", "Q K V", "self_attn", "transpose"),
    ("Q, rotated", "its position marked (RoPE)", "Q K V", "self_attn", "add"),
    ("K, before the split", "K = n·W_K", "Q K V", "k_proj", "mm"),
    ("K, rotated", "split and rotated like Q", "Q K V", "self_attn", "add"),
    ("V, before the split", "V = n·W_V", "Q K V", "v_proj", "mm"),
    ("S, scores", "S = Q·Kᵀ / √d_h", "scores", "self_attn", "div"),
    ("S, masked", "no token looks ahead: −∞", "scores", "self_attn", "masked_fill"),
    ("P, attention weights", "P = softmax(S), row by row", "softmax", "self_attn", "_softmax"),
    ("O, a mean of values", "O = P·V", "O", "self_attn", "bmm"),
    ("O, heads side by side", "merged back to a width of D", "O", "self_attn", "clone"),
    ("attention's answer", "O·W_O", "O", "o_proj", "mm"),
    ("x, after attention", "x ← x + O·W_O", "+", "layers.0", "add"),
    ("x, normalised again", "n = RMSNorm(x)", "FFN", "post_attention_layernorm", ""),
    ("gate", "g = n·W_gate", "FFN", "gate_proj", "mm"),
    ("gate, through SiLU", "g·σ(g)", "FFN", "act_fn", "silu"),
    ("up", "u = n·W_up", "FFN", "up_proj", "mm"),
    ("gate times up", "SiLU(g)∘u", "FFN", "mlp", "mul"),
    ("feed-forward's answer", "(SiLU(g)∘u)·W_down", "FFN", "down_proj", "mm"),
    ("x, after the block", "x ← x + feed-forward", "+ ", "layers.0", "add"),
    ("x, normalised at the end", "h = RMSNorm(x)", "head", "model.norm", ""),
    ("logits", "h·W_out, a score per word", "head", "lm_head", "mm"),
    ("logits, flattened", "a row per token: [B·S, V]", "loss", "(outside)", "view"),
    ("log-probabilities", "log p = log softmax(logits)", "loss", "(outside)", "_log_softmax"),
    ("what the next words got", "log p[token t + 1]", "loss", "(outside)", "gather"),
    ("the loss", "−mean over the tokens that count", "loss", "(outside)", "div"),
)
STAGES = ("ids", *dict.fromkeys(stage for _, _, stage, _, _ in ROUTE))


def stops(ops: Sequence[Op], route: Sequence[tuple[str, ...]]) -> list[int]:
    """Where in a log the route's operations are, each after the one before it."""
    found, at = [], 0
    for _, _, _, module, name in route:
        while not ops[at].module.endswith(module) or name not in ("", ops[at].name.removeprefix("aten.")):
            at += 1
        while not name and ops[at + 1].module == ops[at].module:
            at += 1
        found.append(at)
        at += 1
    return found


@functools.cache
def sentence(heads: int) -> list[Stop]:
    """The two sentences on their way through one small block of that many heads, D = 16, to their loss."""
    torch.manual_seed(4)
    model, (ids, labels) = Llama(Config(len(WORDS), 16, 1, heads, heads, 24)), batch()
    with Tracer(model, keep=lambda t: t.detach().clone()) as log:
        next_token_loss(model(ids), labels, IGNORED)
    walk = [Stop("token ids", "each word's number in the vocabulary", "ids", None, log.calls[0].inputs[0], ids, 0)]
    last = -1
    for at, (title, formula, stage, _, _) in zip(stops(log.ops, ROUTE), ROUTE, strict=True):
        op = log.ops[at]
        spent = sum(one.flop for one in log.ops[last + 1 : at + 1])
        value, spec = op.kept, op.outputs[0]
        if op.name == "aten.mm":  # a linear layer multiplies [B·S, D], and views the result as [B, S, …]
            value, spec = log.ops[at + 1].kept, log.ops[at + 1].outputs[0]
        walk.append(Stop(title, formula, stage, op, spec, value, spent))
        last = at
    return walk


LARGE = tuple(ROUTE[i] for i in (0, 4, 8, 10, 12, 19, 23, 25, 27))


@dataclass(frozen=True)
class Size:
    """One tensor at real sizes: its shape and bytes, FLOPs since the one before, bytes held once it exists."""

    title: str
    spec: Spec
    flop: int
    held: int


@functools.cache
def real_block(B: int, S: int, D: int, heads: int, V: int) -> list[Size]:
    """One block and the LM head in bfloat16 on the meta device, which computes shapes only; the loss in float32."""
    with torch.device("meta"):
        model = Llama(Config(V, D, 1, heads, heads, 7 * D // 2)).bfloat16()
        ids = torch.zeros(B, S, dtype=torch.int64)
    with Tracer(model) as log:
        next_token_loss(model(ids).float(), ids)
    found, last = [], -1
    for at, (title, *_) in zip(stops(log.ops, LARGE), LARGE, strict=True):
        op = log.ops[at]
        spec = log.ops[at + 1].outputs[0] if op.name == "aten.mm" else op.outputs[0]
        found.append(Size(title, spec, sum(one.flop for one in log.ops[last + 1 : at + 1]), op.held))
        last = at
    return found


@functools.cache
def matmul_parameters(name: str) -> int:
    """Parameters that multiply something: all but the embedding, whose rows are only copied."""
    with torch.device("meta"):
        model = Llama(PUBLISHED[name])
    return sum(p.numel() for key, p in model.named_parameters() if "embed" not in key)


def flop_per_token(name: str, S: int) -> dict[str, float]:
    """Forward FLOPs per token of a published model on a sequence of S tokens, by where they go."""
    return {part: flop / S for part, flop in forward_flop(PUBLISHED[name], 1, S).items()}


@functools.cache
def step_memory(attend: str, gradients: bool, S: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Bytes held after every operation of one small model's step.

    Returns: those of the forward pass and loss, those of the backward pass (without
    `gradients` empty), and the bytes of its parameters.
    """
    torch.manual_seed(0)
    c = Config(vocab=512, dim=64, layers=3, heads=4, kv_heads=4, ffn=160)
    model, ids = Llama(c, ATTENDS[attend]), torch.randint(512, (2, S))
    with torch.set_grad_enabled(gradients), Tracer(model) as log:
        loss = next_token_loss(model(ids), ids)
        forward = len(log.ops)
        if gradients:
            loss.backward()
    held = tuple(op.held for op in log.ops)
    return held[:forward], held[forward:], sum(p.numel() * p.element_size() for p in model.parameters())


def largest(sizes: Sequence[Size]) -> Any:
    """The tensor with the most bytes, the first of equals."""
    return max(sizes, key=lambda one: one.spec.bytes)
