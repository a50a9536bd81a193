"""Gradients of local attention by tiles of keys: dk and dv.

A program owns a box of keys of one class and goes through the queries whose windows may hold one of them. Along an axis
these are neighbors, since windows move on with their queries; each query's own window then says what counts.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl

from compiled_attn.ops.kernels.local_attention import _window, _within


@triton.jit
def local_attention_columns(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    relative_ptr,
    grad_ptr,
    lse_ptr,
    mean_ptr,
    dk_ptr,
    dv_ptr,
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
    stride_gb,
    stride_gz,
    stride_gy,
    stride_gx,
    stride_gh,
    stride_gd,
    bias_h,
    bias_z,
    bias_y,
    bias_x,
    relative_b,
    relative_z,
    relative_y,
    relative_x,
    relative_h,
    relative_d,
    scale,
    H,
    border,
    sinks,
    queries_z,
    keys_z,
    window_z,
    step_z,
    block_z,
    dilation_z,
    shift_z,
    causal_z,
    tile_z,
    queries_y,
    keys_y,
    window_y,
    step_y,
    block_y,
    dilation_y,
    shift_y,
    causal_y,
    tile_y,
    queries_x,
    keys_x,
    window_x,
    step_x,
    block_x,
    dilation_x,
    shift_x,
    causal_x,
    tile_x,
    D: tl.constexpr,
    DV: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RELATIVE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """As `local_attention_rows`, whose lse and mean it reads -> dk [B,Z',Y',X',H,D], dv [B,Z',Y',X',H,DV], dense.

    tile_z tile_y tile_x <= BLOCK_M keys a program, one program for each tile of each class of keys.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    parts_x = dilation_x * tl.cdiv(tl.cdiv(keys_x, dilation_x), tile_x)
    parts_y = dilation_y * tl.cdiv(tl.cdiv(keys_y, dilation_y), tile_y)
    parts_z = dilation_z * tl.cdiv(tl.cdiv(keys_z, dilation_z), tile_z)
    part = tl.program_id(0)
    part_x = part % parts_x
    part_y = part // parts_x % parts_y
    part_z = part // (parts_x * parts_y) % parts_z
    bh = part // (parts_x * parts_y * parts_z)
    h = tl.cast(bh % H, tl.int64)
    b = tl.cast(bh // H, tl.int64)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    # fmt: off
    own_x, at_x, x, low_x, span_x, class_x, size_x = _box(
        part_x, offs_m % tile_x, queries_x, keys_x, window_x, step_x, block_x, dilation_x,
        shift_x, causal_x, tile_x, border, sinks,
    )
    own_y, at_y, y, low_y, span_y, class_y, size_y = _box(
        part_y, offs_m // tile_x % tile_y, queries_y, keys_y, window_y, step_y, block_y, dilation_y,
        shift_y, causal_y, tile_y, border, 0,
    )
    own_z, at_z, z, low_z, span_z, class_z, size_z = _box(
        part_z, offs_m // (tile_x * tile_y), queries_z, keys_z, window_z, step_z, block_z, dilation_z,
        shift_z, causal_z, tile_z, border, 0,
    )
    # fmt: on
    own = own_x & own_y & own_z & (offs_m < tile_z * tile_y * tile_x)

    width = offs_d.to(tl.int64)
    width_v = offs_dv.to(tl.int64)
    places = b * stride_kb + h * stride_kh + z * stride_kz + y * stride_ky + x * stride_kx
    k_ptrs = k_ptr + places[:, None] + width[None, :] * stride_kd
    k = tl.load(k_ptrs, mask=own[:, None] & (offs_d[None, :] < D), other=0.0)  # [BLOCK_M, BLOCK_D]
    places = b * stride_vb + h * stride_vh + z * stride_vz + y * stride_vy + x * stride_vx
    v_ptrs = v_ptr + places[:, None] + width_v[None, :] * stride_vd
    v = tl.load(v_ptrs, mask=own[:, None] & (offs_dv[None, :] < DV), other=0.0)  # [BLOCK_M, BLOCK_DV]
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    entry = at_x * bias_x
    if RANK > 1:
        entry += at_y * bias_y
    if RANK > 2:
        entry += at_z * bias_z

    scale1 = tl.cast(scale, tl.float32)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    stop = span_x * span_y * span_z
    line = tl.maximum(span_x, 1)
    plane = tl.maximum(span_y, 1)
    for start_n in range(0, stop, BLOCK_N):
        slot = start_n + offs_n
        asked = slot < stop
        # fmt: off
        first_x, width_x, stand_x, n_x = _query(
            low_x + slot % line, size_x, class_x, queries_x, window_x, step_x, block_x, dilation_x,
            shift_x, causal_x, border,
        )
        seen = _within(at_x, first_x, width_x)  # [BLOCK_N, BLOCK_M]
        table = (window_x - 1 - stand_x) * bias_x + h * bias_h
        n_y = tl.zeros_like(n_x)
        n_z = tl.zeros_like(n_x)
        stand_y = stand_x
        stand_z = stand_x
        if RANK > 1:
            first_y, width_y, stand_y, n_y = _query(
                low_y + slot // line % plane, size_y, class_y, queries_y, window_y, step_y, block_y, dilation_y,
                shift_y, causal_y, border,
            )
            seen = seen & _within(at_y, first_y, width_y)
            table += (window_y - 1 - stand_y) * bias_y
        if RANK > 2:
            first_z, width_z, stand_z, n_z = _query(
                low_z + slot // (line * plane), size_z, class_z, queries_z, window_z, step_z, block_z, dilation_z,
                shift_z, causal_z, border,
            )
            seen = seen & _within(at_z, first_z, width_z)
            table += (window_z - 1 - stand_z) * bias_z
        # fmt: on
        rows = b * stride_qb + h * stride_qh + n_z * stride_qz + n_y * stride_qy + n_x * stride_qx
        q_ptrs = q_ptr + rows[:, None] + width[None, :] * stride_qd
        q = tl.load(q_ptrs, mask=asked[:, None] & (offs_d[None, :] < D), other=0.0)  # [BLOCK_N, BLOCK_D]
        rows = b * stride_gb + h * stride_gh + n_z * stride_gz + n_y * stride_gy + n_x * stride_gx
        g_ptrs = grad_ptr + rows[:, None] + width_v[None, :] * stride_gd
        g = tl.load(g_ptrs, mask=asked[:, None] & (offs_dv[None, :] < DV), other=0.0)  # [BLOCK_N, BLOCK_DV]
        if UPCAST:
            q = q.to(tl.float32)
            g = g.to(tl.float32)
        row = (((b * queries_z + n_z) * queries_y + n_y) * queries_x + n_x) * H + h
        lse = tl.load(lse_ptr + row, mask=asked, other=0.0)
        mean = tl.load(mean_ptr + row, mask=asked, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale1  # [BLOCK_N, BLOCK_M]
        if HAS_BIAS:
            logits += tl.load(bias_ptr + (table[:, None] + entry[None, :]), mask=seen, other=0.0).to(tl.float32)
        if HAS_RELATIVE:
            begin = 0
            logit_row = b * relative_b + h * relative_h + n_z * relative_z + n_y * relative_y + n_x * relative_x
            if RANK > 2:
                place = (begin + window_z - 1 - stand_z)[:, None] + at_z[None, :]
                found = tl.load(relative_ptr + logit_row[:, None] + place * relative_d, mask=seen, other=0.0)
                logits += found.to(tl.float32)
                begin += 2 * window_z - 1
            if RANK > 1:
                place = (begin + window_y - 1 - stand_y)[:, None] + at_y[None, :]
                found = tl.load(relative_ptr + logit_row[:, None] + place * relative_d, mask=seen, other=0.0)
                logits += found.to(tl.float32)
                begin += 2 * window_y - 1
            place = (begin + window_x - 1 - stand_x)[:, None] + at_x[None, :]
            found = tl.load(relative_ptr + logit_row[:, None] + place * relative_d, mask=seen, other=0.0)
            logits += found.to(tl.float32)
        if HAS_SINKS:
            ahead = at_x[None, :] < first_x[:, None]
            behind = (at_x[None, :] >= (first_x + width_x)[:, None]) & (causal_x == 0)
            seen = seen | ((at_x < sinks)[None, :] & (ahead | behind))
        seen = seen & asked[:, None]
        p = tl.where(seen, tl.exp2(logits * LOG2E - lse[:, None]), 0.0)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        ds = (p * (dp - mean[:, None])).to(q.dtype)
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)

    row = (((b * keys_z + z) * keys_y + y) * keys_x + x) * H + h
    dk_ptrs = dk_ptr + (row * D)[:, None] + offs_d[None, :]
    tl.store(dk_ptrs, (dk * scale1).to(dk_ptr.dtype.element_ty), mask=own[:, None] & (offs_d[None, :] < D))
    dv_ptrs = dv_ptr + (row * DV)[:, None] + offs_dv[None, :]
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=own[:, None] & (offs_dv[None, :] < DV))


