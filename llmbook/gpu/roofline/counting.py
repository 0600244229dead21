"""FLOPs and bytes of any PyTorch callable, counted operation by operation while it runs, on real or `meta` tensors.

Products by PyTorch's own formulas, those of `torch.utils.flop_counter`; everything else here: one FLOP per element.
Bytes: an operation reads each distinct input once and writes its outputs once, and views are free.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from llmbook.foundations.tokens_to_logits.tracer import Tracer, tensors

from .arithmetic import products, vector_flop

aten = torch.ops.aten
Tensor = torch.Tensor

# Where the rows that are read are chosen by another input: reads as many bytes as it writes, not the whole table.
GATHERS = {aten.embedding, aten.index, aten.index_select, aten.gather, aten.take}
# Where a few rows of a big tensor are written: as many bytes as the new values have.
SCATTERS = {aten.index_put_, aten._index_put_impl_, aten.index_copy_, aten.scatter_}
# What these write over is not read, though it is an argument.
OVERWRITES = {
    aten.copy_, aten.fill_, aten.zero_, aten.uniform_, aten.normal_, aten.bernoulli_, aten.random_, *SCATTERS,
}
ALLOCATES = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


class Region(NamedTuple):
    """Part of a memory that an operation touches.

    storage: which memory; where: which elements of it; bytes: how many bytes
    that is; whole: bytes of the memory; fresh: allocated by this operation.
    """

    storage: int
    where: tuple[Any, ...]
    bytes: int
    whole: int
    fresh: bool = False


def traffic(regions: Iterable[Region]) -> int:
    """Bytes of all regions, those that are the same ones once."""
    sums: dict[int, tuple[int, int]] = {}
    for r in {(r.storage, r.where): r for r in regions}.values():
        sums[r.storage] = (sums.get(r.storage, (0, 0))[0] + r.bytes, r.whole)
    return sum(min(total, whole) for total, whole in sums.values())


def elements(t: Tensor) -> tuple[int, tuple[tuple[int, int], ...]]:
    """How many different elements a strided tensor shows, and which.

    Returns the count, and (stride, size) pairs that are equal for two views of
    the same elements, transposed or flattened. Expanded dimensions count once.
    """
    pairs = [
        (stride, size) for size, stride in zip(t.shape, t.stride(), strict=True)
        if size != 1 and stride
    ]
    merged: list[tuple[int, int]] = []
    count = 0 if t.numel() == 0 else 1
    for stride, size in sorted(pairs):
        count *= size
        if merged and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = (merged[-1][0], merged[-1][1] * size)
        else:
            merged.append((stride, size))
    return count, tuple(merged)


class Cost(NamedTuple):
    """What a piece of work takes.

    products: FLOPs of matrix products; others: all other FLOPs; bytes: read and
    written; dtype: of the largest product, or of the first input if there is
    none.
    """

    products: int
    others: int
    bytes: int
    dtype: torch.dtype

    @property
    def flop(self) -> int:
        return self.products + self.others

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flop / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Work:
    """One operation: its PyTorch name, the module that ran it, what it takes."""

    name: str
    module: str
    products: int
    others: int
    reads: tuple[Region, ...]
    writes: tuple[Region, ...]
    dtype: torch.dtype

    @property
    def cost(self) -> Cost:
        moved = traffic(self.reads) + traffic(self.writes)
        return Cost(self.products, self.others, moved, self.dtype)


@dataclass(frozen=True)
class Counted:
    """A callable's operations in order, without views; and its result's memory."""

    ops: tuple[Work, ...]
    results: frozenset[int]

    def unfused(self, ops: Iterable[Work] | None = None) -> Cost:
        """Each operation goes through memory, as in eager PyTorch."""
        chosen = list(self.ops if ops is None else ops)
        return self._sum(chosen, sum(op.cost.bytes for op in chosen))

    def crossing(self, ops: Iterable[Work]) -> tuple[list[Region], list[Region]]:
        """What one kernel for these operations reads and writes.

        It reads what it did not make, and writes what anybody else needs.
        """
        chosen = list(ops)
        inside = {id(op) for op in chosen}
        made = {r.storage for op in chosen for r in op.writes if r.fresh}
        wanted = set(self.results)
        for op in self.ops:
            if id(op) not in inside:
                wanted |= {r.storage for r in op.reads}
        reads = [r for op in chosen for r in op.reads if r.storage not in made]
        writes = [
            r for op in chosen for r in op.writes
            if r.storage not in made or r.storage in wanted
        ]
        return reads, writes

    def fused(self, ops: Iterable[Work] | None = None) -> Cost:
        """One kernel for the given operations (default: all).

        The least that any fusion can move: it assumes that what lies between
        fits on the chip.
        """
        chosen = list(self.ops if ops is None else ops)
        return self._sum(chosen, sum(map(traffic, self.crossing(chosen))))

    def _sum(self, ops: list[Work], moved: int) -> Cost:
        if not ops:
            raise ValueError("nothing was counted: the callable ran no operation that reads or writes memory")
        largest = max(ops, key=lambda op: op.products)
        return Cost(sum(op.products for op in ops), sum(op.others for op in ops), moved, largest.dtype)


class Counter(Tracer):
    """A Tracer that also writes down, per operation, which memory it touches."""

    def __enter__(self) -> "Counter":
        self.work: list[Work] = []
        self._refs: dict[int, StorageWeakRef] = {}  # while a reference lives, its number is not used again
        super().__enter__()
        return self

    def region(self, t: Tensor, fresh: bool = False, most: int | None = None) -> Region:
        """The part of memory that a tensor shows; at most `most` bytes of it."""
        if t.layout != torch.strided:
            raise ValueError(f"bytes are counted for strided tensors, but {self.ops[-1].name} has a {t.layout} one")
        storage = t.untyped_storage()
        ref = StorageWeakRef(storage)
        self._refs.setdefault(ref.cdata, ref)
        count, which = elements(t)
        size = count * t.element_size()
        where: tuple[Any, ...] = (t.storage_offset() * t.element_size(), t.element_size(), *which)
        if most is not None and most < size:
            size, where = most, (*where, len(self.work))  # which rows is in the data: another choice every time
        return Region(ref.cdata, where, size, storage.nbytes(), fresh)

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = tensors((args, kwargs))
        storages = {StorageWeakRef(t.untyped_storage()).cdata for t in given if t.layout == torch.strided}
        out = super().record(func, args, kwargs)
        packet, results = func.overloadpacket, tensors(out)
        written = _written(func, args, kwargs)
        fresh = [t for t in results if StorageWeakRef(t.untyped_storage()).cdata not in storages]
        if packet in ALLOCATES or not (written or fresh):
            return out  # a view, or memory that nobody has touched yet
        gone = {id(t) for t in written} if packet in OVERWRITES or _is_out(func) else set()
        most = sum(t.numel() * t.element_size() for t in results) if packet in GATHERS else None
        reads = [t for t in given if id(t) not in gone]
        table = reads[0] if most is not None else None
        rows = sum(t.numel() * t.element_size() for t in reads if t.is_floating_point()) if packet in SCATTERS else None
        floats = [t.dtype for t in (*given, *results) if t.is_floating_point()]
        self.work.append(Work(
            str(packet).removeprefix("aten."), self.ops[-1].module, products(packet, args, kwargs, out),
            vector_flop(func, args, kwargs, out),
            tuple(self.region(t, most=most if t is table else None) for t in reads),
            (*(self.region(t, most=rows) for t in written), *(self.region(t, fresh=True) for t in fresh)),
            floats[0] if floats else (given or results)[0].dtype,
        ))
        return out


def _is_out(func: Any) -> bool:
    return any(argument.is_out for argument in func._schema.arguments)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation changes, by its schema."""
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def count(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Counted:
    """Run a callable once and count what its operations compute and move.

    Args:
        function: any PyTorch callable; of an nn.Module, operations are labelled
            with the submodule that ran them.
        *args, **kwargs: its arguments. With tensors on the `meta` device nothing
            is computed and no memory is needed.

    Raises:
        ValueError: a sparse tensor, or nothing to count.
    """
    root = function if isinstance(function, nn.Module) else nn.Module()
    with Counter(root) as counter:
        out = function(*args, **kwargs)
    if not counter.work:
        raise ValueError("nothing was counted: the callable ran no operation that reads or writes memory")
    results = frozenset(counter.region(t).storage for t in tensors(out) if t.layout == torch.strided)
    return Counted(tuple(counter.work), results)
