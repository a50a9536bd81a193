"""A depthwise convolution with what surrounds it, in one pass over memory.

    c = bias + sum over (i, j) of weight[i, j] * x[y * stride + i * dilation - padding, ...]      channel by channel
    out = activation(layer_norm(c)) * gate + residual

`layer_norm` is over the channels of a pixel, with `norm_weight` and `norm_bias`, where `norm_eps` is given; every other
part may be left out too. A batch norm or a layer scale next to the convolution is folded into weight and bias ahead.

Gradients: the sums c are made again, not kept, and what follows them is ATen's by its vjp. The weight's is the op
depthwise_weight_gradient, the input's depthwise_input_gradient.

padding: [rows, columns], as many zeros ahead as behind, or [top, bottom, left, right]; what lies behind only makes the
result longer.

Letters: B batch, C channels, Y X positions, I J the kernel's rows and columns. Memory is channels last: the weight lies
as [I, J, C], the result has the strides of a contiguous [B, Y, X, C].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from compiled_attn.ir.errors import OpError
from compiled_attn.ir.op import Cost, by_vjp, define
from compiled_attn.ops.rules import bytes_of, differ, exceeds, want_equal, want_floating, want_rank, widened

Tensor = torch.Tensor
Pair = Sequence[int]
OP = "depthwise_block"
ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh")


def activated(x: Tensor, activation: str) -> Tensor:
    """The activation by name."""
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    known = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
    return known[activation](x) if activation != "none" else x


def both_ends(padding: Sequence[int]) -> tuple[Pair, Pair]:
    """(top, bottom) and (left, right) of a padding of two numbers or four."""
    top, bottom, left, right = padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
    return (top, bottom), (left, right)


def to_pad(padding: Sequence[int]) -> list[int]:
    """A padding of two numbers or four as F.pad takes it: left, right, top, bottom."""
    rows, columns = both_ends(padding)
    return [*columns, *rows]


def out_size(size: Any, kernel: int, stride: int, ends: Pair, dilation: int) -> Any:
    """Positions of the result along an axis of `size` positions; ends: zeros ahead and behind."""
    return (size + ends[0] + ends[1] - dilation * (kernel - 1) - 1) // stride + 1


def out_sizes(
    sizes: Sequence[Any], kernel: Sequence[int], stride: Pair, padding: Sequence[int], dilation: Pair
) -> list[Any]:
    """Rows and columns of the result of a map of `sizes`; kernel: rows and columns, or the weight's shape."""
    axes = zip(sizes, kernel[:2], stride, both_ends(padding), dilation, strict=True)
    return [out_size(*axis) for axis in axes]


# depthwise_block: activation(norm(depthwise(x) + bias)) * gate + residual


def depthwise_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
    activation: str = "none",
    norm_eps: float | None = None,
) -> Tensor:
    """A sum over the kernel's places of shifted maps."""
    rows, columns = _check(
        x, weight, bias, gate, residual, norm_weight, norm_bias, stride, padding, dilation, activation, norm_eps
    )
    wide = widened(x.dtype)
    padded = F.pad(x.to(wide), to_pad(padding))
    total = padded.new_zeros((x.shape[0], x.shape[1], rows, columns))
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            down = slice(i * dilation[0], i * dilation[0] + (rows - 1) * stride[0] + 1, stride[0])
            right = slice(j * dilation[1], j * dilation[1] + (columns - 1) * stride[1] + 1, stride[1])
            total = total + padded[:, :, down, right] * weight[i, j].to(wide).view(-1, 1, 1)
    if bias is not None:
        total = total + bias.to(wide).view(-1, 1, 1)
    if norm_eps is not None:
        variance, mean = torch.var_mean(total, 1, correction=0, keepdim=True)
        total = (total - mean) * torch.rsqrt(variance + norm_eps)
        total = total if norm_weight is None else total * norm_weight.to(wide).view(-1, 1, 1)
        total = total if norm_bias is None else total + norm_bias.to(wide).view(-1, 1, 1)
    total = activated(total, activation)
    total = total if gate is None else total * gate.to(wide)
    total = total if residual is None else total + residual.to(wide)
    return channels_last(total.to(x.dtype))


