"""The gradient of a depthwise kernel in C++ (kernels/cpp/depthwise_gradient.h): channels last, tiles of its places.

Memory: a thread holds a ring of padded input rows and a row of the gradient of one vector of channels, and its sums.
Each element of both maps is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compiled_attn.ir import _torch
from compiled_attn.ops.templates.base import Template, marked
from compiled_attn.ops.templates.cpp_attention import CTYPES, DTYPES
from compiled_attn.ops.templates.cpp_depthwise import LONGEST, axes_of

NAME = "cpp_depthwise_gradient"


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of depthwise_weight_gradient, else the sentence that says why not."""
    x = args[0]
    if target.kind != "cpu":
        return f"target {target.name} runs no C++"
    if x.dtype not in DTYPES:
        return f"its elements are {x.dtype}, the kernel takes float32 and bfloat16"
    rows, columns = kwargs["kernel"]
    if max(rows, columns) > LONGEST:
        return f"its kernel is {rows} x {columns}, beyond {LONGEST} its ring of rows leaves the caches"
    return None


TEMPLATE = Template(NAME, "depthwise_weight_gradient", "cpu", accepts)


def lowering(
    x: Any,
    grad: Any,
    *,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Any:
    """Inductor's lowering, of its own values; None where the kernel does not cover the call."""
    if x.get_device().type != "cpu" or x.get_dtype() not in DTYPES or max(kernel) > LONGEST:
        return None
    inputs = {name: _torch.inductor_channels_last(value) for name, value in (("x", x), ("grad", grad))}
    channels = x.get_size()[1]
    sizes = [int(kernel[0]), int(kernel[1]), channels]
    out = (x.get_dtype(), sizes, [sizes[1] * channels, channels, 1])
    axes = axes_of(kernel, stride, padding, dilation)

    def source(views: dict[str, Any]) -> tuple[str, str]:
        return marked(NAME, "depthwise_gradient.h"), _body(views, axes)

    return _torch.cpp_template(NAME, inputs, [out], source)[0]


def _body(views: dict[str, Any], axes: Sequence[tuple[int, ...]]) -> str:
    """C++ statements that fill `out_0`."""
    x, grad, kind = views["x"], views["grad"], CTYPES[views["x"].dtype]
    lines = ["compiled_attn_cpp::DepthwiseGradientShape s{};"]
    lines += [f"s.batch = {x.sizes[0]};", f"s.channels = {x.sizes[3]};"]
    for i, (letter, axis) in enumerate(zip("yx", axes, strict=True)):
        lines.append(f"s.{letter} = {{{x.sizes[1 + i]}, {grad.sizes[1 + i]}, {', '.join(str(n) for n in axis)}}};")
    lines += [f"s.{field}[{i}] = {view.strides[i]};" for field, view in (("from", x), ("grad", grad)) for i in range(3)]
    maps = [f"reinterpret_cast<const {kind}*>({view.pointer})" for view in (x, grad)]
    out = f"reinterpret_cast<{kind}*>({views['out_0'].pointer})"
    lines.append(f"compiled_attn_cpp::depthwise_weight_gradient<{kind}>(s, {', '.join(maps)}, {out});")
    return "\n".join(lines) + "\n"


def standalone(dtype: torch.dtype) -> str:
    """C++ of `kernel(tensors, numbers)` for measuring the kernel by itself.

    tensors: the addresses of x, grad and the result.  numbers: a DepthwiseGradientShape.
    """
    kind = CTYPES[dtype].removeprefix("compiled_attn_cpp::")
    maps = ", ".join(f"(const {kind}*)tensors[{i}]" for i in range(2))
    return (
        f"{marked(NAME, 'depthwise_gradient.h')}\n"
        'extern "C" void kernel(const int64_t* tensors, const int64_t* numbers) {\n'
        "  using namespace compiled_attn_cpp;\n  DepthwiseGradientShape s{};\n"
        "  std::memcpy(&s, numbers, sizeof(s));\n"
        f"  depthwise_weight_gradient<{kind}>(s, {maps}, ({kind}*)tensors[2]);\n}}\n"
    )


def numbers(
    x: torch.Tensor,
    grad: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """A DepthwiseGradientShape for tensors [B, C, Y, X] whose channel stride is 1."""
    found = [x.shape[0], x.shape[1]]
    for i, axis in enumerate(axes_of(kernel, stride, padding, dilation)):
        found += [x.shape[2 + i], grad.shape[2 + i], *axis]
    return found + [tensor.stride(d) for tensor in (x, grad) for d in (0, 2, 3)]
