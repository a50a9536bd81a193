"""Depthwise blocks in C++ (kernels/cpp/depthwise.h): channels last, register tiles of rows by columns, all in one pass.

Memory: a thread holds a ring of padded input rows of one vector of channels, at best within the first-level cache;
with a norm, also a band of float32 sums of all channels (256 KiB). Each element is read once and written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compiled_attn.ir import _torch
from compiled_attn.ops.depthwise import both_ends, out_sizes
from compiled_attn.ops.templates.base import Template, marked
from compiled_attn.ops.templates.cpp_attention import CTYPES, DTYPES

NAME = "cpp_depthwise"
LONGEST = 127  # a kernel's rows or columns
TENSORS = ("x", "weight", "bias", "gate", "residual", "norm_weight", "norm_bias")
MAPS = ("x", "gate", "residual")


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::depthwise_block, else the sentence that says why not."""
    del kwargs
    x, weight = args[:2]
    if target.kind != "cpu":
        return f"target {target.name} runs no C++"
    if x.dtype not in DTYPES:
        return f"its elements are {x.dtype}, the kernel takes float32 and bfloat16"
    if not all(isinstance(n, int) for n in weight.shape):
        return f"its kernel {tuple(weight.shape)} is symbolic"
    if max(weight.shape[:2]) > LONGEST:
        return (
            f"its kernel is {weight.shape[0]} x {weight.shape[1]}, beyond {LONGEST} its ring of rows leaves the caches"
        )
    return None


TEMPLATE = Template(NAME, "depthwise_block", "cpu", accepts)


def lowering(
    x: Any,
    weight: Any,
    bias: Any = None,
    gate: Any = None,
    residual: Any = None,
    norm_weight: Any = None,
    norm_bias: Any = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
    norm_eps: float | None = None,
) -> Any:
    """Inductor's lowering, of its own values; None where the kernel does not cover the call."""
    if x.get_device().type != "cpu" or x.get_dtype() not in DTYPES:
        return None
    given = dict(zip(TENSORS, (x, weight, bias, gate, residual, norm_weight, norm_bias), strict=True))
    inputs = {
        name: (_torch.inductor_channels_last if name in MAPS else _torch.inductor_contiguous)(value)
        for name, value in given.items()
        if value is not None
    }
    kernel = [int(n) for n in weight.get_size()[:2]]
    batch, channels, *sizes = x.get_size()
    rows, columns = out_sizes(sizes, kernel, stride, padding, dilation)
    axes = axes_of(kernel, stride, padding, dilation)
    strides = [rows * columns * channels, 1, columns * channels, channels]
    out = (x.get_dtype(), [batch, channels, rows, columns], strides)

    def source(views: dict[str, Any]) -> tuple[str, str]:
        return marked(NAME, "depthwise.h"), _shape(views, axes, norm_eps) + _call(views, axes, activation, norm_eps)

    return _torch.cpp_template(NAME, inputs, [out], source)[0]


def axes_of(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, ...]]:
    """The kernel's, for rows and columns: its places, stride, zeros ahead and dilation; the size tells those behind."""
    ahead = [first for first, _ in both_ends(padding)]
    return list(zip(kernel, stride, ahead, dilation, strict=True))


def _shape(views: dict[str, Any], axes: Sequence[tuple[int, ...]], norm_eps: float | None) -> str:
    """C++ statements that fill `s`, the kernel's DepthwiseShape."""
    x, out = views["x"], views["out_0"]
    lines = ["compiled_attn_cpp::DepthwiseShape s{};", f"s.batch = {x.sizes[0]};", f"s.channels = {x.sizes[3]};"]
    for i, (letter, axis) in enumerate(zip("yx", axes, strict=True)):
        lines.append(f"s.{letter} = {{{x.sizes[1 + i]}, {out.sizes[2 + i]}, {', '.join(str(n) for n in axis)}}};")
    for name, field in (("x", "from"), ("gate", "gate"), ("residual", "residual")):
        if name in views:
            lines += [f"s.{field}[{i}] = {views[name].strides[i]};" for i in range(3)]
    lines += [f"s.to[{i}] = {out.strides[place]};" for i, place in enumerate((0, 2, 3))]
    lines.append(f"s.eps = {float(norm_eps or 0.0)!r};")
    return "\n".join(lines) + "\n"


def _call(views: dict[str, Any], axes: Sequence[tuple[int, ...]], activation: str, norm_eps: float | None) -> str:
    """The C++ statement that fills `out_0`."""
    kind = CTYPES[views["x"].dtype]
    read = [
        f"reinterpret_cast<const {kind}*>({views[name].pointer})" if name in views else "nullptr" for name in TENSORS
    ]
    out = f"reinterpret_cast<{kind}*>({views['out_0'].pointer})"
    return (
        f"compiled_attn_cpp::DepthwiseTensors<{kind}> t{{{', '.join(read)}, {out}}};\n"
        f"constexpr int rows = compiled_attn_cpp::depthwise_rows({axes[0][0]}, {axes[0][1]}, {axes[1][1]});\n"
        f"compiled_attn_cpp::depthwise_by_rows<{kind}, compiled_attn_cpp::Activation::{activation}, "
        f"{str(norm_eps is not None).lower()}, rows>(s, t);\n"
    )


def standalone(dtype: torch.dtype, activation: str, norm: bool) -> str:
    """C++ of `kernel(tensors, numbers)` for measuring the kernel by itself.

    tensors: the addresses of TENSORS and the result, 0 for what is not there.  numbers: a DepthwiseShape's integers.
    """
    ctype = CTYPES[dtype]
    read = ", ".join(f"(const {ctype}*)tensors[{i}]" for i in range(len(TENSORS)))
    return (
        f"{marked(NAME, 'depthwise.h')}\n"
        'extern "C" void kernel(const int64_t* tensors, const int64_t* numbers) {\n'
        "  using namespace compiled_attn_cpp;\n  DepthwiseShape s{};\n"
        f"  std::memcpy(&s, numbers, {NUMBERS} * sizeof(int64_t));\n  s.eps = 1e-6f;\n"
        f"  const DepthwiseTensors<{ctype}> t{{{read}, ({ctype}*)tensors[{len(TENSORS)}]}};\n"
        f"  depthwise<{ctype}, Activation::{activation}, {str(norm).lower()}>(s, t);\n}}\n"
    ).replace("compiled_attn_cpp::Bf16", "Bf16")


NUMBERS = 26  # batch and channels, two axes of six, four tensors' strides


def numbers(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """A DepthwiseShape's integers for tensors [B, C, Y, X] whose channel stride is 1."""
    found = [x.shape[0], x.shape[1]]
    for i, axis in enumerate(axes_of(kernel, stride, padding, dilation)):
        found += [x.shape[2 + i], out.shape[2 + i], *axis]
    for tensor in (x, gate, residual, out):
        found += [0, 0, 0] if tensor is None else [tensor.stride(d) for d in (0, 2, 3)]
    return found
