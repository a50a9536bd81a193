"""The gradient of a depthwise convolution's weight: the map times the result's gradient, summed over the picture.

    out[i, j] = sum over (b, y, x) of grad[b, :, y, x] * x[b, :, y * stride + i * dilation - padding, ...]

channel by channel; x is 0 beyond its border.

Letters: B batch, C channels, Y X positions, I J the kernel's rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from compiled_attn.ir.errors import OpError
from compiled_attn.ir.op import Cost, by_vjp, define
from compiled_attn.ops.depthwise import Pair, check_pairs, evenly, out_sizes, to_pad
from compiled_attn.ops.rules import bytes_of, differ, want_equal, want_floating, want_rank, widened

Tensor = torch.Tensor
OP = "depthwise_weight_gradient"


def weight_gradient_reference(
    x: Tensor,
    grad: Tensor,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """For each of the kernel's places, the sum of a shifted map times the gradient."""
    _check(x, grad, kernel, stride, padding, dilation)
    wide, (rows, columns) = widened(x.dtype), grad.shape[2:]
    padded, towards = F.pad(x.to(wide), to_pad(padding)), grad.to(wide)
    out = padded.new_empty((kernel[0], kernel[1], x.shape[1]))
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            down = slice(i * dilation[0], i * dilation[0] + (rows - 1) * stride[0] + 1, stride[0])
            right = slice(j * dilation[1], j * dilation[1] + (columns - 1) * stride[1] + 1, stride[1])
            out[i, j] = (padded[:, :, down, right] * towards).sum((0, 2, 3))
    return out.to(x.dtype)


def weight_gradient_shape(
    x: Tensor,
    grad: Tensor,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    _check(x, grad, kernel, stride, padding, dilation)
    return x.new_empty((kernel[0], kernel[1], x.shape[1]))


def weight_gradient_cost(
    x: Tensor,
    grad: Tensor,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
) -> Cost:
    """The multiply-adds of the kernel's places, those beyond the border counted; each map once."""
    del stride, padding, dilation
    places = kernel[0] * kernel[1]
    return Cost(2 * places * grad.numel(), bytes_of(x, grad) + places * x.shape[1] * x.element_size())


def weight_gradient_decomposition(
    x: Tensor,
    grad: Tensor,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """ATen's own, of a convolution whose weight's values it does not read."""
    channels = x.shape[1]
    weight = x.new_zeros((channels, 1, kernel[0], kernel[1]))
    x, even = evenly(x, padding)
    pairs = (list(stride), even, list(dilation))
    wanted = [False, True, False]
    found: Any = torch.ops.aten.convolution_backward(grad, x, weight, None, *pairs, False, [0, 0], channels, wanted)
    return found[1].squeeze(1).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


# x [B, C, Y, X], grad [B, C, Y', X'] -> [I, J, C] contiguous. Pairs: one number for rows, one for columns; padding: or
# four, the ends.
depthwise_weight_gradient = define(
    OP,
    "(Tensor x, Tensor grad, *, int[2] kernel, int[2] stride=[1, 1], int[] padding=[0, 0], int[2] dilation=[1, 1]) "
    "-> Tensor",
    reference=weight_gradient_reference,
    shape=weight_gradient_shape,
    gradient=by_vjp(weight_gradient_decomposition),
    cost=weight_gradient_cost,
    decomposition=weight_gradient_decomposition,
)


def _check(x: Tensor, grad: Tensor, kernel: Pair, stride: Pair, padding: Sequence[int], dilation: Pair) -> None:
    """Raises OpError where the arguments clash."""
    want_rank(OP, "x", x, "BCYX")
    want_rank(OP, "grad", grad, "BCYX")
    want_floating(OP, "x", x)
    want_equal(OP, "the batch size", "x", x.shape[0], "grad", grad.shape[0])
    want_equal(OP, "the number of channels", "x", x.shape[1], "grad", grad.shape[1])
    check_pairs(OP, stride, padding, dilation)
    wanted = out_sizes(x.shape[2:], kernel, stride, padding, dilation)
    if any(differ(a, b) for a, b in zip(grad.shape[2:], wanted, strict=True)):
        raise OpError(
            f"{OP}: grad is not of the result's size",
            facts=f"grad has {list(grad.shape[2:])} rows and columns, the convolution's result {wanted}",
            do="give the stride, padding and dilation of the convolution whose gradient this is",
        )
    if grad.dtype != x.dtype:
        raise OpError(f"{OP}: grad holds {grad.dtype}", facts=f"x holds {x.dtype}", do="convert grad to x's dtype")
