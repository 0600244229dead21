"""What the llama chapter times on a GPU: a step of training, and a step of decoding, against Hugging Face's Llama."""

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from llmbook.kit.measure import Case, relative_error

from .config import Config, to_hugging_face
from .counts import forward_flop, kv_bytes, parameters, training_flop
from .model import Llama

# A hundredth of an 8B: its layers' shapes, fewer of them and half as wide.
CONFIG = Config(32_000, 2048, 8, 16, 4, 7168, 5e5, context=4096)


def cases() -> Iterator[Case]:
    """Training at 2 × 2,048 tokens; decoding 1, 16 and 64 sequences that hold 2,048 each."""
    torch.manual_seed(0)
    ours = Llama(CONFIG).to("cuda", torch.bfloat16)
    theirs = hugging_faces(ours)
    yield training(ours, theirs, 2, 2048)
    for batch in (1, 16, 64):
        yield decoding(ours, theirs, batch, 2048)


def hugging_faces(ours: Llama) -> Any:
    """Their model with our weights, on our device."""
    library: Any = import_module("transformers")  # a peer only: a bare GPU machine may lack it
    weight = ours.model.norm.weight
    theirs: Any = library.LlamaForCausalLM(library.LlamaConfig(**to_hugging_face(ours.config)))
    theirs = theirs.to(weight.device, weight.dtype)
    theirs.load_state_dict(ours.state_dict())
    # Their frequencies are a float32 buffer that the conversion has rounded.
    decoder: Any = ours.model
    theirs.model.rotary_emb.inv_freq = decoder.layers[0].self_attn.theta.float()
    return theirs


def gradient(call: Callable[[Tensor], Tensor], ids: Tensor) -> Callable[[], Tensor]:
    """One forward and backward; gives the logits."""

    def step() -> Tensor:
        logits = call(ids)
        nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        return logits.detach()

    return step


def training(ours: Llama, theirs: Any, batch: int, tokens: int) -> Case:
    """Forward and backward of one batch, in tokens whose number `sizes` has."""
    c, device = ours.config, ours.model.norm.weight.device
    ids = torch.randint(c.vocab, (batch, tokens), device=device)
    with torch.no_grad():
        reference = theirs(ids).logits
    compiled = cache(lambda: torch.compile(theirs))  # only where it is timed
    moved = 2 * 3 * parameters(c)  # weights are read twice, gradients written; activations not counted
    return Case(
        "training step", {"batch": batch, "tokens": tokens, "dtype": "bf16"}, gradient(ours, ids),
        lambda out: (relative_error(out, reference), 3e-2), training_flop(c, batch, tokens), moved,
        {
            "Hugging Face, eager": gradient(lambda i: theirs(i).logits, ids),
            "Hugging Face, compiled": gradient(lambda i: compiled()(i).logits, ids),
        },
    )


def decoding(ours: Llama, theirs: Any, batch: int, held: int) -> Case:
    """One new token for each sequence; every call begins from the same cache."""
    c, device = ours.config, ours.model.norm.weight.device
    ids = torch.randint(c.vocab, (batch, held + 1), device=device)
    held_by_us, past = ours.cache(batch, held + 1), import_module("transformers").DynamicCache()
    with torch.no_grad():
        for row in range(batch):  # a prefill of all at once would not fit
            counts = torch.zeros(batch, dtype=torch.int64, device=device)
            counts[row] = held
            ours.model(ids[:, :held], held_by_us, counts)
        for layer in range(c.layers):
            past.update(held_by_us.k[layer, :, :, :held], held_by_us.v[layer, :, :, :held], layer)

    @torch.no_grad()
    def step() -> Tensor:
        held_by_us.lengths.fill_(held)
        return ours(ids[:, held:], held_by_us)

    @torch.no_grad()
    def their_step() -> Tensor:
        logits = theirs(ids[:, held:], past_key_values=past, use_cache=True).logits
        past.crop(-1)
        return logits

    moved = 2 * parameters(c) + kv_bytes(c, batch * held)
    return Case(
        "decode step", {"batch": batch, "held": held, "dtype": "bf16"}, step,
        lambda out: (relative_error(out, their_step()), 3e-2), forward_flop(c, batch, 1, held), moved,
        {"Hugging Face, eager": their_step},
    )
