"""The attention of one query, averaged over the heads: mean_h softmax_m(q[h, row] . k[h, m] scale + bias[h, row, m]).

Two kernels, both deterministic and free of atomics, for O(B H M D) work and B H M float32 of scratch: the first writes
one head's logits and the logarithm of their sum of exponentials (base 2), the second adds the heads in order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl


@triton.jit
def class_row_logits(
    q_ptr,
    k_ptr,
    bias_ptr,
    logits_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_km,
    stride_kd,
    stride_bb,
    stride_bh,
    stride_bm,
    scale,
    H,
    M,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """q [B,H,D], k [B,H,M,D], bias [B,H,M] (broadcast by stride 0) -> logits [B,H,M], lse [B,H], float32, base 2.

    One program per (batch, head). Each of BLOCK_M lanes keeps its own running maximum and sum; they meet at the end.
    `q_ptr` and `bias_ptr` point at the row asked for. A head whose every key is masked gives lse = -inf.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    program = tl.program_id(0).to(tl.int64)
    b = program // H
    h = program % H
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    keys = offs_m.to(tl.int64)
    width = offs_d.to(tl.int64)

    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + width * stride_qd, mask=offs_d < D, other=0.0)  # [BLOCK_D]
    q = q.to(tl.float32)
    scale2 = tl.cast(scale, tl.float32) * LOG2E
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start_m in range(0, M, BLOCK_M):
        inside = offs_m < M - start_m
        at = keys + start_m
        k_ptrs = k_ptr + b * stride_kb + h * stride_kh + at[:, None] * stride_km + width[None, :] * stride_kd
        k = tl.load(k_ptrs, mask=inside[:, None] & (offs_d[None, :] < D), other=0.0)  # [BLOCK_M, BLOCK_D]
        logits = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale2  # [BLOCK_M]
        if HAS_BIAS:
            bias_ptrs = bias_ptr + b * stride_bb + h * stride_bh + at * stride_bm
            logits += tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32) * LOG2E
        logits = tl.where(inside, logits, float("-inf"))
        tl.store(logits_ptr + program * M + at, logits, mask=inside)
        peak_new = tl.maximum(peak, logits)
        base = tl.where(peak_new == float("-inf"), 0.0, peak_new)
        total = total * tl.exp2(peak - base) + tl.exp2(logits - base)
        peak = peak_new

    top = tl.max(peak, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(lse_ptr + program, base + tl.log2(tl.sum(total * tl.exp2(peak - base), 0)))


@triton.jit
def class_row_mean(logits_ptr, lse_ptr, row_ptr, H, M, BLOCK_M: tl.constexpr):
    """logits [B,H,M], lse [B,H] (float32, base 2) -> row [B,M] float32, the mean over heads of exp2(logits - lse).

    One program per (batch, block of BLOCK_M keys); the heads are added in order. A head with lse = -inf adds zeros.
    """
    blocks = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    offs_m = (program % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < M
    acc = tl.zeros([BLOCK_M], tl.float32)
    for h in range(0, H):
        lse = tl.load(lse_ptr + b * H + h)
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        logits = tl.load(logits_ptr + (b * H + h) * M + offs_m, mask=inside, other=float("-inf"))  # [BLOCK_M]
        acc += tl.exp2(logits - lse)
    tl.store(row_ptr + b * M + offs_m, acc / H, mask=inside)
