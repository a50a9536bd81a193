"""Attention with decay by distance, softmax or retention, one pass over the keys; the bias is made where it is added.

A program owns `BLOCK_N` places of one head and, where attention goes along some axes only, of one position on the
others; it walks the places that these see `BLOCK_M` at a time. Distances follow from the places' numbers, so that no
bias is read, and the map is read in place by its strides, along whichever axes. With softmax, exponentials are to base
2 and each row's running maximum, sum and output are kept, as in attention.py; retention keeps a sum alone.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl


@triton.jit
def decay_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    out_ptr,
    stride_qb,
    stride_qz,
    stride_qy,
    stride_qx,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kz,
    stride_ky,
    stride_kx,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vz,
    stride_vy,
    stride_vx,
    stride_vh,
    stride_vd,
    stride_ob,
    stride_oz,
    stride_oy,
    stride_ox,
    stride_oh,
    stride_decay,
    scale,
    H,
    Z,
    Y,
    X,
    D: tl.constexpr,
    DV: tl.constexpr,
    ALONG: tl.constexpr,
    SOFTMAX: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """q, k [B,Z,Y,X,H,D], v [B,Z,Y,X,H,DV], decay [H] -> out [B,Z,Y,X,H,DV], last stride 1.

    Attention goes along the last ALONG of the axes Z, Y, X, which the caller has put in that order; a missing axis has
    one place. CAUSAL (ALONG = 1) keeps places <= the query's. Programs: block of places, head, place on the other
    axes, picture. PRECISION is `tl.dot`'s for float32; UPCAST multiplies in float32 (the interpreter has no bfloat16).
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    if ALONG == 1:
        places = X
        others = Z * Y
    elif ALONG == 2:
        places = Y * X
        others = Z
    else:
        places = Z * Y * X
        others = 1
    blocks = tl.cdiv(places, BLOCK_N)
    program = tl.program_id(0)
    start_n = (program % blocks) * BLOCK_N
    h = (program // blocks % H).to(tl.int64)
    other = (program // blocks // H % others).to(tl.int64)
    b = (program // blocks // H // others).to(tl.int64)
    if ALONG == 1:
        z = other // Y
        y = other % Y
    elif ALONG == 2:
        z = other
        y = other * 0
    else:
        z = other * 0
        y = other * 0
    q_start = q_ptr + b * stride_qb + h * stride_qh + z * stride_qz + y * stride_qy
    k_start = k_ptr + b * stride_kb + h * stride_kh + z * stride_kz + y * stride_ky
    v_start = v_ptr + b * stride_vb + h * stride_vh + z * stride_vz + y * stride_vy
    out_start = out_ptr + b * stride_ob + h * stride_oh + z * stride_oz + y * stride_oy
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    width = offs_d.to(tl.int64)
    width_v = offs_dv.to(tl.int64)

    rows = _offsets(offs_n, stride_qz, stride_qy, stride_qx, Y, X, ALONG)
    q_ptrs = q_start + rows[:, None] + width[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=(offs_n[:, None] < places) & (offs_d[None, :] < D), other=0.0)  # [BLOCK_N, BLOCK_D]
    if UPCAST:
        q = q.to(tl.float32)
    slope = tl.load(decay_ptr + h * stride_decay).to(tl.float32) * LOG2E
    scale = tl.cast(scale, tl.float32)
    if SOFTMAX:
        scale = scale * LOG2E

    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    stop = places
    if CAUSAL:
        stop = tl.minimum(places, start_n + BLOCK_N)
    for start_m in range(0, stop, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        inside = offs_m < places
        keys = _offsets(offs_m, stride_kz, stride_ky, stride_kx, Y, X, ALONG)
        k_ptrs = k_start + keys[None, :] + width[:, None] * stride_kd
        k = tl.load(k_ptrs, mask=inside[None, :] & (offs_d[:, None] < D), other=0.0)  # [BLOCK_D, BLOCK_M]
        if UPCAST:
            k = k.to(tl.float32)
        bias = _steps(offs_n, offs_m, Y, X, ALONG).to(tl.float32) * slope  # [BLOCK_N, BLOCK_M]
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (offs_m[None, :] <= offs_n[:, None])
        logits = tl.dot(q, k, input_precision=PRECISION) * scale  # [BLOCK_N, BLOCK_M]
        if SOFTMAX:
            logits = tl.where(seen, logits + bias, float("-inf"))
            peak_new = tl.maximum(peak, tl.max(logits, 1))
            p = tl.exp2(logits - peak_new[:, None])
            shrink = tl.exp2(peak - peak_new)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            peak = peak_new
        else:
            p = tl.where(seen, logits * tl.exp2(bias), 0.0)
        values = _offsets(offs_m, stride_vz, stride_vy, stride_vx, Y, X, ALONG)
        v_ptrs = v_start + values[:, None] + width_v[None, :] * stride_vd
        v = tl.load(v_ptrs, mask=inside[:, None] & (offs_dv[None, :] < DV), other=0.0)  # [BLOCK_M, BLOCK_DV]
        p = p.to(v.dtype)
        if UPCAST:
            p = p.to(tl.float32)
            v = v.to(tl.float32)
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
    if SOFTMAX:
        acc = acc / total[:, None]
    out = _offsets(offs_n, stride_oz, stride_oy, stride_ox, Y, X, ALONG)
    out_ptrs = out_start + out[:, None] + width_v[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_n[:, None] < places) & (offs_dv[None, :] < DV))


@triton.jit
def _offsets(n, stride_z, stride_y, stride_x, Y, X, ALONG: tl.constexpr):
    """Where the places numbered n along the axes of attention lie, in elements (int64)."""
    if ALONG == 1:
        found = n.to(tl.int64) * stride_x
    else:
        found = (n % X).to(tl.int64) * stride_x
        if ALONG == 2:
            found += (n // X).to(tl.int64) * stride_y
        else:
            found += (n // X % Y).to(tl.int64) * stride_y + (n // (X * Y)).to(tl.int64) * stride_z
    return found


@triton.jit
def _steps(n, m, Y, X, ALONG: tl.constexpr):
    """[N, M]: steps between places numbered n and m, added up over the axes of attention."""
    if ALONG == 1:
        found = tl.abs(n[:, None] - m[None, :])
    else:
        found = tl.abs((n % X)[:, None] - (m % X)[None, :])
        if ALONG == 2:
            found += tl.abs((n // X)[:, None] - (m // X)[None, :])
        else:
            found += tl.abs((n // X % Y)[:, None] - (m // X % Y)[None, :])
            found += tl.abs((n // (X * Y))[:, None] - (m // (X * Y))[None, :])
    return found