def depthwise_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
    activation: str = "none",
    norm_eps: float | None = None,
) -> Tensor:
    rows, columns = _check(
        x, weight, bias, gate, residual, norm_weight, norm_bias, stride, padding, dilation, activation, norm_eps
    )
    return x.new_empty((x.shape[0], rows, columns, x.shape[1])).permute(0, 3, 1, 2)


def depthwise_cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
    activation: str = "none",
    norm_eps: float | None = None,
) -> Cost:
    """The multiply-adds of the kernel's places, those beyond the border counted; each map once."""
    del activation, norm_eps
    taps = weight.shape[0] * weight.shape[1]
    written = math.prod(out_sizes(x.shape[2:], weight.shape, stride, padding, dilation)) * x.shape[0] * x.shape[1]
    read = bytes_of(x, weight, bias, gate, residual, norm_weight, norm_bias)
    return Cost(2 * taps * written, read + written * x.element_size())


def depthwise_decomposition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
    activation: str = "none",
    norm_eps: float | None = None,
) -> Tensor:
    """The convolution of ATen, and pointwise work that Inductor fuses."""
    kernel = weight.permute(2, 0, 1).unsqueeze(1)
    x, even = evenly(x, padding)
    y = F.conv2d(x, kernel, bias, list(stride), even, list(dilation), weight.shape[2])
    return channels_last(finished(y, gate, residual, norm_weight, norm_bias, activation=activation, norm_eps=norm_eps))


def evenly(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, list[int]]:
    """A map and a padding of two numbers that mean the same; the map is padded where the ends differ."""
    (top, bottom), (left, right) = both_ends(padding)
    if (top, left) == (bottom, right):
        return x, [top, left]
    return F.pad(x, to_pad(padding)), [0, 0]


def finished(
    sums: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    activation: str = "none",
    norm_eps: float | None = None,
) -> Tensor:
    """What follows the convolution, on its result [B, C, Y, X], in ATen."""
    y = sums
    if norm_eps is not None:
        last = F.layer_norm(y.permute(0, 2, 3, 1), [y.shape[1]], norm_weight, norm_bias, norm_eps)
        y = last.permute(0, 3, 1, 2)
    y = activated(y, activation)
    y = y if gate is None else y * gate
    return y if residual is None else y + residual


def depthwise_gradient(
    args: tuple[Any, ...], kwargs: dict[str, Any], grads: tuple[Any, ...], *, ops: Any = None
) -> tuple[Any, ...]:
    """One gradient or None per positional argument. ops: has the three ops by name; the vocabulary's own if None."""
    ops = torch.ops.compiled_attn if ops is None else ops
    x, weight, bias, gate, residual, norm_weight, norm_bias = (*args, *(None,) * 7)[:7]
    pairs = {name: list(kwargs.get(name, [n, n])) for name, n in (("stride", 1), ("padding", 0), ("dilation", 1))}
    rest = {name: kwargs[name] for name in ("activation", "norm_eps") if name in kwargs}
    (toward,) = grads
    behind: tuple[Any, ...] = (None, toward if residual is not None else None, None, None)
    if rest.get("activation", "none") != "none" or rest.get("norm_eps") is not None or gate is not None:
        sums = ops.depthwise_block(x, weight, bias, **pairs)
        found = by_vjp(finished)((sums, gate, residual, norm_weight, norm_bias), rest, grads)
        toward, behind = found[0], found[1:]
    of_weight = ops.depthwise_weight_gradient(x, toward, kernel=[int(n) for n in weight.shape[:2]], **pairs)
    of_bias = None if bias is None else toward.sum((0, 2, 3))
    of_input = ops.depthwise_input_gradient(toward, weight, size=list(x.shape[2:]), **pairs)
    return of_input, of_weight, of_bias, *behind


