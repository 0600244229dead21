"""A tensor autograd engine: what `loss.backward()` does. torch is storage only."""
from __future__ import annotations

import heapq
from itertools import count
from typing import Any

import torch
from torch import Tensor

numbers = count()  # an operation that runs later has a larger number
watch: list[Any] = []  # each is told of every event: tell(event, node, value or g)

class Edge:
    """A gradient's way back to one input: pull(g, *saved) is the VJP."""
    def __init__(self, source: Var, pull: Any, *saved: Tensor):
        self.source, self.shape = source.node, source.value.shape
        self.pull, self.saved = pull, saved
        self.version = sum(tensor._version for tensor in saved)  # in-place writes

    def unpack(self, op: str) -> tuple[Tensor, ...]:
        if writes := sum(tensor._version for tensor in self.saved) - self.version:
            shapes = " and ".join(str(list(tensor.shape)) for tensor in self.saved)
            raise ValueError(f"{op} saved a tensor {shapes} for its backward, and "
                             f"{writes} in-place write(s) changed it: write to a copy")
        return self.saved

class Node:
    """One operation that ran. It holds no result, only what its edges saved."""
    def __init__(self, op: str, edges: list[Edge], leaf: Var | None = None):
        self.op, self.leaf, self.number = op, leaf, next(numbers)
        self.edges: list[Edge] | None = edges  # None once backward has used them

class Var:
    """A float tensor of any shape, and the node that made it (None: no gradient)."""
    def __init__(self, value: Tensor, requires_grad: bool = False):
        self.value = value.detach()
        self.grad: Tensor | None = None  # leaves only; summed over backward passes
        self.node = Node("leaf", [], self) if requires_grad else None

    def __add__(self, other: Var) -> Var: return add(self, other)
    def __mul__(self, other: Var) -> Var: return mul(self, other)
    def __matmul__(self, other: Var) -> Var: return matmul(self, other)
    def __getitem__(self, key: Any) -> Var: return index(self, key)
    def backward(self, g: Tensor | None = None) -> None: backward(self, g)

def notify(event: str, node: Node, tensor: Tensor) -> None:
    for tell in watch:
        tell(event, node, tensor)

def result(op: str, value: Tensor, *edges: Edge) -> Var:
    """An operation's value; with a node, if an input needs a gradient."""
    kept = [e for e in edges if e.source is not None and torch.is_grad_enabled()]
    out, node = Var(value), Node(op, kept)
    out.node = node if kept else None
    notify("forward", node, value)
    return out

def backward(out: Var, g: Tensor | None = None) -> None:
    """Add ∂L/∂leaf to each leaf's grad; out is L, or any value with g = ∂L/∂out.
    Raises ValueError: out or g unfit, run twice, a saved tensor written in place."""
    if out.node is None:
        raise ValueError("nothing to differentiate: no input has requires_grad")
    g = torch.ones_like(out.value) if g is None and out.value.numel() == 1 else g
    if g is None or g.shape != out.value.shape:
        raise ValueError("backward starts at a scalar; from a value of shape "
                         f"{list(out.value.shape)} it needs a g of that shape")
    ready, arrived = [(-out.node.number, out.node)], {out.node: g}
    while ready:  # latest first: whatever used a result runs before it
        node = heapq.heappop(ready)[1]
        g = arrived.pop(node)
        if node.edges is None:
            raise ValueError(f"backward ran through this {node.op} before and freed "
                             "what it had saved: run the forward pass again")
        notify("backward", node, g)
        for edge in node.edges:  # what was broadcast was copied, and copies add up
            pulled = edge.pull(g, *edge.unpack(node.op)).sum_to_size(edge.shape)
            if edge.source in arrived:
                arrived[edge.source] = arrived[edge.source] + pulled
            elif edge.source is not None:
                arrived[edge.source] = pulled
                heapq.heappush(ready, (-edge.source.number, edge.source))
        if node.leaf is None:
            notify("freed", node, g)
            node.edges = None
        else:  # + 0 copies: add gave one g to both its inputs
            node.leaf.grad = g + (0 if node.leaf.grad is None else node.leaf.grad)

def compute(op: str, function: Any, a: Var, b: Var) -> Tensor:
    try:
        return function(a.value, b.value)
    except RuntimeError as e:
        raise ValueError(f"{op} of {[*a.value.shape]}, {[*b.value.shape]}: {e}") from e

def add(a: Var, b: Var) -> Var:
    out = compute("add", torch.add, a, b)
    return result("add", out, Edge(a, lambda g: g), Edge(b, lambda g: g))

def mul(a: Var, b: Var) -> Var:
    return result("mul", compute("mul", torch.mul, a, b),
                  Edge(a, lambda g, b: g * b, b.value),
                  Edge(b, lambda g, a: g * a, a.value))

def matmul(a: Var, b: Var) -> Var:
    if min(a.value.ndim, b.value.ndim) < 2:
        raise ValueError("matmul needs two axes or more on both sides")
    return result("matmul", compute("matmul", torch.matmul, a, b),
                  Edge(a, lambda g, b: g @ b.mT, b.value),
                  Edge(b, lambda g, a: a.mT @ g, a.value))

def relu(a: Var) -> Var:
    out = a.value.relu()
    return result("relu", out, Edge(a, lambda g, out: g * (out > 0), out))

def silu(a: Var) -> Var:
    return result("silu", a.value * a.value.sigmoid(), Edge(
        a, lambda g, a: g * a.sigmoid() * (1 + a * (1 - a.sigmoid())), a.value))

def total(a: Var, dim: int | None = None) -> Var:
    full, kept = a.value.shape, a.value.sum(dim, keepdim=True).shape
    return result("sum", a.value.sum(dim), Edge(a, lambda g: g.view(kept).expand(full)))

def mean(a: Var, dim: int | None = None) -> Var:
    full, kept = a.value.shape, a.value.sum(dim, keepdim=True).shape
    return result("mean", a.value.mean(dim), Edge(
        a, lambda g: g.view(kept).expand(full) / (full.numel() / kept.numel())))

def index(a: Var, key: Any) -> Var:
    shape = a.value.shape
    def pull(g: Tensor, *indices: Tensor) -> Tensor:
        taken = torch.arange(shape.numel(), device=g.device).view(shape)[key].flatten()
        return g.new_zeros(shape.numel()).index_add(0, taken, g.flatten()).view(shape)
    saved = [k for k in (key if type(key) is tuple else [key]) if isinstance(k, Tensor)]
    return result("index", a.value[key], Edge(a, pull, *saved))

def cross_entropy(logits: Var, labels: Tensor) -> Var:
    """The mean of -log softmax(logits)[label]; logits [..., C], labels [...] int64."""
    z, classes = logits.value, logits.value.shape[-1]
    if labels.shape != z.shape[:-1]:
        raise ValueError(f"labels {[*labels.shape]} do not fit logits {[*z.shape]}")
    if (bad := labels[(labels < 0) | (labels >= classes)]).numel():
        raise ValueError(f"label {bad[0]} is out of range: 0 to {classes - 1}")
    z = z - z.amax(-1, keepdim=True)
    logp = z - z.exp().sum(-1, keepdim=True).log()
    def pull(g: Tensor, logp: Tensor, labels: Tensor, n: Tensor) -> Tensor:
        y = torch.zeros_like(logp).scatter_(-1, labels[..., None], 1)
        return (logp.exp() - y) * (g / n)
    loss, n = -logp.gather(-1, labels[..., None]).mean(), z.new_tensor(labels.numel())
    return result("cross entropy", loss, Edge(logits, pull, logp, labels, n))
