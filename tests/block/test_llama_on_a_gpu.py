"""What the llama chapter trains and times on a GPU, at small sizes: against Hugging Face's model, without a prefill."""

import json
from pathlib import Path

import pytest
import torch

from llmbook.block.llama import benchmark
from llmbook.block.llama.model import Llama
from llmbook.block.llama.train import computes_in_bf16


def test_what_is_timed_on_a_gpu_is_right_and_so_is_its_peer():
    for case in benchmark.cases(**benchmark.SMALL, dtype=torch.float32):
        work = case.make()
        for run in (work.run, work.peers["Hugging Face, eager"], work.run):  # the peer leaves its cache as it was
            error, allowed = work.error(run())
            assert error < 1e-4 < allowed


def test_hugging_faces_model_is_timed_on_the_same_memory():
    ours = benchmark.model(benchmark.SMALL["config"], torch.bfloat16, torch.device("cpu"))
    theirs = dict(benchmark.hugging_faces(ours).named_parameters())
    for name, w in ours.named_parameters():
        assert w.data_ptr() == theirs[name].data_ptr(), name


def test_half_precision_without_bf16_gives_gradients_too():
    """fp16: the loss is a sum, or its gradients would vanish."""
    (case, _) = benchmark.cases(**benchmark.SMALL, dtype=torch.float16)
    work = case.make()
    assert case.sizes["dtype"] == "float16"
    error, allowed = work.error(work.run())
    assert error <= allowed


def test_a_decode_benchmark_runs_no_prefill(monkeypatch):
    """The cache is filled with random numbers: no pass over what it holds."""
    passes, forward = [], Llama.forward

    def seen(self, ids, *rest):
        passes.append(ids.shape)
        return forward(self, ids, *rest)

    monkeypatch.setattr(Llama, "forward", seen)
    *_, case = benchmark.cases(**benchmark.SMALL)
    work = case.make()
    assert passes == []
    work.error(work.run())
    assert passes[0] == (3, 1)
    assert set(passes[1:]) == {(1, 1)}


@pytest.mark.parametrize(("sm", "own"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_only_a_gpu_with_bf16_of_its_own_trains_in_it(sm, own, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: sm)
    assert computes_in_bf16(torch.device("cuda")) == own
    assert not computes_in_bf16(torch.device("cpu"))


def test_the_notebook_trains_the_small_model_whatever_the_machine():
    notebook = Path(__file__).parents[2] / "notebooks/block/llama.ipynb"
    cells = ["".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
    (cell,) = [cell for cell in cells if "live = train(" in cell]
    assert cell.startswith('SIZE = "notebook"')
    assert "SIZES[SIZE]" in cell


def test_the_timed_loss_is_a_sum_whose_gradients_fp16_holds():
    logits = torch.randn(1, 2048, 4000, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    ids = torch.arange(2048)[None] % 4000
    loss = benchmark.loss_of(logits, ids)
    exact = logits.detach().double().requires_grad_()
    right = -exact.log_softmax(-1).gather(-1, ids[..., None]).sum()
    (ours,), (theirs,) = torch.autograd.grad(loss, logits), torch.autograd.grad(right, exact)
    assert loss.item() == pytest.approx(right.item(), rel=1e-5)
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    small = ours[0, 0, 1:], theirs[0, 0, 1:]  # not the target's
    assert (small[0] - small[1]).norm() < 1e-2 * small[1].norm()
