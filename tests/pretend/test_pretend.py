"""The pretended GPU itself: what it refuses, CUDA refuses; what it lets through, CUDA lets through."""

import json
import os
import subprocess
import sys

import pytest

from tools.chapters import ROOT

MIXED = "RuntimeError: Expected all tensors to be on the same device"
BEGIN = "import torch, numpy as np\nfrom torch import nn\ng = torch.randn(3, 4, device='cuda')\nc = torch.randn(3, 4)\n"
REFUSED = {
    "c + g": MIXED,
    "g @ c.T": MIXED,
    "torch.cat([g, c])": MIXED,
    "torch.stack([g[0, 0], c[0, 0]])": MIXED,
    "torch.equal(g, c)": MIXED,
    "torch.allclose(g, c)": MIXED,
    "torch.where(c > 0, g, 0.)": MIXED,
    "nn.functional.linear(g, torch.randn(2, 4))": MIXED,
    "nn.Linear(4, 2)(g)": MIXED,
    "nn.Linear(4, 2).cuda()(c)": MIXED,
    "g.index_select(0, torch.tensor([1]))": MIXED,
    "g.gather(0, torch.zeros(1, 4, dtype=torch.long))": MIXED,
    "g[g > 0] = torch.ones(int((g > 0).sum()))": MIXED,
    "c.sum() + g.sum() + c": MIXED,
    "op(g, c)": MIXED,
    "c += g": "RuntimeError",
    "c[torch.zeros(1, dtype=torch.long, device='cuda')]": "RuntimeError: indices should be",
    "c.sum().add_(g.sum())": "RuntimeError: output with device cpu",
    "g.numpy()": "TypeError: can't convert cuda",
    "g.mul(2).numpy()": "TypeError: can't convert cuda",
    "np.asarray(g)": "TypeError: can't convert cuda",
    "np.asarray(list(g))": "TypeError: can't convert cuda",
    "g.requires_grad_(); (g * 2).backward(c)": "RuntimeError: invalid gradient",
    "g.requires_grad_(); torch.autograd.grad(g * 2, g, c)": "RuntimeError: invalid gradient",
    "torch.randn(3, device='cuda', generator=torch.Generator())": "RuntimeError: Expected a 'cuda'",
    "torch.randn(3, generator=torch.Generator('cuda'))": "RuntimeError: Expected a 'cpu'",
    "g.uniform_(generator=torch.Generator())": "RuntimeError: Expected a 'cuda'",
    "measure.run([case])": "AssertionError: not measured: [{'name': 'wrong'",
    "measure.run([])": "AssertionError: not measured: []",
    "double[(1,)](c, 4)": "ValueError: Pointer argument x_ptr cannot be accessed from Triton",
}
# Programs, an empty line between two.
PROGRAMS = """\
assert (g * 2.).is_cuda and (g * c.sum()).is_cuda and (c.sum() * g).is_cuda

assert g[torch.tensor([0])].is_cuda

g[torch.tensor([0])] = 1.
g[0] = c[0]
g.copy_(c)
assert g.is_cuda and torch.equal(g.cpu(), c)

c.copy_(g)
assert c.is_cpu and c.numpy().shape == (3, 4) and str(g.device) == "cuda:0"

x = c.clone().requires_grad_()
(x.cuda() * g).sum().backward()
assert not x.grad.is_cuda

x = g.clone().requires_grad_()
(x.cpu() * c).sum().backward()
assert x.grad.is_cuda

x = g.clone().requires_grad_()
nn.functional.softmax(x, -1).sum().backward()
assert x.grad.is_cuda

m = nn.Linear(4, 2).to("cuda")
m(g).sum().backward()
assert m.weight.grad.is_cuda and not list(m.cpu().parameters())[0].is_cuda

m = nn.Linear(4, 2, device="cuda")
o = torch.optim.AdamW(m.parameters())
m(g).sum().backward()
torch.nn.utils.clip_grad_norm_(m.parameters(), 1.)
o.step()

assert torch.zeros_like(g).is_cuda and not torch.zeros_like(g, device="cpu").is_cuda
assert torch.empty_like(c, device="cuda").is_cuda and g.new_zeros(3).is_cuda

assert torch.as_tensor(c, device="cuda").is_cuda and not c.is_cuda
assert torch.as_tensor(g, device="cuda") is g and torch.as_tensor(np.ones(3), device="cuda").is_cuda

assert g.to(c).is_cpu and c.to(g).is_cuda and g.half().is_cuda
assert c.to("cuda", torch.float16).dtype == torch.float16

import copy
assert copy.deepcopy(g).is_cuda and copy.deepcopy(nn.Linear(2, 2, device="cuda")).weight.is_cuda

with torch.device("cuda"):
    assert torch.zeros(3).is_cuda

assert torch.vmap(torch.sin)(g).is_cuda and torch.func.grad(lambda x: x.sin().sum())(g).is_cuda

seen = []
x = g.clone().requires_grad_()
with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.device) or t, lambda t: t):
    y = x.exp()
assert seen == [torch.device("cuda", 0)]

class Two(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2, x * 3
    @staticmethod
    def backward(ctx, a, b):  # b is a zero that the engine made
        assert b.device.type == "cuda"
        return a + b
x = g.clone().requires_grad_()
Two.apply(x)[0].sum().backward()
assert x.grad.is_cuda

before = torch.cuda.memory_allocated()
big = torch.empty(1000, device="cuda")
assert torch.cuda.memory_allocated() - before == 4000
del big
assert torch.cuda.memory_allocated() == before

double[(1,)](g.view(-1), 12)
assert op(g, g).is_cuda

import llmbook.kit.kernels as k
assert k.DEVICE.type == "cuda" and not k.INTERPRETED and k.capability() == 90
assert torch.cuda.get_device_capability() == (9, 0) and torch.cuda.is_available() and k.sized(1, 2) == 1

x = torch.randn(16, device="cuda")
out = torch.empty(16, device="cuda", dtype=torch.bfloat16)
rounded[(1,)](x, out)
assert torch.equal(out, x.bfloat16())

a = torch.randn(16, 16, device="cuda").bfloat16()
out = torch.empty(16, 16, device="cuda")
product[(1,)](a, out)
assert torch.allclose(out, a.float() @ a.float())
"""
ALLOWED = PROGRAMS.split("\n\n")
KERNELS = """
from llmbook.kit import measure
from llmbook.kit.kernels import dot, tl, triton

case = measure.Case("wrong", {}, lambda: measure.Work(lambda: 1, lambda result: (1.0, 0.1)), 1, 1, 0)

@triton.jit
def double(x_ptr, n, N: tl.constexpr = 16):
    at = tl.arange(0, N)
    tl.store(x_ptr + at, 2 * tl.load(x_ptr + at, mask=at < n), mask=at < n)

@triton.jit
def product(a_ptr, out_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + at, dot(tl.load(a_ptr + at), tl.load(a_ptr + at)))

@triton.jit
def rounded(x_ptr, out_ptr):
    at = tl.arange(0, 16)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))

@torch.library.custom_op("pretended::both", mutates_args=())
def op(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    assert x.is_cuda
    return x + y
"""
SCRIPT = """
import json, sys
from tests.pretend import start
start(90)
import torch
scope, found = {}, {}
begin, kernels, lines = json.load(sys.stdin)
import linecache
linecache.cache["<kernels>"] = (len(kernels), None, kernels.splitlines(True), "<kernels>")
exec(compile("import torch" + kernels, "<kernels>", "exec"), scope)
for line in lines:
    try:
        exec(begin + line, scope)
        found[line] = ""
    except Exception as error:
        found[line] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    lines = json.dumps([BEGIN, KERNELS, [*REFUSED, *ALLOWED]])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=lines, capture_output=True, text=True, cwd=ROOT, env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # after what measurements print


@pytest.mark.parametrize("line", REFUSED)
def test_what_cuda_refuses_is_refused(outcomes, line):
    assert outcomes[line].startswith(REFUSED[line]), outcomes[line]


@pytest.mark.parametrize("line", ALLOWED)
def test_what_cuda_does_is_done(outcomes, line):
    assert outcomes[line] == ""
