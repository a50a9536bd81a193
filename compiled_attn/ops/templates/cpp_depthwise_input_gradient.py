"""The gradient of a depthwise convolution's input in C++ (kernels/cpp/depthwise_input_gradient.h), channels last.

Memory: what the convolution itself takes (cpp_depthwise), and a copy of the weight. At a stride the result's gradient
is read once for each position of the input within a step, and each element of the input's gradient written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compiled_attn.ir import _torch
from compiled_attn.ops.templates import cpp_depthwise
from compiled_attn.ops.templates.base import Template, marked
from compiled_attn.ops.templates.cpp_attention import CTYPES, DTYPES
from compiled_attn.ops.templates.cpp_depthwise import axes_of

NAME = "cpp_depthwise_input_gradient"


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of depthwise_input_gradient, else the sentence that says why not."""
    return cpp_depthwise.accepts(args, kwargs, target)


TEMPLATE = Template(NAME, "depthwise_input_gradient", "cpu", accepts)


def lowering(
    grad: Any,
    weight: Any,
    *,
    size: Sequence[Any],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Any:
    """Inductor's lowering, of its own values; None where the kernel does not cover the call."""
    if grad.get_device().type != "cpu" or grad.get_dtype() not in DTYPES:
        return None
    inputs = {"grad": _torch.inductor_channels_last(grad), "weight": _torch.inductor_contiguous(weight)}
    batch, channels = grad.get_size()[:2]
    rows, columns = size
    strides = [rows * columns * channels, 1, columns * channels, channels]
    out = (grad.get_dtype(), [batch, channels, rows, columns], strides)
    axes = axes_of([int(n) for n in weight.get_size()[:2]], stride, padding, dilation)

    def source(views: dict[str, Any]) -> tuple[str, str]:
        return marked(NAME, "depthwise_input_gradient.h"), _body(views, axes)

    return _torch.cpp_template(NAME, inputs, [out], source)[0]


def _body(views: dict[str, Any], axes: Sequence[tuple[int, ...]]) -> str:
    """C++ statements that fill `out_0`."""
    grad, out, kind = views["grad"], views["out_0"], CTYPES[views["grad"].dtype]
    lines = ["compiled_attn_cpp::DepthwiseInputShape s{};"]
    lines += [f"s.batch = {grad.sizes[0]};", f"s.channels = {grad.sizes[3]};"]
    for i, (letter, axis) in enumerate(zip("yx", axes, strict=True)):
        lines.append(f"s.{letter} = {{{out.sizes[2 + i]}, {grad.sizes[1 + i]}, {', '.join(str(n) for n in axis)}}};")
    lines += [f"s.grad[{i}] = {grad.strides[i]};" for i in range(3)]
    lines += [f"s.to[{i}] = {out.strides[place]};" for i, place in enumerate((0, 2, 3))]
    given = [f"reinterpret_cast<const {kind}*>({views[name].pointer})" for name in ("grad", "weight")]
    target = f"reinterpret_cast<{kind}*>({out.pointer})"
    lines.append(f"compiled_attn_cpp::depthwise_input_gradient<{kind}>(s, {', '.join(given)}, {target});")
    return "\n".join(lines) + "\n"


def standalone(dtype: torch.dtype) -> str:
    """C++ of `kernel(tensors, numbers)` for measuring the kernel by itself.

    tensors: the addresses of grad, weight and the result.  numbers: a DepthwiseInputShape.
    """
    kind = CTYPES[dtype].removeprefix("compiled_attn_cpp::")
    given = ", ".join(f"(const {kind}*)tensors[{i}]" for i in range(2))
    return (
        f"{marked(NAME, 'depthwise_input_gradient.h')}\n"
        'extern "C" void kernel(const int64_t* tensors, const int64_t* numbers) {\n'
        "  using namespace compiled_attn_cpp;\n  DepthwiseInputShape s{};\n"
        "  std::memcpy(&s, numbers, sizeof(s));\n"
        f"  depthwise_input_gradient<{kind}>(s, {given}, ({kind}*)tensors[2]);\n}}\n"
    )


def numbers(
    grad: torch.Tensor,
    out: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """A DepthwiseInputShape for tensors [B, C, Y, X] whose channel stride is 1."""
    found = [grad.shape[0], grad.shape[1]]
    for i, axis in enumerate(axes_of(kernel, stride, padding, dilation)):
        found += [out.shape[2 + i], grad.shape[2 + i], *axis]
    return found + [tensor.stride(d) for tensor in (grad, out) for d in (0, 2, 3)]
