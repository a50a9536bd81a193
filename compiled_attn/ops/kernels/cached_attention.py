"""A decode step's attention over a slot cache, split over the slots, with the mass of each slot.

    split    for a part of the slots of one key head: logits = scale q k^T, and the running softmax's peak, total, sum
    combine  the parts to one softmax; and, block by block of slots, mass = sum over the heads that share the key head

One query a text: the heads that share a key head are the rows of one product, so that each key and value is read once.
A text has few programs of its own, so the slots are divided among more of them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl


@triton.jit
def cached_attention_split(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    queries_ptr,
    logits_ptr,
    peak_ptr,
    total_ptr,
    sum_ptr,
    stride_qb,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_kd,
    stride_vb,
    stride_vg,
    stride_vs,
    stride_vd,
    scale,
    groups,
    share,
    slots,
    window,
    splits,
    part,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """q [B,H,D], k [B,G,S,D], v [B,G,S,DV], positions [B,G,S] and queries [B] int64 -> logits [B,H,S] in powers of two,
    peak and total [B,H,splits], sum [B,H,splits,DV], all float32.

    A program owns `part` slots, a multiple of BLOCK_S, of one key head, and BLOCK_H >= share rows.  window: 0 for none.
    PRECISION is `tl.dot`'s for float32; UPCAST multiplies in float32 (the interpreter multiplies bfloat16 bits).
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    split = (tl.program_id(0) % splits).to(tl.int64)
    g = (tl.program_id(0) // splits % groups).to(tl.int64)
    b = (tl.program_id(0) // splits // groups).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    width = offs_d.to(tl.int64)
    width_v = offs_dv.to(tl.int64)
    heads = (g * share + offs_h).to(tl.int64)
    is_head = offs_h < share
    q_ptrs = q_ptr + b * stride_qb + heads[:, None] * stride_qh + width[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=is_head[:, None] & (offs_d[None, :] < D), other=0.0)  # [BLOCK_H, BLOCK_D]
    if UPCAST:
        q = q.to(tl.float32)
    query = tl.load(queries_ptr + b)
    scale2 = tl.cast(scale, tl.float32) * LOG2E
    row = b * groups * share + heads  # of [B * H]
    peak = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_DV], tl.float32)
    for start in range(0, part, BLOCK_S):
        s = split * part + start + offs_s
        inside = s < slots
        position = tl.load(positions_ptr + (b * groups + g) * slots + s, mask=inside, other=-1)
        seen = (position >= 0) & (position <= query)
        seen = seen & ((window == 0) | (query - position < window))
        k_ptrs = k_ptr + b * stride_kb + g * stride_kg + s[None, :] * stride_ks + width[:, None] * stride_kd
        k = tl.load(k_ptrs, mask=inside[None, :] & (offs_d[:, None] < D), other=0.0)  # [BLOCK_D, BLOCK_S]
        if UPCAST:
            k = k.to(tl.float32)
        logits = tl.dot(q, k, input_precision=PRECISION) * scale2  # [BLOCK_H, BLOCK_S]
        logits = tl.where(seen[None, :], logits, float("-inf"))
        tl.store(logits_ptr + row[:, None] * slots + s[None, :], logits, mask=is_head[:, None] & inside[None, :])
        peak_new = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(peak_new == float("-inf"), 0.0, peak_new)
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v_ptrs = v_ptr + b * stride_vb + g * stride_vg + s[:, None] * stride_vs + width_v[None, :] * stride_vd
        held = seen[:, None] & (offs_dv[None, :] < DV)
        v = tl.load(v_ptrs, mask=held, other=0.0)  # [BLOCK_S, BLOCK_DV]
        p = p.to(v.dtype)
        if UPCAST:
            p = p.to(tl.float32)
            v = v.to(tl.float32)
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
        peak = peak_new
    at = row * splits + split
    tl.store(peak_ptr + at, peak, mask=is_head)
    tl.store(total_ptr + at, total, mask=is_head)
    tl.store(sum_ptr + at[:, None] * DV + offs_dv[None, :], acc, mask=is_head[:, None] & (offs_dv[None, :] < DV))


@triton.jit
def cached_attention_combine(
    logits_ptr,
    peak_ptr,
    total_ptr,
    sum_ptr,
    out_ptr,
    mass_ptr,
    share,
    slots,
    splits,
    blocks,
    DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The split kernel's parts -> out [B,H,DV] in q's type, mass [B,G,S] float32.

    A program owns BLOCK_S slots of one key head; the first of a head writes its share of `out` too. A query that sees
    no slot gives zeros.
    """
    block = tl.program_id(0) % blocks
    owner = (tl.program_id(0) // blocks).to(tl.int64)  # b * groups + g
    s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_split = tl.arange(0, BLOCK_SPLITS)
    offs_dv = tl.arange(0, BLOCK_DV)
    is_split = offs_split < splits
    mass = tl.zeros([BLOCK_S], tl.float32)
    for h in range(0, share):
        row = owner * share + h
        peaks = tl.load(peak_ptr + row * splits + offs_split, mask=is_split, other=float("-inf"))
        totals = tl.load(total_ptr + row * splits + offs_split, mask=is_split, other=0.0)
        peak = tl.max(peaks, 0)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        factors = tl.exp2(peaks - base)  # [BLOCK_SPLITS]
        total = tl.sum(totals * factors, 0)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        logits = tl.load(logits_ptr + row * slots + s, mask=s < slots, other=float("-inf"))
        mass += tl.exp2(logits - base) * inverse
        if block == 0:
            held = is_split[:, None] & (offs_dv[None, :] < DV)
            sums_at = (row * splits + offs_split)[:, None] * DV + offs_dv[None, :]
            sums = tl.load(sum_ptr + sums_at, mask=held, other=0.0)  # [BLOCK_SPLITS, BLOCK_DV]
            out = tl.sum(sums * factors[:, None], 0) * inverse
            tl.store(out_ptr + row * DV + offs_dv, out.to(out_ptr.dtype.element_ty), mask=offs_dv < DV)
    tl.store(mass_ptr + owner * slots + s, mass, mask=s < slots)
