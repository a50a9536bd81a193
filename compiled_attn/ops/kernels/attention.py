"""Flash attention forward: softmax(q k^T scale + bias) v, one pass over the keys, the N x M matrix never stored.

The online softmax of Milakov and Gimelshein (2018) as FlashAttention (Dao et al., 2022) arranges it: a program owns
`BLOCK_N` query rows, walks the keys `BLOCK_M` at a time and keeps each row's running maximum, sum and output.
Exponentials are to base 2, with log2(e) folded into the scale. Sums are float32 whatever the inputs are.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl


@triton.jit
def attention(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    out_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_km,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vm,
    stride_vd,
    stride_bb,
    stride_bh,
    stride_bn,
    stride_bm,
    stride_ob,
    stride_oh,
    stride_on,
    scale,
    H,
    N,
    M,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """q [B,H,N,D], k [B,H,M,D], v [B,H,M,DV], bias [B,H,N,M] (broadcast by stride 0) -> out [B,H,N,DV], last stride 1.

    One program per (batch, head, block of BLOCK_N queries), a head's blocks side by side to share its keys.
    A row whose every key is masked gives zeros, as torch's attention does. CAUSAL keeps key m <= query n.
    PRECISION is `tl.dot`'s for float32; UPCAST multiplies in float32 (the interpreter multiplies bfloat16 bits).
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    start_n = (program % blocks) * BLOCK_N
    b = (program // blocks // H).to(tl.int64)
    h = (program // blocks % H).to(tl.int64)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = offs_n.to(tl.int64)[:, None]
    keys = offs_m.to(tl.int64)
    width = offs_d.to(tl.int64)
    width_v = offs_dv.to(tl.int64)

    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + rows * stride_qn + width[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=(offs_n[:, None] < N) & (offs_d[None, :] < D), other=0.0)  # [BLOCK_N, BLOCK_D]
    if UPCAST:
        q = q.to(tl.float32)
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh + keys[None, :] * stride_km + width[:, None] * stride_kd
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh + keys[:, None] * stride_vm + width_v[None, :] * stride_vd
    bias_ptrs = bias_ptr
    if HAS_BIAS:
        bias_ptrs = bias_ptr + b * stride_bb + h * stride_bh + rows * stride_bn + keys[None, :] * stride_bm

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
        if HAS_BIAS:
            bias = tl.load(bias_ptrs, mask=(offs_n[:, None] < N) & inside[None, :], other=0.0)  # [BLOCK_N, BLOCK_M]
            logits += bias.to(tl.float32) * LOG2E
            bias_ptrs += BLOCK_M * tl.cast(stride_bm, tl.int64)
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
        k_ptrs += BLOCK_M * tl.cast(stride_km, tl.int64)
        v_ptrs += BLOCK_M * tl.cast(stride_vm, tl.int64)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + rows * stride_on + offs_dv[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_n[:, None] < N) & (offs_dv[None, :] < DV))
