"""Mixing of neighborhoods by weights that are given: a program mixes the windows of BLOCK_N queries, slot by slot.

Every query of a program reads its own key of a slot; neighboring queries' windows overlap, and what one has read the
others find in the first-level cache. Nothing is gathered into memory.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl


@triton.jit
def neighborhood(
    weights_ptr,
    v_ptr,
    out_ptr,
    stride_wb,
    stride_wz,
    stride_wy,
    stride_wx,
    stride_wh,
    stride_wm,
    stride_wk,
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
    stride_om,
    H,
    M,
    DV,
    border,
    queries_z,
    keys_z,
    window_z,
    step_z,
    block_z,
    dilation_z,
    shift_z,
    queries_y,
    keys_y,
    window_y,
    step_y,
    block_y,
    dilation_y,
    shift_y,
    queries_x,
    keys_x,
    window_x,
    step_x,
    block_x,
    dilation_x,
    shift_x,
    BLOCK_N: tl.constexpr,
    BLOCK_MIX: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """weights [B,Z,Y,X,H,M,K], v [B,Z',Y',X',H,DV] -> out [B,Z,Y,X,H,M,DV], last stride 1.

    Axes: what local_geometry.Axis says (step is its stride); a missing one has one place. border: 0 clamp, else keys
    beyond the ends add nothing. Programs: (picture, head, block of queries) first, block of DV second.
    """
    queries = queries_z * queries_y * queries_x
    blocks = tl.cdiv(queries, BLOCK_N)
    part = tl.program_id(0)
    n = part % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.cast(part // blocks % H, tl.int64)
    b = tl.cast(part // blocks // H, tl.int64)
    own = n < queries
    n = tl.minimum(n, queries - 1)
    x = n % queries_x
    y = n // queries_x % queries_y
    z = n // (queries_x * queries_y)
    offs_m = tl.arange(0, BLOCK_MIX)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mixed = own[:, None] & (offs_m < M)[None, :]
    wide = own[:, None] & (offs_d < DV)[None, :]
    row = z.to(tl.int64) * stride_wz + y.to(tl.int64) * stride_wy + x.to(tl.int64) * stride_wx
    w_ptrs = weights_ptr + b * stride_wb + h * stride_wh + row[:, None] + offs_m[None, :] * stride_wm
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh + offs_d.to(tl.int64)[None, :] * stride_vd
    start_x, class_x, size_x = _begin(x, keys_x, window_x, step_x, block_x, dilation_x, shift_x, border)
    start_y, class_y, size_y = _begin(y, keys_y, window_y, step_y, block_y, dilation_y, shift_y, border)
    start_z, class_z, size_z = _begin(z, keys_z, window_z, step_z, block_z, dilation_z, shift_z, border)

    acc = tl.zeros([BLOCK_N, BLOCK_MIX, BLOCK_D], tl.float32)
    for slot in range(0, window_z * window_y * window_x):
        at_x = start_x + slot % window_x
        at_y = start_y + slot // window_x % window_y
        at_z = start_z + slot // (window_x * window_y)
        there = (at_x >= 0) & (at_x < size_x) & (at_y >= 0) & (at_y < size_y) & (at_z >= 0) & (at_z < size_z)
        key = (class_x + at_x * tl.cast(dilation_x, tl.int64)) * stride_vx
        key += (class_y + at_y * tl.cast(dilation_y, tl.int64)) * stride_vy
        key += (class_z + at_z * tl.cast(dilation_z, tl.int64)) * stride_vz
        v = tl.load(v_ptrs + key[:, None], mask=wide & there[:, None], other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        w = tl.load(w_ptrs + slot * tl.cast(stride_wk, tl.int64), mask=mixed & there[:, None], other=0.0)
        acc += w.to(tl.float32)[:, :, None] * v[:, None, :]
    place = z.to(tl.int64) * stride_oz + y.to(tl.int64) * stride_oy + x.to(tl.int64) * stride_ox
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + place[:, None] + offs_m[None, :] * stride_om
    mask = mixed[:, :, None] & (offs_d < DV)[None, None, :]
    tl.store(out_ptrs[:, :, None] + offs_d[None, None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _begin(position, keys, window, step, block, dilation, shift, border):
    """For queries at positions of an axis: their windows' first keys, their classes (int64), the classes' sizes."""
    residue = position % dilation
    size = tl.cdiv(keys - residue, dilation)
    number = (position // dilation - shift + block) // block - 1
    start = number * step + shift - (window - step + 1) // 2
    start = tl.where(border == 0, tl.maximum(tl.minimum(start, size - window), 0), start)
    return start, residue.to(tl.int64), size
