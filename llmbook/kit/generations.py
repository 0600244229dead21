"""GPU generations as kernels see them: which matrix product, how much shared memory, and whose tiles fit.

Tile tables have one entry for each of FAMILIES; every other compute capability takes the entry of the family that it
is `like`, so that a new GPU needs a line here and none in a chapter. Numbers are compute capability × 10.
"""

from typing import NamedTuple

from .hardware import SHARED_PER_BLOCK

FAMILIES = (75, 80, 89, 90, 100)


class Generation(NamedTuple):
    """What one compute capability offers a kernel.

    name: NVIDIA's.
    like: the family whose tiles fit it.
    shared: bytes of shared memory that one block can have.
    bf16: whether there is arithmetic in it.
    product: the tensor core's instruction that Triton uses; "" if it uses none.
    tma: whether the copy engine for whole tiles exists.
    """

    name: str
    like: int
    shared: int
    bf16: bool
    product: str
    tma: bool


# sm_120 is called Blackwell and has Ada's shared memory and product; what sets sm_100 apart, it has not.
KNOWN = {
    75: ("Turing", 75), 80: ("Ampere", 80), 86: ("Ampere", 89), 87: ("Ampere", 80), 89: ("Ada", 89),
    90: ("Hopper", 90), 100: ("Blackwell", 100), 103: ("Blackwell", 100), 120: ("Blackwell", 89),
    121: ("Blackwell", 89),
}
PRODUCTS = {75: "", 80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def generation(sm: int) -> Generation:
    """The generation of compute capability × 10 sm.

    One that is not listed gets the smallest tiles of those that came before it: Turing's below 8.0, Ada's after.

    Raises:
        ValueError: older than 7.0, for which Triton has no code.
    """
    if sm < 70:
        raise ValueError(f"kernels need compute capability 7.0 or newer, and this GPU has {sm / 10}")
    name, like = KNOWN.get(sm, (f"sm_{sm}", 75 if sm < 80 else 89))
    shared = SHARED_PER_BLOCK.get(sm, SHARED_PER_BLOCK[like])
    return Generation(name, like, shared, sm >= 80, PRODUCTS[like], sm >= 90)


def family(sm: int) -> int:
    """The one of FAMILIES whose tiles fit compute capability × 10 sm."""
    return generation(sm).like
