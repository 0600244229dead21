"""FLOPs of one PyTorch operation: products by formula, everything else one per element.

An exponential, a square root or a comparison counts as 1, like an addition; what the hardware needs for it differs.
"""

from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from llmbook.foundations.tokens_to_logits.flop import FORMULAS, flop_of
from llmbook.foundations.tokens_to_logits.tracer import tensors

aten = torch.ops.aten
Tensor = torch.Tensor

# Products that PyTorch's flop_counter has no formula for, so that it counts a GEMV as nothing.
GEMVS = {aten.mv: 0, aten.dot: 0, aten.vdot: 0, aten.addmv: 1}
# These add a third operand to each element of a product.
BIASED = {aten.addmm, aten.baddbmm, aten.addmv}
# They are called pointwise, but only choose or move elements.
MOVES = {
    aten.clone, aten.copy, aten.copy_, aten._to_copy, aten.where, aten.masked_fill, aten.masked_fill_, aten.fill,
    aten.fill_, aten.zero_, aten.alias, aten.logical_not, aten.bitwise_not,
}
SCANS = {aten.cumsum, aten.cumsum_, aten.cumprod, aten.cummax, aten.cummin, aten.logcumsumexp}

# One kernel that does several things to an element counts as what PyTorch itself decomposes it into.
_KERNELS = [
    aten._softmax, aten._log_softmax, aten._safe_softmax, aten.gelu, aten.native_layer_norm, aten.native_group_norm,
]
PARTS = {**core_aten_decompositions(), **get_decompositions(_KERNELS)}


def products(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of the matrix products in one operation; a multiply-add is 2."""
    if packet in GEMVS:
        matrix: Tensor = args[GEMVS[packet]]
        return 2 * matrix.numel()
    return flop_of(packet, args, kwargs, out)


def vector_flop(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs outside products: one per element computed, or per element reduced.

    Operations on whole numbers and truth values alone count 0.
    """
    packet, results = func.overloadpacket, tensors(out)
    given = tensors((args, kwargs))
    if not any(t.is_floating_point() or t.is_complex() for t in given):
        return 0
    if packet in BIASED:
        return results[0].numel()
    if packet in FORMULAS or packet in GEMVS or packet in MOVES:
        return 0
    if func in PARTS:
        return parts_flop(func, args, kwargs)
    if torch.Tag.reduction in func.tags or packet in SCANS:
        return given[0].numel()
    if torch.Tag.pointwise in func.tags:
        return results[0].numel()
    return 0


class Vector(TorchDispatchMode):
    """Sums the FLOPs of the parts that a kernel is made of."""

    flop = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.flop += vector_flop(func, args, kwargs, out)
        return out


def parts_flop(func: Any, args: Any, kwargs: Any) -> int:
    """FLOPs of PyTorch's own decomposition of a kernel, on tensors without data."""

    def bare(leaf: Any) -> Any:
        return leaf.to("meta") if isinstance(leaf, Tensor) else leaf

    with Vector() as mode:
        PARTS[func](*tree_map(bare, args), **tree_map(bare, kwargs))
    return mode.flop
