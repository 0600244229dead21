"""Train a Llama on the book's own text: `python -m llmbook.block.llama.train --size book --save FOLDER`."""

import argparse
import copy
import hashlib
import json
import math
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from . import checkpoint, corpus
from .config import Config, swiglu_width
from .model import Llama
from .sample import generate


def bytewise(dim: int, layers: int, heads: int, kv_heads: int) -> Config:
    """A model of bytes: 256 tokens, tied embedding, 256 positions."""
    ffn = swiglu_width(dim, 32)
    return Config(256, dim, layers, heads, kv_heads, ffn, context=256, tied=True)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    batch sequences of `length` tokens a step; the learning rate rises to
    `rate` over `warmup` steps and falls to a tenth of it along a cosine.
    """

    steps: int
    batch: int = 16
    length: int = 128
    rate: float = 3e-3
    warmup: int = 20
    decay: float = 0.1
    seed: int = 0


SIZES = {  # name → (model, recipe)
    "notebook": (bytewise(64, 4, 4, 2), Recipe(200, 8, 128, 6e-3)),
    "book": (bytewise(128, 8, 8, 4), Recipe(600, 8, 256, 3e-3, 60)),
    "large": (bytewise(512, 12, 8, 4), Recipe(1000, 64, 256, 1e-3, 100, 0.5)),
}

SHIPPED = corpus.HERE / "book"


@dataclass
class Log:
    """What training showed. Losses in bits per byte.

    train: of every step. at: the steps before which it was looked at;
    held_out: the loss there; seen: what `watch` returned.
    """

    train: list[float] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)


def loss_of(model: Llama, rows: Tensor) -> Tensor:
    """Mean bits per byte of predicting rows[:, 1:] from what stands before.

    rows: [B, S + 1], any integer type.
    """
    rows = rows.long()
    logits = model(rows[:, :-1]).float()
    nats = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    return nats / math.log(2)


def batches(data: Tensor, r: Recipe) -> Iterator[Tensor]:
    """Random excerpts of the data, [batch, length + 1], the same every run."""
    g = torch.Generator().manual_seed(r.seed)
    if len(data) <= r.length:
        raise ValueError(
            f"{len(data)} tokens are too few for excerpts of {r.length + 1}"
        )
    for _ in range(r.steps):
        starts = torch.randint(len(data) - r.length, (r.batch, 1), generator=g)
        here = torch.arange(r.length + 1, device=data.device)
        yield data[starts.to(data.device) + here]


def rate_at(step: int, r: Recipe) -> float:
    """The learning rate of one step: up a line, down half a cosine."""
    if step < r.warmup:
        return r.rate * (step + 1) / r.warmup
    done = (step - r.warmup) / max(1, r.steps - r.warmup)
    return r.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def bits_per_byte(model: Llama, data: Tensor, length: int = 256) -> float:
    """Of held-out data, [N], in windows of `length`: each byte once."""
    device = model.model.norm.weight.device
    rows = data[: (len(data) - 1) // length * length + 1].unfold(0, length + 1, length)
    sums = [len(part) * loss_of(model, part.to(device)).item() for part in rows.split(16)]
    return sum(sums) / len(rows)


def optimizer(model: Llama, r: Recipe) -> torch.optim.AdamW:
    """AdamW; matrices decay, the norms' gains do not."""
    matrices = [w for w in model.parameters() if w.dim() == 2]
    gains = [w for w in model.parameters() if w.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": r.decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=r.rate, betas=(0.9, 0.95))


def computes_in_bf16(device: torch.device) -> bool:
    """Whether it is a GPU with bf16 of its own; a T4 would emulate it, so it
    trains in float32."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def train(
    model: Llama, data: corpus.Split, r: Recipe, looks: Collection[int] = (),
    watch: Callable[[Llama, float], Any] = lambda model, bits: None,
) -> Log:
    """Train in place, with a progress bar.

    looks: before these steps, and after the last, the held-out loss is
    taken and `watch(model, loss)` called; the log keeps what it returns.
    """
    log, adam = Log(), optimizer(model, r)
    device = model.model.norm.weight.device
    bar = tqdm(total=r.steps, file=sys.stdout, bar_format=BAR)
    for step, rows in enumerate([*batches(data.train, r), None]):
        if step in looks or rows is None:
            log.at.append(step)
            log.held_out.append(bits_per_byte(model, data.held_out, r.length))
            log.seen.append(watch(model, log.held_out[-1]))
        if rows is None:
            break
        for group in adam.param_groups:
            group["lr"] = rate_at(step, r)
        with torch.autocast(device.type, torch.bfloat16, computes_in_bf16(device)):
            loss = loss_of(model, rows.to(device))
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        log.train.append(loss.item())
        bar.set_postfix_str(f"{loss:.2f} bits/byte", refresh=False)
        bar.update()
    bar.close()
    return log


BAR = "{l_bar}{bar:30}| {n}/{total}{postfix}"  # no times: they are the machine's
LOOKS = (0, 10, 20, 40, 60, 80, 120, 160, 200, 240, 320, 400, 480, 560)
PROMPTS = ("The ", "A GPU ", "## ")


def writes(model: Llama, prompts: Collection[str] = PROMPTS, new: int = 120) -> list[str]:
    """What the model makes of each prompt, the prompt included; the same draws every time."""
    rows = [corpus.encode("\0" + prompt).long() for prompt in prompts]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.model.norm.weight.device)
    counts = torch.tensor([len(row) for row in rows], device=padded.device)
    g = torch.Generator(padded.device).manual_seed(0)
    found = generate(model, padded, new, temperature=0.7, top_p=0.95, generator=g, counts=counts)
    return [prompt + corpus.decode(row) for prompt, row in zip(prompts, found, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    """Train one of `SIZES`, keep the best held-out loss in bfloat16, and log.json beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="book")
    parser.add_argument("--steps", type=int, help="instead of the size's own")
    parser.add_argument("--save", type=Path, default=SHIPPED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args(arguments)
    config, recipe = SIZES[chosen.size]
    recipe = replace(recipe, steps=chosen.steps or recipe.steps)
    torch.manual_seed(recipe.seed)
    model, data = Llama(config).to(chosen.device), corpus.split(corpus.read())
    best = math.inf

    def watch(model: Llama, bits: float) -> list[str]:
        nonlocal best
        if bits < best:
            best = bits
            kept = copy.deepcopy(model).to(torch.bfloat16)
            checkpoint.save(kept, chosen.save, made_by(chosen, recipe, bits))
        return writes(model)

    log = train(model, data, recipe, LOOKS, watch)
    told = json.dumps(asdict(log), ensure_ascii=False) + "\n"
    (chosen.save / "log.json").write_text(told, encoding="utf-8")


def made_by(chosen: argparse.Namespace, recipe: Recipe, bits: float) -> dict[str, str]:
    """The command, its recipe and the text it learnt from, for the file's metadata."""
    text = hashlib.sha256(corpus.SNAPSHOT.read_bytes()).hexdigest()
    command = f"python -m llmbook.block.llama.train --size {chosen.size} --steps {recipe.steps}"
    return {
        "command": command, "recipe": json.dumps(asdict(recipe)), "corpus_sha256": text,
        "held_out_bits_per_byte": f"{bits:.4f}", "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
