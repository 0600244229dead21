"""Algorithm 1 as a Triton kernel: one program per head, K and V outside, Q and O inside.

It is the paper's loop order, kept on purpose: O is read and written once per block of keys, and only batch × heads
programs run at once. The next chapter turns the loops round.
"""

import torch

from llmbook.kit.generations import family
from llmbook.kit.kernels import Build, capability, dot, need_dtype, need_same_device, tl, triton

HEAD_DIMS = (16, 32, 64, 128, 256)


@triton.jit
def flash1_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, l_ptr, m_ptr, n, scale, D: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, CAUSAL: tl.constexpr,
):
    # 64 bits: head·n·D passes 2³¹ in long contexts.
    head = tl.program_id(0).to(tl.int64)
    q_ptr += head * n * D
    k_ptr += head * n * D
    v_ptr += head * n * D
    o_ptr += head * n * D
    l_ptr += head * n
    m_ptr += head * n
    cols = tl.arange(0, D)[None, :]
    for j in range(0, n, BC):
        keys = j + tl.arange(0, BC)
        at = keys[:, None] * D + cols
        k = tl.load(k_ptr + at, mask=keys[:, None] < n, other=0.0)
        v = tl.load(v_ptr + at, mask=keys[:, None] < n, other=0.0)
        # Causal: rows before the block's first key see none of it.
        first = (j // BR) * BR if CAUSAL else 0
        for i in range(first, n, BR):
            rows = i + tl.arange(0, BR)
            at = rows[:, None] * D + cols
            inside = rows[:, None] < n
            q = tl.load(q_ptr + at, mask=inside, other=0.0)
            s = dot(q, tl.trans(k)) * scale
            seen = keys[None, :] < n
            if CAUSAL:
                seen = seen & (rows[:, None] >= keys[None, :])
            s = tl.where(seen, s, float("-inf"))
            m_old = tl.load(m_ptr + rows, mask=rows < n, other=0.0)
            l_old = tl.load(l_ptr + rows, mask=rows < n, other=1.0)
            m_new = tl.maximum(m_old, tl.max(s, 1))
            p = tl.exp(s - m_new[:, None])
            alpha = tl.exp(m_old - m_new) * l_old
            l_new = alpha + tl.sum(p, 1)
            o = tl.load(o_ptr + at, mask=inside, other=0.0) * alpha[:, None]
            o += dot(p.to(v.dtype), v)
            tl.store(o_ptr + at, o / l_new[:, None], mask=inside)
            tl.store(l_ptr + rows, l_new, mask=rows < n)
            tl.store(m_ptr + rows, m_new, mask=rows < n)
        # What one thread stored, another loads in the next round.
        tl.debug_barrier()


def flash_attention_1(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by Algorithm 1 on the GPU (or in Triton's interpreter).

    Args:
        q, k, v: [batch, heads, N, d], one dtype of fp16, bf16 or fp32; d one of 16, 32, 64, 128, 256.
        causal: row i sees keys 0 to i.

    Returns:
        The output [batch, heads, N, d] in the inputs' dtype, and each row's logsumexp [batch, heads, N] in fp32.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, or a head dimension not listed above.
    """
    _check(q, k, v)
    batch, heads, n, d = q.shape
    # O, l and m are rewritten once per block of keys: kept in fp32, or every round would round them.
    o = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    l = torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
    m = torch.full_like(l, float("-inf"))
    if q.numel():
        block = block_rows(d, capability())
        flash1_kernel[(batch * heads,)](
            q.contiguous(), k.contiguous(), v.contiguous(), o, l, m, n, d**-0.5,
            D=d, BR=block, BC=block, CAUSAL=causal, num_warps=4, num_stages=1,
        )
    return o.to(q.dtype), m + l.log()


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k, v must share one shape [batch, heads, N, d], but have {[list(t.shape) for t in (q, k, v)]}"
        )
    need_dtype(torch.float16, torch.bfloat16, torch.float32, q=q, k=k, v=v)
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"head dimension {q.shape[-1]} is not supported; use one of {HEAD_DIMS}")
    need_same_device(q=q, k=k, v=v)


def block_rows(d: int, sm: int) -> int:
    """B_r = B_c by head dimension. Triton uses no tensor cores before sm_80, where wide tiles spill registers."""
    if family(sm) == 75:
        return 32 if d <= 128 else 16
    return 64 if d <= 64 else 32


def _build(d: int, causal: bool) -> Build:
    half = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*fp16") | dict.fromkeys(("o_ptr", "l_ptr", "m_ptr"), "*fp32")

    def constants(sm: int) -> dict[str, int | bool]:
        return {"D": d, "BR": block_rows(d, sm), "BC": block_rows(d, sm), "CAUSAL": causal}

    return Build(flash1_kernel, {**half, "n": "i32", "scale": "fp32"}, constants, num_warps=4, num_stages=1)


BUILDS = [_build(d, causal) for d in (64, 128) for causal in (False, True)]
