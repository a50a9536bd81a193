"""The gradient of a depthwise convolution's input: every position sums over the kernel's places that read it.

    out[y] = sum over i of weight[i] * grad[(y + padding - i * dilation) / stride]

channel by channel, of the i for which that divides and lies inside the map; columns likewise. It is linear in both, so
that its own gradients are the convolution itself and the gradient of the convolution's weight.

Letters: B batch, C channels, Y X positions of the input, Y' X' of the result, I J the kernel's rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from compiled_attn.ir.errors import OpError
from compiled_attn.ir.op import Cost, define
from compiled_attn.ops.depthwise import Pair, both_ends, channels_last, check_pairs, out_sizes
from compiled_attn.ops.rules import bytes_of, differ, want_equal, want_floating, want_rank, widened

Tensor = torch.Tensor
OP = "depthwise_input_gradient"


def input_gradient_reference(
    grad: Tensor,
    weight: Tensor,
    *,
    size: Sequence[Any],
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """For each of the kernel's places the gradient is added to where that place read."""
    _check(grad, weight, size, stride, padding, dilation)
    wide, (rows, columns) = widened(grad.dtype), grad.shape[2:]
    (top, bottom), (left, right) = both_ends(padding)
    total = grad.new_zeros((*grad.shape[:2], size[0] + top + bottom, size[1] + left + right), dtype=wide)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            down = slice(i * dilation[0], i * dilation[0] + (rows - 1) * stride[0] + 1, stride[0])
            across = slice(j * dilation[1], j * dilation[1] + (columns - 1) * stride[1] + 1, stride[1])
            total[:, :, down, across] += grad.to(wide) * weight[i, j].to(wide).view(-1, 1, 1)
    return channels_last(total[:, :, top : top + size[0], left : left + size[1]].to(grad.dtype))


def input_gradient_shape(
    grad: Tensor,
    weight: Tensor,
    *,
    size: Sequence[Any],
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    _check(grad, weight, size, stride, padding, dilation)
    return grad.new_empty((grad.shape[0], size[0], size[1], grad.shape[1])).permute(0, 3, 1, 2)


def input_gradient_cost(
    grad: Tensor,
    weight: Tensor,
    *,
    size: Sequence[Any],
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
) -> Cost:
    """The multiply-adds of the convolution, those beyond the border counted; each map once."""
    del stride, padding, dilation
    written = math.prod(size) * grad.shape[0] * grad.shape[1] * grad.element_size()
    return Cost(2 * weight.shape[0] * weight.shape[1] * grad.numel(), bytes_of(grad, weight) + written)


def input_gradient_decomposition(
    grad: Tensor,
    weight: Tensor,
    *,
    size: Sequence[Any],
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """ATen's own, of a convolution whose input's values it does not read, cut where the ends of the padding differ."""
    (top, bottom), (left, right) = both_ends(padding)
    even, cut = [top, left], (top, left) != (bottom, right)
    if cut:
        even, size = [0, 0], (size[0] + top + bottom, size[1] + left + right)
    channels = grad.shape[1]
    x = grad.new_empty((grad.shape[0], size[0], size[1], channels)).permute(0, 3, 1, 2)
    pairs = (list(stride), even, list(dilation))
    kernel, wanted = weight.permute(2, 0, 1).unsqueeze(1), [True, False, False]
    found: Any = torch.ops.aten.convolution_backward(grad, x, kernel, None, *pairs, False, [0, 0], channels, wanted)
    whole = found[0]
    return channels_last(whole[:, :, top : size[0] - bottom, left : size[1] - right] if cut else whole)


def input_gradient_gradient(
    args: tuple[Any, ...], kwargs: dict[str, Any], grads: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Of grad and of weight."""
    (grad, weight), (toward,) = args, grads
    pairs = {name: list(kwargs[name]) for name in ("stride", "padding", "dilation") if name in kwargs}
    ops, kernel = torch.ops.compiled_attn, [int(n) for n in weight.shape[:2]]
    of_weight = ops.depthwise_weight_gradient(toward, grad, kernel=kernel, **pairs)
    return ops.depthwise_block(toward, weight, **pairs), of_weight


# grad [B, C, Y', X'], weight [I, J, C] -> [B, C, Y, X] in channels last, where size is [Y, X]. The others are those of
# the convolution: one number for rows, one for columns; padding: or four, the ends.
depthwise_input_gradient = define(
    OP,
    "(Tensor grad, Tensor weight, *, SymInt[2] size, int[2] stride=[1, 1], int[] padding=[0, 0], "
    "int[2] dilation=[1, 1]) -> Tensor",
    reference=input_gradient_reference,
    shape=input_gradient_shape,
    gradient=input_gradient_gradient,
    cost=input_gradient_cost,
    decomposition=input_gradient_decomposition,
)


def _check(
    grad: Tensor, weight: Tensor, size: Sequence[Any], stride: Pair, padding: Sequence[int], dilation: Pair
) -> None:
    """Raises OpError where the arguments clash."""
    want_rank(OP, "grad", grad, "BCYX")
    want_rank(OP, "weight", weight, "IJC")
    want_floating(OP, "grad", grad)
    want_equal(OP, "the number of channels", "grad", grad.shape[1], "weight", weight.shape[2])
    check_pairs(OP, stride, padding, dilation)
    wanted = out_sizes(size, weight.shape, stride, padding, dilation)
    if any(differ(a, b) for a, b in zip(grad.shape[2:], wanted, strict=True)):
        raise OpError(
            f"{OP}: grad is not of the result's size",
            facts=f"grad has {list(grad.shape[2:])} rows and columns, the convolution's result {wanted}",
            do="give the size, stride, padding and dilation of the convolution whose gradient this is",
        )
    if weight.dtype != grad.dtype:
        raise OpError(
            f"{OP}: weight holds {weight.dtype}", facts=f"grad holds {grad.dtype}", do="convert weight to grad's dtype"
        )
