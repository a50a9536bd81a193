"""A depthwise convolution with bias, layer norm over channels, activation, gate and residual in one kernel.

A program holds BLOCK_X neighbouring columns of one row by BLOCK_C channels in float32 registers and goes through the
kernel's places; neighbouring places read the same lines, which stay in the first-level cache. With the norm a program
holds all channels of its pixels.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl


@triton.jit
def depthwise(
    x_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    stride_xb,
    stride_xc,
    stride_xy,
    stride_xx,
    stride_gb,
    stride_gc,
    stride_gy,
    stride_gx,
    stride_rb,
    stride_rc,
    stride_ry,
    stride_rx,
    C,
    in_y,
    in_x,
    out_y,
    out_x,
    kernel_y,
    kernel_x,
    step_y,
    step_x,
    pad_y,
    pad_x,
    dilation_y,
    dilation_x,
    eps,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    NORM_WEIGHT: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x [B,C,in_y,in_x], weight [I,J,C] contiguous, gate and residual as out -> out [B,C,out_y,out_x] in channels last.

    Programs: (batch, row of the result, block of columns) along the first axis, block of channels along the second.
    """
    blocks_x = tl.cdiv(out_x, BLOCK_X)
    part = tl.program_id(0)
    offs_x = part % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)
    y = part // blocks_x % out_y
    b = (part // blocks_x // out_y).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = offs_c < C
    channel = offs_c.to(tl.int64)

    acc = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
    for i in range(0, kernel_y):
        row = y * step_y + i * dilation_y - pad_y
        if (row >= 0) & (row < in_y):
            line_ptr = x_ptr + b * stride_xb + row.to(tl.int64) * stride_xy
            for j in range(0, kernel_x):
                column = offs_x * step_x + j * dilation_x - pad_x
                mask = ((column >= 0) & (column < in_x))[:, None] & inside_c[None, :]
                ptrs = line_ptr + column.to(tl.int64)[:, None] * stride_xx + channel[None, :] * stride_xc
                x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_X, BLOCK_C]
                tap_ptrs = weight_ptr + tl.cast(i * kernel_x + j, tl.int64) * C + channel
                w = tl.load(tap_ptrs, mask=inside_c, other=0.0).to(tl.float32)  # [BLOCK_C]
                acc += x * w[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    if NORM:
        mean = tl.sum(acc, 1) / C  # [BLOCK_X]
        centred = tl.where(inside_c[None, :], acc - mean[:, None], 0.0)
        acc = centred * tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)[:, None]
        if NORM_WEIGHT:
            acc *= tl.load(norm_weight_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)[None, :]
        if NORM_BIAS:
            acc += tl.load(norm_bias_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    acc = _activated(acc, ACTIVATION)
    mask = (offs_x < out_x)[:, None] & inside_c[None, :]
    wide_x = offs_x.to(tl.int64)[:, None]
    if HAS_GATE:
        gate_row = gate_ptr + b * stride_gb + y.to(tl.int64) * stride_gy
        acc *= tl.load(gate_row + wide_x * stride_gx + channel[None, :] * stride_gc, mask=mask).to(tl.float32)
    if HAS_RESIDUAL:
        residual_row = residual_ptr + b * stride_rb + y.to(tl.int64) * stride_ry
        acc += tl.load(residual_row + wide_x * stride_rx + channel[None, :] * stride_rc, mask=mask).to(tl.float32)
    out_row = out_ptr + ((b * out_y + y) * out_x) * C
    tl.store(out_row + wide_x * C + channel[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """The activation by name, as torch computes it; a NaN stays one."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = _clamped(x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "hardswish":
        x = x * (_clamped(x + 3.0) * (1.0 / 6.0))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def _clamped(x):
    x = tl.where(x < 0.0, 0.0, x)
    return tl.where(x > 6.0, 6.0, x)
