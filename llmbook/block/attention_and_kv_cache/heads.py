"""Head arithmetic: how many query and KV heads there are, how wide, and on which device each lives.

MHA: Vaswani et al. 2017; MQA: Shazeer 2019 (arXiv 1911.02150); GQA: Ainslie et al. 2023 (arXiv 2305.13245).
"""

from dataclasses import dataclass
from typing import NamedTuple


class Local(NamedTuple):
    """What one of the devices holds, under the names of Llama's code.

    copies: devices that hold the same KV head; 1 unless there are more devices than KV heads.
    """

    n_local_heads: int
    n_local_kv_heads: int
    n_rep: int
    head_dim: int
    copies: int


class Place(NamedTuple):
    """The heads of one device, by their numbers in the whole model."""

    query_heads: range
    kv_heads: range


@dataclass(frozen=True)
class Heads:
    """Sizes of attention: MHA if kv_heads = heads, MQA if it is 1, GQA between.

    Args:
        dim: D, width of the stream.
        heads, kv_heads: n_h query heads and n_kv key and value heads.
        head_dim: d_h; 0 stands for dim / heads, which not every model has.

    Raises:
        ValueError: counts below 1, or that do not divide.
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int = 0

    def __post_init__(self) -> None:
        refuse_odd_sizes(self)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.dim // self.heads)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    def local(self, devices: int) -> Local:
        """One device's share under tensor parallelism.

        Raises:
            ValueError: the devices do not divide the query heads, or neither
                divide the KV heads nor are a multiple of them.
        """
        if devices < 1 or self.heads % devices:
            raise ValueError(
                f"{self.heads} query heads do not divide among {devices} devices"
            )
        if self.kv_heads % devices and devices % self.kv_heads:
            raise ValueError(
                f"{self.kv_heads} KV heads and {devices} devices: one must be a "
                "multiple of the other, or devices would differ"
            )
        kv = max(self.kv_heads // devices, 1)  # too few to go round: copies
        own = self.heads // devices
        copies = devices * kv // self.kv_heads
        return Local(own, kv, own // kv, self.head_dim, copies)


def refuse_odd_sizes(h: Heads) -> None:
    """Refuse sizes that do not go together, in one sentence."""
    if min(h.dim, h.heads, h.kv_heads) < 1:
        raise ValueError(f"dim, heads and kv_heads must be at least 1, not {h.dim, h.heads, h.kv_heads}")
    if h.heads % h.kv_heads:
        raise ValueError(
            f"{h.heads} query heads cannot share {h.kv_heads} KV heads evenly: the second must divide the first"
        )
    if not h.head_dim and h.dim % h.heads:
        raise ValueError(f"a width of {h.dim} does not divide into {h.heads} heads: give head_dim")
    width = h.head_dim or h.dim // h.heads
    if width < 2 or width % 2:
        raise ValueError(f"head_dim must be even and at least 2, because RoPE turns pairs, not {width}")


def places(heads: Heads, devices: int) -> list[Place]:
    """Which heads live on which device: queries beside the KV heads they read.

    Raises:
        ValueError: as `Heads.local`.
    """
    share = heads.local(devices)
    first = [rank * share.n_local_heads for rank in range(devices)]
    return [
        Place(
            range(q, q + share.n_local_heads),
            range(q // heads.group, q // heads.group + share.n_local_kv_heads),
        )
        for q in first
    ]