# x [B, C, Y, X], weight [I, J, C], bias, norm_weight, norm_bias [C], gate and residual as the result
# -> [B, C, Y', X'] in channels last. stride, padding, dilation: one number for rows, one for columns; or
# four of padding, the ends.
depthwise_block = define(
    OP,
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? gate=None, Tensor? residual=None, Tensor? norm_weight=None, "
    "Tensor? norm_bias=None, *, int[2] stride=[1, 1], int[] padding=[0, 0], int[2] dilation=[1, 1], "
    "str activation='none', float? norm_eps=None) -> Tensor",
    reference=depthwise_reference,
    shape=depthwise_shape,
    gradient=depthwise_gradient,
    cost=depthwise_cost,
    decomposition=depthwise_decomposition,
)


def channels_last(y: Tensor) -> Tensor:
    """[B, C, Y, X] with the strides of a contiguous [B, Y, X, C], sizes of 1 included."""
    return y.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stride: Pair,
    padding: Sequence[int],
    dilation: Pair,
    activation: str,
    norm_eps: float | None,
) -> tuple[Any, Any]:
    """Rows and columns of the result; raises OpError where the arguments clash."""
    want_rank(OP, "x", x, "BCYX")
    want_rank(OP, "weight", weight, "IJC")
    want_floating(OP, "x", x)
    channels = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, tensor in channels.items():
        if tensor is not None:
            if name != "weight":
                want_rank(OP, name, tensor, "C")
            want_equal(OP, "the number of channels", "x", x.shape[1], name, tensor.shape[-1])
    check_pairs(OP, stride, padding, dilation)
    if activation not in ACTIVATIONS:
        raise OpError(
            f"{OP}: there is no activation {activation!r}",
            facts=f"there are {', '.join(ACTIVATIONS)}",
            do="use one of these, or compute it behind the op",
        )
    if norm_eps is None and not (norm_weight is None and norm_bias is None):
        raise OpError(
            f"{OP}: norm_weight or norm_bias without norm_eps",
            facts="the layer norm is there where norm_eps is given",
            do="give norm_eps, or leave both out",
        )
    sizes = []
    for axis, letter in enumerate("YX"):
        size, kernel, ends = x.shape[2 + axis], weight.shape[axis], both_ends(padding)[axis]
        reach = dilation[axis] * (kernel - 1) + 1
        if exceeds(1, kernel) or exceeds(reach, size + ends[0] + ends[1]):
            raise OpError(
                f"{OP}: the kernel does not fit along {letter}",
                facts=f"{kernel} places reach over {reach}, the map has {size}, {ends[0]} ahead and {ends[1]} behind",
                do="pad more, or take a smaller kernel or dilation",
            )
        sizes.append(out_size(size, kernel, stride[axis], ends, dilation[axis]))
    wanted = (x.shape[0], x.shape[1], *sizes)
    for name, tensor in (("gate", gate), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.dim() != 4 or any(differ(a, b) for a, b in zip(tensor.shape, wanted, strict=True)):
            raise OpError(
                f"{OP}: {name} is not of the result's shape",
                facts=f"{name} is {tuple(tensor.shape)}, the result {tuple(wanted)}",
                do=f"expand {name}, or compute it behind the op",
            )
    for name, tensor in {**channels, "gate": gate, "residual": residual}.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise OpError(
                f"{OP}: {name} holds {tensor.dtype}", facts=f"x holds {x.dtype}", do=f"convert {name} to x's dtype"
            )
    return sizes[0], sizes[1]


def check_pairs(op: str, stride: Pair, padding: Sequence[int], dilation: Pair) -> None:
    """Raises OpError where one of them makes no sense."""
    if len(padding) not in (2, 4) or min(padding) < 0:
        raise OpError(
            f"{op}: padding is {list(padding)}",
            facts="it holds two numbers, for rows and columns, or four: top, bottom, left and right, each at least 0",
            do="give padding as [0, 0] or [0, 0, 0, 0] or more",
        )
    for name, pair, least in (("stride", stride, 1), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise OpError(
                f"{op}: {name} is {list(pair)}",
                facts=f"it holds two numbers, for rows and columns, each at least {least}",
                do=f"give {name} as [{least}, {least}] or more",
            )
