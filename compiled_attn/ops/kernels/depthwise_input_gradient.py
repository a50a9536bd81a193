"""The gradient of a depthwise convolution's input: every position sums over the kernel's places that read it.

A program holds BLOCK_X neighbouring columns of one row of the input by BLOCK_C channels in float32 registers and goes
through the kernel's places, past those that no position of the row meets. Neighbouring places read the same lines,
which stay in the first-level cache; at a stride a place gives to some of the columns only.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl


@triton.jit
def depthwise_input_gradient(
    grad_ptr,
    weight_ptr,
    out_ptr,
    stride_gb,
    stride_gc,
    stride_gy,
    stride_gx,
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
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad [B,C,out_y,out_x], weight [I,J,C] contiguous -> out [B,C,in_y,in_x] in channels last.

    Programs: (batch, row of the input, block of columns) along the first axis, block of channels along the second.
    """
    blocks_x = tl.cdiv(in_x, BLOCK_X)
    part = tl.program_id(0)
    offs_x = part % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)
    y = part // blocks_x % in_y
    b = (part // blocks_x // in_y).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = offs_c < C
    channel = offs_c.to(tl.int64)

    acc = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
    for i in range(0, kernel_y):
        down = y + pad_y - i * dilation_y
        row = down // step_y
        if (down >= 0) & (row * step_y == down) & (row < out_y):
            line_ptr = grad_ptr + b * stride_gb + row.to(tl.int64) * stride_gy
            for j in range(0, kernel_x):
                across = offs_x + pad_x - j * dilation_x
                column = across // step_x
                mask = ((across >= 0) & (column * step_x == across) & (column < out_x))[:, None] & inside_c[None, :]
                ptrs = line_ptr + column.to(tl.int64)[:, None] * stride_gx + channel[None, :] * stride_gc
                grad = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_X, BLOCK_C]
                tap_ptrs = weight_ptr + tl.cast(i * kernel_x + j, tl.int64) * C + channel
                w = tl.load(tap_ptrs, mask=inside_c, other=0.0).to(tl.float32)  # [BLOCK_C]
                acc += grad * w[None, :]
    mask = (offs_x < in_x)[:, None] & inside_c[None, :]
    out_row = out_ptr + ((b * in_y + y) * in_x) * C
    out_ptrs = out_row + offs_x.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
