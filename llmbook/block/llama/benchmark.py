"""What the llama chapter times on a GPU: a step of training, and a step of decoding, against Hugging Face's Llama."""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmbook.kit.compare import exact_float32, half, need_same_shape, worst, worst_error
from llmbook.kit.kernels import DEVICE
from llmbook.kit.measure import Case, Work

from .config import Config, to_hugging_face
from .counts import forward_flop, kv_bytes, parameters, training_flop
from .model import Llama

# A hundredth of an 8B: its layers' shapes, fewer of them and half as wide.
CONFIG = Config(32_000, 2048, 8, 16, 4, 7168, 5e5, context=4096)
SMALL: dict[str, Any] = {
    "config": Config(40, 32, 3, 4, 2, 48, theta=500.0, context=64), "trained": ((2, 16),), "decoded": ((3, 16),),
}
COMPILED = (2, 2048)  # the batch and tokens that Hugging Face's model is compiled for
LOGITS, GRADIENTS = 3e-2, 0.1  # relative errors that half precision may make in so many layers


def cases(
    device: torch.device = DEVICE, config: Config = CONFIG, trained: Iterable[tuple[int, int]] = ((1, 1024), (2, 2048)),
    decoded: Iterable[tuple[int, int]] = ((1, 2048), (16, 2048), (64, 2048)), dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """Training at batch × tokens, decoding of a batch whose sequences hold so many each; bf16 where the GPU has it."""
    dtype = dtype or half(device)
    weights, c = parameters(config), config
    for batch, tokens in trained:
        # Weights are read twice, gradients written; activations are not counted as moved.
        kept = c.layers * (5 * c.heads * tokens**2 + tokens * (9 * c.dim + 4 * c.ffn)) + 4 * tokens * c.vocab
        yield Case(
            "training step", {"batch": batch, "tokens": tokens, "dtype": str(dtype)[6:]},
            partial(training, c, dtype, device, batch, tokens), training_flop(c, batch, tokens),
            3 * weights * dtype.itemsize,
            weights * (2 * dtype.itemsize + 8) + batch * kept * dtype.itemsize + 12 * batch * tokens * c.vocab,
        )
    for batch, held in decoded:
        cached = kv_bytes(c, batch * (held + 1), dtype.itemsize)
        yield Case(
            "decode step", {"batch": batch, "held": held, "dtype": str(dtype)[6:]},
            partial(decoding, c, dtype, device, batch, held), forward_flop(c, batch, 1, held),
            weights * dtype.itemsize + kv_bytes(c, batch * held, dtype.itemsize),
            weights * (dtype.itemsize + 4) + 2 * cached + kv_bytes(c, 3 * held, 4) + 6 * 4 * batch * c.vocab,
        )


def model(config: Config, dtype: torch.dtype, device: torch.device) -> Llama:
    """Random weights, made where they are used."""
    torch.manual_seed(0)
    with device:
        return Llama(config).to(dtype)


def hugging_faces(ours: Llama) -> Any:
    """Their model on our weights: the same memory."""
    library: Any = import_module("transformers")  # a peer only: a bare GPU machine may lack it
    with torch.device("meta"):
        theirs: Any = library.LlamaForCausalLM(library.LlamaConfig(**to_hugging_face(ours.config)))
    theirs.load_state_dict(ours.state_dict(), assign=True)
    # Their frequencies are a float32 buffer that no checkpoint holds.
    decoder: Any = ours.model
    theirs.model.rotary_emb.inv_freq = decoder.layers[0].self_attn.theta.float()
    return theirs


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """A sum over tokens, in float32: the mean has gradients below fp16's smallest number."""
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="sum")


def gradient(call: Callable[[Tensor], Tensor], weights: dict[str, Tensor], ids: Tensor) -> Callable[[], list[Tensor]]:
    """One forward and backward; gives the logits and the gradient of every weight."""

    def step() -> list[Tensor]:
        logits = call(ids)
        return [logits.detach(), *torch.autograd.grad(loss_of(logits, ids), list(weights.values()))]

    return step


def exact_gradient(ours: Llama, ids: Tensor) -> list[Tensor]:
    """The same in float32, a layer's activations at a time; float64 would take 20 GB for the weights alone."""
    precise = copy.deepcopy(ours).to(exact_float32())
    decoder: Any = precise.model
    x = decoder.embed_tokens(ids)
    for layer in decoder.layers:
        x = checkpoint(layer, x, use_reentrant=False)
    logits = precise.lm_head(decoder.norm(x))
    return [logits.detach(), *torch.autograd.grad(loss_of(logits, ids), list(precise.parameters()))]


def training(config: Config, dtype: torch.dtype, device: torch.device, batch: int, tokens: int) -> Work:
    """Forward and backward of one batch."""
    ours = model(config, dtype, device)
    ids = torch.randint(config.vocab, (batch, tokens), device=device)
    names = list(dict(ours.named_parameters()))
    reference = cache(lambda: exact_gradient(ours, ids))
    theirs = cache(lambda: hugging_faces(ours))
    compiled = cache(lambda: torch.compile(theirs()))

    def their_step(of: Callable[[], Any]) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            found = dict(theirs().named_parameters())
            return gradient(lambda i: of()(i).logits, {name: found[name] for name in names}, ids)()

        return step

    def error(result: list[Tensor]) -> tuple[float, float]:
        """1 is the most that each may err, by its norm and in its largest number."""
        off = [worst_error([pair]) for pair in zip(result, reference(), strict=True)]
        return worst([off[0] / LOGITS, *(one / GRADIENTS for one in off[1:])]), 1.0

    peers = {"Hugging Face, eager": their_step(theirs)}
    if (batch, tokens) == COMPILED:
        peers["Hugging Face, compiled"] = their_step(compiled)
    return Work(gradient(ours, dict(ours.named_parameters()), ids), error, peers)


@torch.no_grad()
def decoding(config: Config, dtype: torch.dtype, device: torch.device, batch: int, held: int) -> Work:
    """One new token for each sequence; every call begins from the same cache, of random keys and values."""
    ours = model(config, dtype, device)
    ids = torch.randint(config.vocab, (batch, 1), device=device)
    cached = ours.cache(batch, held + 1)
    cached.k.normal_()
    cached.v.normal_()

    @torch.no_grad()
    def step() -> Tensor:
        cached.lengths.fill_(held)
        return ours(ids, cached)

    @cache
    def theirs() -> tuple[Any, Any]:
        past = import_module("transformers").DynamicCache()
        for layer in range(config.layers):
            past.update(cached.k[layer, :, :, :held], cached.v[layer, :, :, :held], layer)
        return hugging_faces(ours), past

    @torch.no_grad()
    def their_step() -> Tensor:
        library, past = theirs()
        logits: Tensor = library(ids, past_key_values=past, use_cache=True).logits
        past.crop(-1)
        return logits

    @cache
    @torch.no_grad()
    def exact() -> Tensor:
        """In float32, a sequence at a time."""
        precise = copy.deepcopy(ours).to(exact_float32())
        one, rows = precise.cache(1, held + 1), []
        for b in range(batch):
            one.k.copy_(cached.k[:, b : b + 1])
            one.v.copy_(cached.v[:, b : b + 1])
            one.lengths.fill_(held)
            rows.append(precise(ids[b : b + 1], one))
        return torch.cat(rows)

    def error(out: Tensor) -> tuple[float, float]:
        need_same_shape(out, exact())
        return worst_error(zip(out, exact(), strict=True)), LOGITS

    return Work(step, error, {"Hugging Face, eager": their_step})
