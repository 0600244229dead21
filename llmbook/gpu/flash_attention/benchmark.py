"""What the flash_attention chapter times: Algorithm 1's kernel against standard attention and SDPA's backends."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmbook.kit.kernels import DEVICE
from llmbook.kit.measure import Case

from .forward import flash_traffic, standard_traffic
from .kernel import block_rows, capability, flash_attention_1
from .rule import error_by_the_rule, standard

# (batch, heads, N, d): constant tokens per batch, so that only the shape of the work changes.
SHAPES = ((16, 16, 1024, 64), (4, 16, 4096, 64), (1, 16, 16384, 64), (4, 16, 4096, 128), (64, 16, 1024, 64))
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def cases(
    device: torch.device = DEVICE, shapes: Iterable[tuple[int, int, int, int]] = SHAPES,
    dtype: torch.dtype = torch.float16,
) -> Iterator[Case]:
    """One case per shape, full and causal."""
    for batch, heads, n, d in shapes:
        for causal in (False, True):
            torch.manual_seed(n + d)
            q, k, v = torch.randn(3, batch, heads, n, d, device=device, dtype=dtype)
            yield _case(q, k, v, causal)


def _case(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Case:
    batch, heads, n, d = q.shape
    block = block_rows(d, capability())
    flops = 4 * n * n * d * batch * heads // (2 if causal else 1)
    sizes = {"batch": batch, "heads": heads, "N": n, "d": d, "dtype": str(q.dtype)[6:], "causal": causal}
    peers: dict[str, Callable[[], object]] = {
        name: _with(backend, q, k, v, causal) for name, backend in BACKENDS.items()
    }
    if standard_traffic(n, d) * batch * heads * 2 < 40e9:  # S and P must fit into the GPU's memory
        peers["standard, three kernels"] = lambda: standard(q, k, v, causal)
    return Case(
        "flash_attention_1 forward", sizes, lambda: flash_attention_1(q, k, v, causal)[0],
        lambda out: error_by_the_rule([out], (q, k, v), lambda q, k, v: [standard(q, k, v, causal)], times=2), flops,
        flash_traffic(n, d, block) * batch * heads * q.element_size(), peers,
    )


def _with(
    backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call
