"""Checkpoints as Hugging Face has them: a folder with config.json and model.safetensors, refused by a tensor's name."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmbook.block.rope.rotation import to_half_split

from .config import Config, from_hugging_face, to_hugging_face
from .model import Llama

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save(
    model: Llama, folder: str | Path, made_by: dict[str, str] | None = None
) -> None:
    """Write config.json and model.safetensors; a tied head is not repeated.

    made_by: goes into the file's metadata, name → text.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    if model.config.tied:
        del tensors["lm_head.weight"]
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    fields = to_hugging_face(model.config) | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    metadata = {"format": "pt", **(made_by or {})}
    save_file(tensors, folder / "model.safetensors", metadata)


def load(folder: str | Path, dtype: torch.dtype | None = None) -> Llama:
    """Read what `save` or transformers' `save_pretrained` wrote.

    dtype: of the model; that of the file if None. One file or shards.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a tensor is missing, unexpected, of another shape or
            dtype, or cut off; says which.
    """
    folder = Path(folder)
    config = from_hugging_face(json.loads((folder / "config.json").read_text()))
    found: dict[str, Tensor] = {}
    for path in files(folder):
        found |= read(path)
    return assemble(config, found, dtype)


def assemble(
    c: Config, found: dict[str, Tensor], dtype: torch.dtype | None = None
) -> Llama:
    """A model of the tensors, none of them copied unless the dtype changes."""
    if c.tied and "model.embed_tokens.weight" in found:
        found = {"lm_head.weight": found["model.embed_tokens.weight"]} | found
    with torch.device("meta"):
        model = Llama(c)
    refuse_foreign(found, model.state_dict(), c)
    model.load_state_dict(found, assign=True)
    if c.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    any_of_them = found["model.norm.weight"].dtype
    return model.to(dtype or any_of_them)


def refuse_foreign(
    found: dict[str, Tensor], wanted: dict[str, Tensor], c: Config
) -> None:
    """Refuse tensors that are not this model's, naming the first."""
    for name, like in wanted.items():
        if name not in found:
            raise ValueError(f"the checkpoint lacks {name}, {list(like.shape)}")
        t = found[name]
        if t.shape != like.shape:
            raise ValueError(
                f"{name} is {list(t.shape)} in the checkpoint, but the config "
                f"makes it {list(like.shape)}"
            )
        first = found[next(iter(wanted))].dtype
        if t.dtype not in FLOATS or t.dtype != first:
            raise ValueError(
                f"{name} is {t.dtype} in the checkpoint; all tensors must have "
                f"one floating dtype, and the first has {first}"
            )
    if more := sorted(set(found) - set(wanted)):
        raise ValueError(
            f"the checkpoint has {more[0]}, which a Llama of {c.layers} layers "
            "has no place for"
        )
    head, table = found["lm_head.weight"], found["model.embed_tokens.weight"]
    if c.tied and not torch.equal(head, table):
        raise ValueError(
            "lm_head.weight differs from the embedding, but the config says "
            "that they are tied"
        )


def files(folder: Path) -> list[Path]:
    """The safetensors of a checkpoint: one file, or the shards of its index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    shards = json.loads(index.read_text())["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file; a file cut short is refused."""
    refuse_cut(path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def metadata(path: Path) -> dict[str, str]:
    """What its maker wrote into a safetensors file."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def refuse_cut(path: Path) -> None:
    """Compare the file's size with its header, and name the first tensor cut.

    The format: 8 bytes hold n, n bytes of JSON say where each tensor lies
    in the rest.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if size < 8 + n:
            raise ValueError(f"{path.name} is cut off in its header, which needs {8 + n:,} bytes: there are {size:,}")
        header: dict[str, Any] = json.loads(file.read(n))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        end = 8 + n + entry["data_offsets"][1]
        if end > size:
            raise ValueError(f"{path.name} is cut off in {name}: it ends at byte {end:,}, the file at {size:,}")


def from_meta(original: dict[str, Tensor], c: Config) -> dict[str, Tensor]:
    """Meta's names to Hugging Face's, wq and wk from pairs to halves.

    Meta's RoPE turns neighbours (2i, 2i + 1), Hugging Face's turns
    (i, i + d/2): the rows of wq and wk move, all else keeps its numbers.
    """
    renamed = {}
    for name, weight in original.items():
        for theirs, ours in META.items():
            name = name.replace(theirs, ours)
        if "q_proj" in name:
            weight = to_half_split(weight, c.heads)
        elif "k_proj" in name:
            weight = to_half_split(weight, c.kv_heads)
        outside = name.startswith("lm_head") or name == "rope.freqs"
        renamed[name if outside else f"model.{name}"] = weight
    renamed.pop("rope.freqs", None)
    return renamed


META = {
    "tok_embeddings": "embed_tokens", "output.": "lm_head.", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}