@triton.jit
def _box(part, inside, queries, keys, window, step, block, dilation, shift, causal, tile, border, sinks):
    """One axis of a tile of keys. For each key [BLOCK_M]: whether it is there, its place in the class, its position
    (int64). For the tile: the first query that may see one of them, how many from there, the class, its keys."""
    begin = part // dilation * tile
    residue = part % dilation
    members = tl.cdiv(queries - residue, dilation)
    size = tl.cdiv(keys - residue, dilation)
    at = begin + inside
    own = at < size
    last = tl.minimum(begin + tile, size) - 1
    before = tl.where(causal != 0, window - step, (window - step + 1) // 2) - shift
    earliest = (_floor(begin - window + before, step) + 1) * block + shift
    latest = (_floor(last + before, step) + 1) * block + shift
    clamps = (border == 0) & (causal == 0)
    earliest = tl.where((clamps & (begin < window)) | (begin < sinks), 0, earliest)
    latest = tl.where((clamps & (last >= size - window)) | (begin < sinks), members, latest)
    earliest = tl.maximum(tl.minimum(earliest, members), 0)
    span = tl.where(last < begin, 0, tl.maximum(tl.minimum(latest, members) - earliest, 0))
    wide = tl.cast(residue, tl.int64)
    position = wide + tl.minimum(at, size - 1) * tl.cast(dilation, tl.int64)
    return own, at, tl.maximum(position, 0), earliest, span, wide, size


@triton.jit
def _query(place, size, residue, queries, window, step, block, dilation, shift, causal, border):
    """For queries at places of a class: the first key that each sees, how many, where it stands, its position."""
    place = tl.minimum(place, tl.maximum(tl.cdiv(queries - residue.to(tl.int32), dilation) - 1, 0))
    first, stop, stand = _window(place, size, window, step, block, shift, causal, border)
    return first, stop - first, stand, residue + place * tl.cast(dilation, tl.int64)


@triton.jit
def _floor(a, b):
    """a / b rounded down, for b > 0 and any a."""
    return (a - ((a % b) + b) % b) // b
