"""Gradients of local attention by tiles of queries: dq, and what a bias table or logits of the query get.

The keys of a tile are gone through twice, as the forward goes through them (local_attention.py): once for the sum of
the softmax and the mean of its gradient, which local_attention_columns.py reads too, once for dq. No scores are kept.
Table and logits are added up atomically in float32, so their last bits depend on the order of programs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl

from compiled_attn.ops.kernels.local_attention import _parts, _tile, _within


@triton.jit
def local_attention_rows(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    relative_ptr,
    grad_ptr,
    dq_ptr,
    lse_ptr,
    mean_ptr,
    dbias_ptr,
    drelative_ptr,
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
    """q, k, v, bias, relative, axes: as `local_attention` takes them; grad [B,Z,Y,X,H,DV] of its result.

    -> dq [B,Z,Y,X,H,D]; lse and mean [B,Z,Y,X,H] float32: log2 of the softmax's sum, and its gradient's mean under the
    probabilities; all dense. Added to: dbias [H, entries of the table], drelative [B,Z,Y,X,H,entries], float32, dense.
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
    grads = b * stride_gb + h * stride_gh + z * stride_gz + y * stride_gy + x * stride_gx
    g_ptrs = grad_ptr + grads[:, None] + width_v[None, :] * stride_gd
    g = tl.load(g_ptrs, mask=own[:, None] & (offs_dv[None, :] < DV), other=0.0)  # [BLOCK_N, BLOCK_DV]
    if UPCAST:
        q = q.to(tl.float32)
        g = g.to(tl.float32)
    k_base = k_ptr + b * stride_kb + h * stride_kh
    v_base = v_ptr + b * stride_vb + h * stride_vh

    # a distance's place in the table is the key's share plus the query's
    table = (window_x - 1 - stand_x) * bias_x
    entries = 2 * window_x - 1
    if RANK > 1:
        table += (window_y - 1 - stand_y) * bias_y
        entries += 2 * window_y - 1
    if RANK > 2:
        table += (window_z - 1 - stand_z) * bias_z
        entries += 2 * window_z - 1
    table = table + h * bias_h
    logit_row = b * relative_b + h * relative_h + z * relative_z + y * relative_y + x * relative_x
    row = (((b * queries_z + z) * queries_y + y) * queries_x + x) * H + h  # [BLOCK_N], in dense results
    dlogit_row = row * tl.cast(entries, tl.int64)

    scale1 = tl.cast(scale, tl.float32)
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_N], tl.float32)
    lse = tl.zeros([BLOCK_N], tl.float32)
    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    front = 0
    if HAS_SINKS:
        front = tl.minimum(sinks, keys_x)
    stop = front + span_x * span_y * span_z
    line = tl.maximum(span_x, 1)
    plane = tl.maximum(span_y, 1)
    turns = tl.cdiv(stop, BLOCK_M)
    for turn in range(0, 2 * turns):
        again = turn >= turns
        if turn == turns:
            mean = mean / tl.where(total == 0.0, 1.0, total)
            lse = tl.where(total == 0.0, 0.0, peak + tl.log2(tl.where(total == 0.0, 1.0, total)))
        start_m = tl.where(again, turn - turns, turn) * BLOCK_M
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
        k_ptrs = k_base + key[:, None] + width[None, :] * stride_kd
        k = tl.load(k_ptrs, mask=there[:, None] & (offs_d[None, :] < D), other=0.0)  # [BLOCK_M, BLOCK_D]
        v_ptrs = v_base + value[:, None] + width_v[None, :] * stride_vd
        v = tl.load(v_ptrs, mask=there[:, None] & (offs_dv[None, :] < DV), other=0.0)  # [BLOCK_M, BLOCK_DV]
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale1  # [BLOCK_N, BLOCK_M]
        if HAS_BIAS:
            entry = at_x * bias_x
            if RANK > 1:
                entry += at_y * bias_y
            if RANK > 2:
                entry += at_z * bias_z
            place = table[:, None] + entry[None, :]
            logits += tl.load(bias_ptr + place, mask=seen, other=0.0).to(tl.float32)
        begin = 0
        if HAS_RELATIVE:
            if RANK > 2:
                entry_z = (begin + window_z - 1 - stand_z)[:, None] + at_z[None, :]
                found = tl.load(relative_ptr + logit_row[:, None] + entry_z * relative_d, mask=seen, other=0.0)
                logits += found.to(tl.float32)
                begin += 2 * window_z - 1
            if RANK > 1:
                entry_y = (begin + window_y - 1 - stand_y)[:, None] + at_y[None, :]
                found = tl.load(relative_ptr + logit_row[:, None] + entry_y * relative_d, mask=seen, other=0.0)
                logits += found.to(tl.float32)
                begin += 2 * window_y - 1
            entry_x = (begin + window_x - 1 - stand_x)[:, None] + at_x[None, :]
            found = tl.load(relative_ptr + logit_row[:, None] + entry_x * relative_d, mask=seen, other=0.0)
            logits += found.to(tl.float32)
        tabled = seen
        if HAS_SINKS:
            ahead = key_x[None, :] < first_x[:, None]
            behind = (key_x[None, :] >= (first_x + width_x)[:, None]) & (causal_x == 0)
            seen = seen | (is_sink[None, :] & (ahead | behind))
        logits = tl.where(seen, logits * LOG2E, float("-inf"))
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if again:
            p = tl.where(seen, tl.exp2(logits - lse[:, None]), 0.0)
            ds = p * (dp - mean[:, None])
            if HAS_BIAS:
                tl.atomic_add(dbias_ptr + place, ds, mask=tabled & own[:, None])
            if HAS_RELATIVE:
                if RANK > 2:
                    tl.atomic_add(drelative_ptr + dlogit_row[:, None] + entry_z, ds, mask=tabled & own[:, None])
                if RANK > 1:
                    tl.atomic_add(drelative_ptr + dlogit_row[:, None] + entry_y, ds, mask=tabled & own[:, None])
                tl.atomic_add(drelative_ptr + dlogit_row[:, None] + entry_x, ds, mask=tabled & own[:, None])
            ds = ds.to(k.dtype)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        else:
            peak_new = tl.maximum(peak, tl.max(logits, 1))
            base = tl.where(peak_new == float("-inf"), 0.0, peak_new)
            p = tl.exp2(logits - base[:, None])
            shrink = tl.exp2(peak - base)
            total = total * shrink + tl.sum(p, 1)
            mean = mean * shrink + tl.sum(p * dp, 1)
            peak = peak_new

    dq_ptrs = dq_ptr + (row * D)[:, None] + offs_d[None, :]
    tl.store(dq_ptrs, (dq * scale1).to(dq_ptr.dtype.element_ty), mask=own[:, None] & (offs_d[None, :] < D))
    tl.store(lse_ptr + row, lse, mask=own)
    tl.store(mean_ptr + row, mean, mask=own)
