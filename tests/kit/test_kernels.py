"""What every launcher refuses: tensors elsewhere, by name, and bf16 where there is none; and life without Triton."""

from pathlib import Path

import pytest
import torch

from llmbook.block.attention_and_kv_cache.decode import flash_decode
from llmbook.block.deepseek_moe.grouped import grouped_product
from llmbook.block.mla.decode import latent_decode
from llmbook.block.norms.kernel import add_rms_norm, rms_norm
from llmbook.block.rope.kernel import rope
from llmbook.gpu.attention_on_the_roofline.decode import decode
from llmbook.gpu.flash_attention.kernel import flash_attention_1
from llmbook.gpu.flash_attention_2 import attention
from llmbook.gpu.online_softmax.kernel import softmax
from llmbook.kit import ahead, kernels

ROOT = Path(__file__).parents[2]
HALF, I32 = torch.float16, torch.int32


def launchers(dtype):
    """Every launcher with what it takes, by name: (call, {name: tensor})."""
    def of(*shape):
        return torch.ones(shape, dtype=dtype)

    lengths, table, angles = torch.ones(2, dtype=I32), torch.zeros(2, 1, dtype=I32), torch.ones(3, 8)
    heads = {"q": of(2, 4, 3, 16), "k": of(2, 2, 3, 16), "v": of(2, 2, 3, 16)}
    same = {name: of(2, 2, 3, 16) for name in "qkv"}
    sums = {name: torch.full((2, 4, 3), 20.0) for name in ("lse", "dlse")}
    return {
        "flash_decode": (flash_decode, {
            "q": of(2, 4, 16), "k": of(2, 2, 3, 16), "v": of(2, 2, 3, 16), "lengths": lengths, "table": table}),
        "latent_decode": (lambda **t: latent_decode(**t, scale=1.0, latent=16), {
            "q": of(2, 4, 32), "rows": of(2, 3, 32), "lengths": lengths, "table": table}),
        "grouped_product": (grouped_product, {
            "x": of(2, 16), "w": of(2, 16, 8), "ends": torch.tensor([1, 2], dtype=I32)}),
        "decode": (decode, {
            "q": of(2, 4, 1, 64), "k": of(2, 2, 3, 64), "v": of(2, 2, 3, 64), "lengths": lengths}),
        "decode, MLA": (lambda **t: decode(**t, v=None), {"q": of(2, 4, 1, 576), "k": of(2, 1, 3, 576)}),
        "flash_attention_1": (flash_attention_1, same),
        "flash_attention_2": (attention.flash_attention_2, heads),
        "flash_attention_2, forward": (lambda **t: attention.forward(**t, causal=False, scale=1.0), heads),
        "flash_attention_2, backward": (lambda **t: attention.backward(**t, causal=False, scale=1.0), {
            **heads, "o": of(2, 4, 3, 16), "do": of(2, 4, 3, 16), **sums}),
        "softmax": (softmax, {"x": of(2, 3)}),
        "rms_norm": (rms_norm, {"x": of(2, 3), "weight": of(3)}),
        "add_rms_norm": (add_rms_norm, {"x": of(2, 3), "residual": of(2, 3), "weight": of(3)}),
        "rope": (rope, {"q": of(2, 3, 4, 16), "k": of(2, 3, 2, 16), "cos": angles, "sin": angles}),
    }


NAMED = [(name, tensor) for name, (_, given) in launchers(HALF).items() for tensor in given]
RAW = ("flash_attention_2, forward", "flash_attention_2, backward")  # behind the check


@pytest.mark.parametrize(("name", "elsewhere"), NAMED)
def test_every_launcher_names_every_tensor_that_is_elsewhere(name, elsewhere):
    call, given = launchers(HALF)[name]
    call(**given)
    moved = {key: tensor.to("meta") if key == elsewhere else tensor for key, tensor in given.items()}
    with pytest.raises(ValueError, match=rf"kernels run on cpu here, but .*{elsewhere} is on meta.*: move them with"):
        call(**moved)


@pytest.mark.parametrize("name", sorted(set(launchers(HALF)) - set(RAW)))
def test_every_launcher_refuses_bf16_before_sm_80(name, monkeypatch):
    call, given = launchers(torch.bfloat16)[name]
    call(**given)
    monkeypatch.setattr(kernels, "capability", lambda: 75)
    with pytest.raises(ValueError, match=r"^sm_75 has no bf16: convert .* to float16$"):
        call(**given)


def test_the_list_of_launchers_is_whole():
    """Every module of a chapter that starts a kernel is among them."""
    starts = {
        path.relative_to(ROOT / "llmbook").parts[1]
        for path in (ROOT / "llmbook").glob("*/*/*.py") if "_kernel[" in path.read_text()
    }
    here = {call.__module__.split(".")[2] for call, _ in launchers(HALF).values() if call.__module__ != __name__}
    assert starts == here | {"mla"} == {name.split(".")[2] for name in ahead.kernel_modules()}


def test_dtypes_are_refused_by_name_in_one_sentence():
    single, half, whole = torch.ones(1), torch.ones(1).half(), torch.ones(1).int()
    kernels.need_dtype(HALF, torch.float32, a=single, b=single, c=None)
    for allowed, given, message in (
        ((HALF,), {"a": single}, "a must be float16, not float32"),
        ((HALF, torch.float32), {"a": whole}, "a must be one of float16, float32, not int32"),
        ((HALF, torch.float32), {"a": half, "b": single}, "a, b must share one of .*, not float16, float32"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            kernels.need_dtype(*allowed, **given)


def test_the_registered_operators_refuse_too(monkeypatch):
    """A dispatcher lets meta tensors pass; tensors on the CPU of a machine with a GPU come to the kernels."""
    calls = launchers(HALF)
    monkeypatch.setattr(kernels, "DEVICE", torch.device("cuda"))
    message = "kernels run on cuda here, but q is on cpu, k is on cpu, v is on cpu.*: move them with"
    for name, operator in (("forward", attention.attend), ("backward", attention.attend_backward)):
        with pytest.raises(ValueError, match=message):
            operator(**calls[f"flash_attention_2, {name}"][1], causal=False, scale=1.0)


def test_two_gpus_are_two_devices(monkeypatch):
    monkeypatch.setattr(kernels, "DEVICE", torch.device("cuda"))

    class On:
        def __init__(self, place):
            self.device = torch.device(place)

    kernels.need_same_device(a=On("cuda:1"), b=On("cuda:1"))
    with pytest.raises(ValueError, match="but a is on cuda:0, b is on cuda:1: move them with"):
        kernels.need_same_device(a=On("cuda:0"), b=On("cuda:1"))
