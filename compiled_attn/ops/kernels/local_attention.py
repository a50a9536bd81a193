"""Local attention in one to three dimensions: a tile of queries against the union of its windows, online softmax.

A program owns at most BLOCK_N queries of one head: a box in space, all of one class where an axis is dilated (so that
they are neighbors among their keys). Along each axis their windows lie in one range of keys; the program goes through
the box of these ranges, BLOCK_M keys at a time, and counts for each query what lies in its own window. Every pattern of
ops/local_geometry.py is, along an axis, a range [first, stop) of keys for each query; `_window` finds it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl


@triton.jit
def local_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    relative_ptr,
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
    """q [B,Z,Y,X,H,D], k [B,Z',Y',X',H,D], v [B,Z',Y',X',H,DV] -> out [B,Z,Y,X,H,DV], last stride 1.

    bias [H,*2 w - 1], relative [B,Z,Y,X,H,sum of 2 w - 1]. Axes: what local_geometry.Axis says (step is its stride);
    tile_z tile_y tile_x <= BLOCK_N queries a program, one program for each tile of each class; an axis beyond RANK has
    one place. border: 0 clamp, 1 mask, 2 zero. scale: not 0 where anything is added to the scores. PRECISION is
    `tl.dot`'s for float32; UPCAST multiplies in float32 (the interpreter multiplies bfloat16 bits). A query that sees
    no key gives zeros.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    NOWHERE: tl.constexpr = 1 << 30  # a place that no window reaches
    parts_x = _parts(queries_x, block_x, dilation_x, shift_x, tile_x)
    parts_y = _parts(queries_y, block_y, dilation_y, shift_y, tile_y)
    parts_z = _parts(queries_z, block_z, dilation_z, shift_z, tile_z)
    part = tl.program_id(0)
    part_x = part % parts_x
    part_y = part // parts_x % parts_y
    part_z = part // (parts_x * parts_y) % parts_z
    bh = part // (parts_x * parts_y * parts_z)
    h = tl.cast(bh % H, tl.int64)
    b = tl.cast(bh // H, tl.int64)

    offs_n = tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    # fmt: off
    own_x, x, first_x, width_x, stand_x, low_x, span_x, class_x, size_x = _tile(
        part_x, offs_n % tile_x, queries_x, keys_x, window_x, step_x, block_x, dilation_x,
        shift_x, causal_x, tile_x, border,
    )
    own_y, y, first_y, width_y, stand_y, low_y, span_y, class_y, size_y = _tile(
        part_y, offs_n // tile_x % tile_y, queries_y, keys_y, window_y, step_y, block_y, dilation_y,
        shift_y, causal_y, tile_y, border,
    )
    own_z, z, first_z, width_z, stand_z, low_z, span_z, class_z, size_z = _tile(
        part_z, offs_n // (tile_x * tile_y), queries_z, keys_z, window_z, step_z, block_z, dilation_z,
        shift_z, causal_z, tile_z, border,
    )
    # fmt: on
    own = own_x & own_y & own_z & (offs_n < tile_z * tile_y * tile_x)

    width = offs_d.to(tl.int64)
    width_v = offs_dv.to(tl.int64)
    rows = b * stride_qb + h * stride_qh + z * stride_qz + y * stride_qy + x * stride_qx
    q_ptrs = q_ptr + rows[:, None] + width[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=own[:, None] & (offs_d[None, :] < D), other=0.0)  # [BLOCK_N, BLOCK_D]
    if UPCAST:
        q = q.to(tl.float32)
    k_base = k_ptr + b * stride_kb + h * stride_kh
    v_base = v_ptr + b * stride_vb + h * stride_vh

    # a distance's place in the table is the key's share plus the query's
    bias_base = bias_ptr + h * bias_h
    table = (window_x - 1 - stand_x) * bias_x
    if RANK > 1:
        table += (window_y - 1 - stand_y) * bias_y
    if RANK > 2:
        table += (window_z - 1 - stand_z) * bias_z
    logit_row = b * relative_b + h * relative_h + z * relative_z + y * relative_y + x * relative_x

    # what is added begins the product's sum, in its layout: after it, Triton would take the softmax in two layouts
    unscale = 1.0 / tl.cast(scale, tl.float32)
    scale2 = tl.cast(scale, tl.float32) * LOG2E
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    front = 0
    if HAS_SINKS:
        front = tl.minimum(sinks, keys_x)
    stop = front + span_x * span_y * span_z
    line = tl.maximum(span_x, 1)
    plane = tl.maximum(span_y, 1)
    for start_m in range(0, stop, BLOCK_M):
        slot = start_m + offs_m
        counted = slot < stop
        if HAS_SINKS:
            is_sink = slot < front
            counted = counted & (slot >= front)
            slot = tl.maximum(slot - front, 0)
        at_x = slot
        if RANK > 1:
            at_x = slot % line
        at_x = tl.where(counted, low_x + at_x, NOWHERE)  # [BLOCK_M], inside the class
        there = (at_x >= 0) & (at_x < size_x)
        key_x = at_x
        if HAS_SINKS:
            key_x = tl.where(is_sink, start_m + offs_m, at_x)
            there = there | is_sink
        seen = _within(at_x, first_x, width_x)  # [BLOCK_N, BLOCK_M]
        key = (class_x + key_x * tl.cast(dilation_x, tl.int64)) * stride_kx
        value = (class_x + key_x * tl.cast(dilation_x, tl.int64)) * stride_vx
        at_y = slot
        at_z = slot
        if RANK > 1:
            at_y = slot // line
            if RANK > 2:
                at_z = low_z + at_y // plane
                at_y = at_y % plane
                there = there & (at_z >= 0) & (at_z < size_z)
                seen = seen & _within(at_z, first_z, width_z)
                key += (class_z + at_z * tl.cast(dilation_z, tl.int64)) * stride_kz
                value += (class_z + at_z * tl.cast(dilation_z, tl.int64)) * stride_vz
            at_y = low_y + at_y
            there = there & (at_y >= 0) & (at_y < size_y)
            seen = seen & _within(at_y, first_y, width_y)
            key += (class_y + at_y * tl.cast(dilation_y, tl.int64)) * stride_ky
            value += (class_y + at_y * tl.cast(dilation_y, tl.int64)) * stride_vy
        k_ptrs = k_base + key[None, :] + width[:, None] * stride_kd
        k = tl.load(k_ptrs, mask=there[None, :] & (offs_d[:, None] < D), other=0.0)  # [BLOCK_D, BLOCK_M]
        if UPCAST:
            k = k.to(tl.float32)
        added = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if HAS_BIAS:
            entry = at_x * bias_x
            if RANK > 1:
                entry += at_y * bias_y
            if RANK > 2:
                entry += at_z * bias_z
            found = tl.load(bias_base + (table[:, None] + entry[None, :]), mask=seen, other=0.0)
            added += found.to(tl.float32)
        if HAS_RELATIVE:
            begin = 0
            if RANK > 2:
                added += _relative(relative_ptr, logit_row, begin, window_z, stand_z, at_z, relative_d, seen)
                begin += 2 * window_z - 1
            if RANK > 1:
                added += _relative(relative_ptr, logit_row, begin, window_y, stand_y, at_y, relative_d, seen)
                begin += 2 * window_y - 1
            added += _relative(relative_ptr, logit_row, begin, window_x, stand_x, at_x, relative_d, seen)
        if HAS_BIAS or HAS_RELATIVE:
            logits = tl.dot(q, k, added * unscale, input_precision=PRECISION) * scale2  # [BLOCK_N, BLOCK_M]
        else:
            logits = tl.dot(q, k, input_precision=PRECISION) * scale2
        if HAS_SINKS:
            ahead = key_x[None, :] < first_x[:, None]
            behind = (key_x[None, :] >= (first_x + width_x)[:, None]) & (causal_x == 0)
            seen = seen | (is_sink[None, :] & (ahead | behind))
        logits = tl.where(seen, logits, float("-inf"))
        peak_new = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(peak_new == float("-inf"), 0.0, peak_new)
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v_ptrs = v_base + value[:, None] + width_v[None, :] * stride_vd
        v = tl.load(v_ptrs, mask=there[:, None] & (offs_dv[None, :] < DV), other=0.0)  # [BLOCK_M, BLOCK_DV]
        p = p.to(v.dtype)
        if UPCAST:
            p = p.to(tl.float32)
            v = v.to(tl.float32)
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
        peak = peak_new

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_rows = b * stride_ob + h * stride_oh + z * stride_oz + y * stride_oy + x * stride_ox
    out_ptrs = out_ptr + out_rows[:, None] + offs_dv[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=own[:, None] & (offs_dv[None, :] < DV))


@triton.jit
def _parts(queries, block, dilation, shift, tile):
    """Tiles of all classes along an axis; where windows are shifted, the first tile begins with the first window."""
    lead = tl.where(shift > 0, block - shift, 0)
    return dilation * tl.cdiv(tl.cdiv(queries, dilation) + lead, tile)


@triton.jit
def _tile(part, inside, queries, keys, window, step, block, dilation, shift, causal, tile, border):
    """One axis of a tile. For each query [BLOCK_N]: whether it is there, its position (int64), the first key that it
    sees, how many, and where it stands among them. For the tile: first key, how many, the class, keys in the class."""
    begin = part // dilation * tile - tl.where(shift > 0, block - shift, 0)
    residue = part % dilation
    members = tl.cdiv(queries - residue, dilation)
    size = tl.cdiv(keys - residue, dilation)
    place = begin + inside
    own = (place >= 0) & (place < members)
    place = tl.maximum(tl.minimum(place, members - 1), 0)
    first, stop, stand = _window(place, size, window, step, block, shift, causal, border)
    earliest = tl.maximum(begin, 0)
    latest = tl.minimum(begin + tile, members) - 1
    low, _, _ = _window(earliest, size, window, step, block, shift, causal, border)
    _, high, _ = _window(tl.maximum(latest, 0), size, window, step, block, shift, causal, border)
    span = tl.where(latest < earliest, 0, tl.maximum(high - low, 0))
    wide = tl.cast(residue, tl.int64)
    return own, wide + place * tl.cast(dilation, tl.int64), first, stop - first, stand, low, span, wide, size


@triton.jit
def _window(place, size, window, step, block, shift, causal, border):
    """The keys [first, stop) that the query at `place` of its class sees, and where it stands among them."""
    number = (place - shift + block) // block - 1  # of its block; the dividend is positive
    stand = place + number * (step - block)
    before = tl.where(causal != 0, window - step, (window - step + 1) // 2)
    start = number * step + shift - before
    inward = tl.maximum(tl.minimum(start, size - window), 0)
    start = tl.where((border == 0) & (causal == 0), inward, start)
    stop = tl.where(causal != 0, tl.minimum(start + window, stand + 1), start + window)
    first = tl.where(border == 2, start, tl.maximum(start, 0))
    stop = tl.where(border == 2, stop, tl.minimum(stop, size))
    return first, tl.maximum(stop, first), stand


@triton.jit
def _within(at, first, width):
    """[BLOCK_N, BLOCK_M]: whether key `at` is one of `width` keys from `first`; below it, the distance wraps."""
    return (at[None, :] - first[:, None]).to(tl.uint32) < width.to(tl.uint32)[:, None]


@triton.jit
def _relative(relative_ptr, row, begin, window, stand, at, stride, seen):
    """[BLOCK_N, BLOCK_M] float32: one axis's logits of the query, for the distance of each key."""
    entry = (begin + window - 1 - stand)[:, None] + at[None, :]
    return tl.load(relative_ptr + row[:, None] + entry * stride, mask=seen, other=0.0).to(tl.float32)
