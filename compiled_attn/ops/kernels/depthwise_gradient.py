"""The gradient of a depthwise convolution's weight: a map times the result's gradient, summed over the picture.

A program sums one of the kernel's places for BLOCK_C channels over its share of the rows; neighbouring programs take
neighbouring places and read the same rows, which stay in the second-level cache. The shares are added up outside, in
order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl


@triton.jit
def depthwise_gradient(
    x_ptr,
    grad_ptr,
    sums_ptr,
    stride_xb,
    stride_xc,
    stride_xy,
    stride_xx,
    stride_gb,
    stride_gc,
    stride_gy,
    stride_gx,
    C,
    in_y,
    in_x,
    out_y,
    out_x,
    lines,
    kernel_x,
    step_y,
    step_x,
    pad_y,
    pad_x,
    dilation_y,
    dilation_x,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SHARES: tl.constexpr,
):
    """x [B,C,in_y,in_x], grad [B,C,out_y,out_x] -> sums [SHARES,I,J,C] float32. lines: rows of grad in all pictures.

    Programs: (place of the kernel, block of channels, share of the lines).
    """
    place = tl.program_id(0)
    i = place // kernel_x
    j = place % kernel_x
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = offs_c < C
    channel = offs_c.to(tl.int64)
    offs_x = tl.arange(0, BLOCK_X)

    acc = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
    for line in range(tl.program_id(2), lines, SHARES):
        b = (line // out_y).to(tl.int64)
        y = line % out_y
        row = y * step_y + i * dilation_y - pad_y
        if (row >= 0) & (row < in_y):
            x_line = x_ptr + b * stride_xb + row.to(tl.int64) * stride_xy
            grad_line = grad_ptr + b * stride_gb + y.to(tl.int64) * stride_gy
            for first in range(0, out_x, BLOCK_X):
                to = first + offs_x
                column = to * step_x + j * dilation_x - pad_x
                inside = (to < out_x) & (column >= 0) & (column < in_x)
                mask = inside[:, None] & inside_c[None, :]
                x_ptrs = x_line + column.to(tl.int64)[:, None] * stride_xx + channel[None, :] * stride_xc
                grad_ptrs = grad_line + to.to(tl.int64)[:, None] * stride_gx + channel[None, :] * stride_gc
                x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_X, BLOCK_C]
                grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_X, BLOCK_C]
                acc += x * grad
    places = tl.num_programs(0)
    sums_row = sums_ptr + (tl.program_id(2) * places + place).to(tl.int64) * C
    tl.store(sums_row + channel, tl.sum(acc, 0), mask=inside_c)
