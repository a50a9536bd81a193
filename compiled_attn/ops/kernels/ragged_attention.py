"""Flash attention within packed sequences: softmax(q k^T scale) v for each, their lengths known to the device alone.

The online softmax of kernels/attention.py. A program owns `BLOCK_N` queries of one head of one sequence; which, it
counts itself from the offsets, so that the host needs no length: with B sequences and T rows there are at most
cdiv(T, BLOCK_N) + B blocks, and a program beyond the last one has nothing to do.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl


@triton.jit
def ragged_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    q_offsets_ptr,
    k_offsets_ptr,
    out_ptr,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vs,
    stride_vh,
    stride_vd,
    stride_ot,
    stride_oh,
    scale,
    B,
    blocks,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """q [T,H,D], k [S,H,D], v [S,H,DV], offsets [B+1] int64 -> out [T,H,DV], last stride 1.

    `blocks` programs a head. A query that sees no key gives zeros. CAUSAL keeps key m <= query n of a sequence.
    PRECISION is `tl.dot`'s for float32; UPCAST multiplies in float32 (the interpreter multiplies bfloat16 bits).
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    h = (tl.program_id(0) // blocks).to(tl.int64)
    own = (tl.program_id(0) % blocks).to(tl.int64)
    first_q = tl.cast(0, tl.int64)
    first_k = tl.cast(0, tl.int64)
    start_n = tl.cast(0, tl.int64)
    N = tl.cast(0, tl.int64)
    M = tl.cast(0, tl.int64)
    passed = tl.cast(0, tl.int64)  # blocks of the sequences before
    for b in range(0, B):
        begin = tl.load(q_offsets_ptr + b)
        length = tl.load(q_offsets_ptr + b + 1) - begin
        here = (length + BLOCK_N - 1) // BLOCK_N
        mine = (own >= passed) & (own < passed + here)
        keys_begin = tl.load(k_offsets_ptr + b)
        first_q = tl.where(mine, begin, first_q)
        first_k = tl.where(mine, keys_begin, first_k)
        start_n = tl.where(mine, (own - passed) * BLOCK_N, start_n)
        N = tl.where(mine, length, N)
        M = tl.where(mine, tl.load(k_offsets_ptr + b + 1) - keys_begin, M)
        passed += here

    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = first_q + offs_n
    keys = first_k + offs_m
    width = offs_d.to(tl.int64)
    width_v = offs_dv.to(tl.int64)
    q_ptrs = q_ptr + h * stride_qh + rows[:, None] * stride_qt + width[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=(offs_n[:, None] < N) & (offs_d[None, :] < D), other=0.0)  # [BLOCK_N, BLOCK_D]
    if UPCAST:
        q = q.to(tl.float32)
    k_ptrs = k_ptr + h * stride_kh + keys[None, :] * stride_ks + width[:, None] * stride_kd
    v_ptrs = v_ptr + h * stride_vh + keys[:, None] * stride_vs + width_v[None, :] * stride_vd

    scale2 = tl.cast(scale, tl.float32) * LOG2E
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    stop = M
    if CAUSAL:
        stop = tl.minimum(M, start_n + BLOCK_N)
    for start_m in range(0, stop, BLOCK_M):
        inside = offs_m < M - start_m
        k = tl.load(k_ptrs, mask=inside[None, :] & (offs_d[:, None] < D), other=0.0)  # [BLOCK_D, BLOCK_M]
        if UPCAST:
            k = k.to(tl.float32)
        logits = tl.dot(q, k, input_precision=PRECISION) * scale2  # [BLOCK_N, BLOCK_M]
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (start_m + offs_m[None, :] <= offs_n[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        peak_new = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(peak_new == float("-inf"), 0.0, peak_new)
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = tl.load(v_ptrs, mask=inside[:, None] & (offs_dv[None, :] < DV), other=0.0)  # [BLOCK_M, BLOCK_DV]
        p = p.to(v.dtype)
        if UPCAST:
            p = p.to(tl.float32)
            v = v.to(tl.float32)
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
        peak = peak_new
        k_ptrs += BLOCK_M * tl.cast(stride_ks, tl.int64)
        v_ptrs += BLOCK_M * tl.cast(stride_vs, tl.int64)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptrs = out_ptr + h * stride_oh + rows[:, None] * stride_ot + offs_dv[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_n[:, None] < N) & (offs_dv[None, :] < DV))
