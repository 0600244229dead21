"""Checkpoints: transformers reads ours, we read its, and what is cut or foreign is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.utils import logging

from llmbook.block.llama import checkpoint, corpus
from llmbook.block.llama.checkpoint import from_meta, load, save
from llmbook.block.llama.config import Config
from llmbook.block.llama.model import Llama
from llmbook.block.llama.train import SHIPPED, bits_per_byte
from llmbook.block.rope.rotation import rotate_half_split, rotate_interleaved, tables, to_half_split
from tests.block.test_llama import SHAPES, SMALL, ids_for, pair

logging.disable_progress_bar()
TIED = Config(40, 32, 2, 4, 2, 48, context=64, tied=True)


@pytest.mark.parametrize("c", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_what_we_save_and_we_read_it_back(c, dtype, tmp_path):
    ours, _ = pair(c, dtype)
    save(ours, tmp_path, {"command": "a test"})
    theirs, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.dtype == dtype
    again = load(tmp_path)
    for name, weight in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
        assert torch.equal(theirs.state_dict()[name], weight), name
    assert again.config == c
    assert torch.equal(again(ids_for(c)), ours(ids_for(c)))
    assert checkpoint.metadata(tmp_path / "model.safetensors")["command"] == "a test"


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
@pytest.mark.parametrize("c", [SMALL, TIED])
def test_we_read_what_transformers_saves_in_one_file_or_in_shards(c, shard, tmp_path):
    _, theirs = pair(c, torch.float32)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10KB")
    ours = load(tmp_path, torch.float64)
    assert ours.model.norm.weight.dtype == torch.float64
    a, b = ours(ids_for(c)), theirs(ids_for(c)).logits.double()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(b.detach().abs().max()))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == c.tied


@pytest.fixture
def written(tmp_path):
    """A saved model's folder, and a function that changes its tensors."""
    save(Llama(SMALL), tmp_path)
    path = tmp_path / "model.safetensors"

    def change(edit):
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return tmp_path, change


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(("edit", "words"), [
    (lambda t: t.pop(NAME), rf"lacks {NAME}, \[48, 32\]"),
    (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(48, 32)}),
     r"has model.layers.3.mlp.up_proj.weight, which a Llama of 3 layers has no place for"),
    (lambda t: t.update({NAME: torch.ones(32, 48)}), rf"{NAME} is \[32, 48\] .* makes it \[48, 32\]"),
    (lambda t: t.update({NAME: t[NAME].half()}), rf"{NAME} is torch.float16 .* the first has torch.float32"),
    (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), rf"{NAME} is torch.int8"),
    (lambda t: t.update({n: w.to(torch.int8) for n, w in t.items()}), "embed_tokens.weight is torch.int8"),
])
def test_a_foreign_tensor_is_refused_by_name(written, edit, words):
    folder, change = written
    change(edit)
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_a_file_cut_at_any_byte_is_refused(written):
    folder, _ = written
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:data])
    for size in [0, 5, 8, 100, data - 1, *range(data, len(whole), 3001), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is cut off in") as told:
            load(folder)
        if size >= data:
            name = str(told.value).split("cut off in ")[1].split(":")[0]
            begin, end = header[name]["data_offsets"]
            assert begin <= size - data < end
    path.write_bytes(whole)
    load(folder)


def test_a_file_that_is_no_checkpoint_is_refused(written):
    folder, _ = written
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>not found</html>" * 9)
    with pytest.raises(ValueError, match="cut off in its header"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(folder)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    save(Llama(TIED), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    load(tmp_path)  # a copy of the embedding is no harm
    save_file(tensors | {"lm_head.weight": torch.ones(40, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        load(tmp_path)


def test_metas_layout_gives_the_same_scores_once_permuted_and_others_if_not():
    """Meta turns neighbours; the scores of its wq and wk are reached after the rows have moved."""
    torch.manual_seed(0)
    c, S = SMALL, 7
    x = torch.randn(1, S, c.dim, dtype=torch.float64)
    wq = torch.randn(c.heads * c.head_dim, c.dim, dtype=torch.float64)
    wk = torch.randn(c.kv_heads * c.head_dim, c.dim, dtype=torch.float64)
    model = Llama(c).double()
    angles = tables(torch.arange(S), model.model.layers[0].self_attn.theta, torch.float64)

    def metas_scores(a, b):
        q = rotate_interleaved((x @ a.T).view(1, S, c.heads, -1), *angles)
        k = rotate_interleaved((x @ b.T).view(1, S, c.kv_heads, -1), *angles).repeat_interleave(2, 2)
        return torch.einsum("bshd,bthd->bhst", q, k)

    a = model.model.layers[0].self_attn

    def our_scores(a_, b_):
        q = rotate_half_split(a.split(x @ a_.T), *angles)
        k = rotate_half_split(a.split(x @ b_.T), *angles).repeat_interleave(2, 2)
        return torch.einsum("bshd,bthd->bhst", q, k)

    wanted = metas_scores(wq, wk)
    torch.testing.assert_close(our_scores(to_half_split(wq, 4), to_half_split(wk, 2)), wanted)
    assert not torch.allclose(our_scores(wq, wk), wanted, atol=0.1)


def test_metas_names_become_hugging_faces():
    model = Llama(SMALL)
    back = {ours: theirs for theirs, ours in checkpoint.META.items()}
    original = {}
    for name, weight in model.state_dict().items():
        name = name.removeprefix("model.")
        for ours, theirs in back.items():
            name = name.replace(ours, theirs)
        original[name] = weight
    assert "layers.0.attention.wq.weight" in original
    assert {"tok_embeddings.weight", "norm.weight", "output.weight", "layers.2.ffn_norm.weight"} <= set(original)
    found = from_meta(original | {"rope.freqs": torch.ones(4)}, SMALL)
    assert set(found) == set(model.state_dict())
    for name, weight in model.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        torch.testing.assert_close(found[name], to_half_split(weight, heads) if heads else weight, rtol=0, atol=0)


def test_the_shipped_model_is_small_and_says_how_it_was_made():
    path = SHIPPED / "model.safetensors"
    assert path.stat().st_size <= 4_000_000
    made = checkpoint.metadata(path)
    assert made["command"].startswith("python -m llmbook.block.llama.train")
    assert bits_per_byte(load(SHIPPED, torch.float32), corpus.split(corpus.read()).held_out[:4097]) < 2.7
    c = load(SHIPPED).config
    for shards in (2, 4, 8):
        assert c.heads % shards == c.ffn % shards == c.vocab % shards == c.layers % shards == 0
        c.attention.local(shards)
