"""What every launcher refuses: tensors elsewhere, by name, and bf16 where there is none; and life without Triton."""

import os
import subprocess
import sys
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


# --- ahead of time, and without Triton


def fresh(script, **environment):
    """What a new process prints."""
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_compilers_process_sees_no_gpu_and_does_not_interpret(monkeypatch):
    """The same on a machine with a GPU, where nothing is set, and on one without."""
    seen, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: seen.append(k["env"]) or run(*a, **k))
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (row,) = ahead.report("llmbook.block.norms.kernel:0@120")
    assert (seen[0]["TRITON_INTERPRET"], seen[0]["CUDA_VISIBLE_DEVICES"]) == ("0", "")
    assert (row["sm"], row["limit"], row["spills"]) == (120, 99 * 1024, 0)


PRETEND = "import torch; torch.cuda.is_available = lambda: True\n"


def test_a_report_is_made_in_a_process_that_compiles_too():
    """As in a notebook on a machine with a GPU: kernels are compiled here, and ahead of time in the other process."""
    script = PRETEND + (
        "from llmbook.kit import ahead, kernels\n"
        "assert not kernels.INTERPRETED and kernels.DEVICE.type == 'cuda'\n"
        "print(ahead.report('llmbook.block.norms.kernel:0@75')[0]['sm'])"
    )
    without = {"TRITON_INTERPRET": ""}
    assert fresh(script.replace("import torch;", "import os; os.environ.pop('TRITON_INTERPRET'); import torch;"),
                 **without) == "75\n"


SENTENCE = (
    "Triton is not installed here, so kernels cannot run: it exists for Linux; everything else in this chapter runs"
)


def test_without_triton_chapters_import_and_a_launch_says_why_it_cannot():
    script = """
import sys
sys.modules["triton"] = None
import importlib
from pathlib import Path
import llmbook
root = Path(llmbook.__file__).parent
for path in sorted(root.glob("*/*/*.py")):
    importlib.import_module(".".join(("llmbook", *path.relative_to(root).with_suffix("").parts)))
import torch
from llmbook.kit import ahead, kernels
assert not kernels.AVAILABLE
half = lambda *shape: torch.ones(shape).half()
from llmbook.block.attention_and_kv_cache.decode import flash_decode
from llmbook.block.norms.kernel import rms_norm
from llmbook.gpu.flash_attention.kernel import flash1_kernel, flash_attention_1
from llmbook.gpu.flash_attention_2.attention import flash_attention_2
from llmbook.gpu.online_softmax.kernel import softmax
calls = [
    lambda: flash_attention_1(*[half(1, 1, 4, 16)] * 3), lambda: flash_attention_2(*[half(1, 1, 4, 16)] * 3),
    lambda: softmax(half(2, 3)), lambda: rms_norm(half(2, 3), half(3)), lambda: flash1_kernel(1),
    lambda: flash_decode(half(1, 2, 16), half(1, 1, 4, 16), half(1, 1, 4, 16), torch.ones(1, dtype=torch.int32)),
    lambda: ahead.report("llmbook.block.norms.kernel"),
]
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    assert fresh(script) == (SENTENCE + "\n") * 7
    assert kernels.AVAILABLE


def test_the_stand_ins_count_as_triton_does():
    from llmbook.kit import without_triton

    for n in (1, 2, 3, 16, 17, 1000):
        assert without_triton.triton.next_power_of_2(n) == kernels.triton.next_power_of_2(n)
        assert without_triton.triton.cdiv(n, 7) == kernels.triton.cdiv(n, 7)
