"""What mechanisms make for their inputs is made where these are: on meta, no tensor of the CPU may meet them."""

import ast
from pathlib import Path

import pytest
import torch

from llmbook.block.deepseek_moe.lab import groups_touched
from llmbook.block.mla import entangled
from llmbook.block.mla.ladder import decoupled, draw_factors, rotated
from llmbook.block.norms.training import normed
from llmbook.foundations.matrix_calculus.vjp import rows_by_vjp
from llmbook.foundations.regression_vs_classification.calibration import best_temperature
from llmbook.foundations.regression_vs_classification.logit_losses import logit_mse_hessian
from llmbook.foundations.regression_vs_classification.race import run
from llmbook.foundations.regression_vs_classification.surface import descend
from llmbook.gpu.flash_attention.eleven_steps import eleven_steps
from llmbook.gpu.flash_attention.memory import Memory
from llmbook.gpu.flash_attention_2.tiled import hidden, tiled_attention
from llmbook.gpu.online_softmax.rounding import halve

ROOT = Path(__file__).parents[2]


def meta(*shape, dtype=torch.float64):
    return torch.empty(shape, dtype=dtype, device="meta")


def factors(*sizes):
    return [type(part)(*(t.to("meta") for t in part)) for part in draw_factors(*sizes, rope=4)]


def of_mla():
    h, c = meta(5, 16), meta(5, 8)
    up_q, up_k = meta(4, 16), meta(4, 8)
    scores = (entangled.scores_with_rope, entangled.scores_absorbed_anyway, entangled.scores_turned_latent)
    low, rotary = factors(2, 4, 8, 16)
    return [
        *(score(h, c, up_q, up_k) for score in scores), entangled.between(up_q, up_k, -3),
        *(decoupled(h, low, rotary, absorb) for absorb in (True, False)),
        *rotated(h, rotary, torch.ones(2, dtype=torch.float64)),
    ]


def of_training():
    weights = [meta(3, a, b) for a, b in ((8, 16), (1, 16), (16, 10), (1, 10))]
    labels = meta(12, dtype=torch.int64)
    race = run("MSE on logits", "Adam", weights, meta(3, 12, 8), meta(12, dtype=torch.int64), (0.1, 0.2), 2)
    path = descend("cross-entropy", (0.0, 0.0), (0.1, 0.2), 2, meta(12), labels)
    return [race.accuracy, path.weights, normed(meta(1, 2, 3, 4), "batch + shift", torch.Generator())]


def of_attention():
    Q, K, V = (meta(7, 4) for _ in range(3))
    list(eleven_steps(Q, K, V, Memory(), 4, 4))
    return [*tiled_attention(Q, K, V, Memory(), 4, 4, causal=True), hidden(4, 0, meta(4, 4)), *halve(meta(2, 8))]


def of_the_rest():
    x = meta(3)
    return [
        rows_by_vjp(torch.sin, x)[0], logit_mse_hessian(x, x),
        groups_touched(meta(3, 4, dtype=torch.int64)),
    ]


@pytest.mark.parametrize("results", [of_mla, of_training, of_attention, of_the_rest])
def test_results_are_where_the_inputs_are(results):
    assert {t.device.type for t in results()} == {"meta"}


MAKERS = {"arange", "zeros", "ones", "full", "empty", "eye", "tensor", "linspace", "logspace", "as_tensor"}
APART = {"masks.py: ctx.save_for_backward(torch.tensor([stream.seed, stream.offset]))"}  # two numbers, read as numbers


def made_on_the_cpu(path):
    """Calls that make a tensor without a word on where, in functions that are given tensors."""
    text = path.read_text()
    for function in ast.walk(ast.parse(text)):
        given = isinstance(function, ast.FunctionDef) and any(
            "Tensor" in ast.unparse(a.annotation)
            for a in (*function.args.args, *function.args.kwonlyargs) if a.annotation
        )
        for call in ast.walk(function) if given else ():
            if isinstance(call, ast.Call) and ast.unparse(call.func) in {f"torch.{maker}" for maker in MAKERS} \
                    and "device" not in {keyword.arg for keyword in call.keywords}:
                yield f"{path.name}: {text.splitlines()[call.lineno - 1].strip()}"


def test_no_mechanism_makes_a_tensor_on_the_cpu_for_tensors_that_may_be_elsewhere():
    drawn = {"figures", "exercises", "benchmark", "story"}
    paths = [path for path in (ROOT / "llmbook").glob("*/*/*.py") if path.stem not in drawn]
    assert {found for path in paths for found in made_on_the_cpu(path)} == APART


def test_a_temperature_is_found_from_float32_logits_too():
    logits = 3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.distributions.Categorical(logits=logits / 2).sample()
    assert 1 < best_temperature(logits, labels) < 4
