"""A GEMM's closed forms: FLOPs, bytes, intensity, the batch at the ridge, tiles and waves."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil

from .roofs import BYTES, ridge


@dataclass(frozen=True)
class Gemm:
    """[M, K] × [K, N] → [M, N], all three in one dtype.

    Raises:
        ValueError: a size that is not a positive whole number; an unknown dtype.
    """

    M: int
    N: int
    K: int
    dtype: str = "fp16"

    def __post_init__(self) -> None:
        for name in ("M", "N", "K"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"{name} of a GEMM must be a positive whole number, not {size!r}"
                )
        if self.dtype not in BYTES:
            raise ValueError(
                f"dtype {self.dtype!r} has no size here: choose one of "
                f"{', '.join(BYTES)}"
            )

    @property
    def flop(self) -> int:
        return 2 * self.M * self.N * self.K

    @property
    def elements(self) -> int:
        return self.M * self.K + self.K * self.N + self.M * self.N

    @property
    def bytes(self) -> int:
        """Each matrix once through memory."""
        return self.elements * BYTES[self.dtype]

    @property
    def intensity(self) -> float:
        return self.flop / self.bytes

    def l2_bytes(self, BM: int = 128, BN: int = 128) -> int:
        """Through L2: every tile of the output reads its rows of A and columns of B."""
        across, down = ceil(self.N / BN), ceil(self.M / BM)
        a, b = self.M * self.K * across, self.K * self.N * down
        return (a + b + self.M * self.N) * BYTES[self.dtype]


def batch_at_ridge(N: int, K: int, name: str, dtype: str = "fp16") -> int | None:
    """The least M for which a GEMM with a K × N weight is compute-bound.

    2MNK ≥ I·b·(MK + KN + MN), solved for M, with I the ridge point and b the
    bytes per element. None if no M is enough: then K or N is too small.
    """
    Gemm(1, N, K, dtype)
    Ib = ridge(name, dtype) * BYTES[dtype]
    gain = 2 * N * K - Ib * (N + K)
    return ceil(Ib * N * K / gain) if gain > 0 else None


def read_back(
    intensity: float, low: float, high: float, bandwidth: float, dtypes: Iterable[str], sizes: Iterable[int]
) -> Iterator[Gemm]:
    """Every GEMM of the given sizes that prints this intensity and a time in [low, high).

    intensity: rounded to one decimal, FLOP/byte; low, high: seconds of T_mem; bandwidth: byte/s.
    """
    sizes = tuple(sizes)
    for dtype, M, N, K in product(dtypes, sizes, sizes, sizes):
        g = Gemm(M, N, K, dtype)
        if round(g.intensity, 1) == intensity and low <= g.bytes / bandwidth < high:
            yield g


def tiles(M: int, N: int, BM: int = 128, BN: int = 128) -> int:
    """Thread blocks of a GEMM: one per tile of the output, a part of a tile too."""
    return ceil(M / BM) * ceil(N / BN)


def waves(M: int, N: int, sms: int, BM: int = 128, BN: int = 128) -> int:
    """Rounds in which the chip takes the tiles, one per multiprocessor at a time."""
    return ceil(tiles(M, N, BM, BN) / sms)


def quantised(M: int, N: int, sms: int, BM: int = 128, BN: int = 128) -> float:
    """Share of the chip's products that end up in the output, in (0, 1].

    Tile quantisation: a tile over the edge is computed whole. Wave
    quantisation: a last round takes as long with one tile as with all.

    Raises:
        ValueError: a size that is not positive.
    """
    if min(M, N, sms, BM, BN) < 1:
        raise ValueError(
            f"sizes must be positive, not M={M}, N={N}, sms={sms}, tile {BM} × {BN}"
        )
    return M * N / (waves(M, N, sms, BM, BN) * sms * BM * BN)
