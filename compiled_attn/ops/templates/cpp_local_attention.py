"""Local attention in C++ (kernels/cpp/local_attention.h): tiles of queries that share the keys of their windows.

Memory: a thread holds one tile's queries, keys and values, at most 64 queries' scores of 128 keys, and the bias of a
tile (or of 64 of its queries) against the union of its windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compiled_attn.ir import _torch
from compiled_attn.ops.local_geometry import BORDERS, Axis, axes_of
from compiled_attn.ops.templates.base import Template, marked
from compiled_attn.ops.templates.cpp_attention import CTYPES, DTYPES

NAME = "cpp_local_attention"
WIDEST = 512


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::local_attention, else the sentence that says why not."""
    q, k, v, bias, relative = (*args, None, None)[:5]
    if target.kind != "cpu":
        return f"target {target.name} runs no C++"
    if q.dtype not in DTYPES:
        return f"its elements are {q.dtype}, the kernel takes float32 and bfloat16"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q is {q.dtype} but k is {k.dtype} and v is {v.dtype}"
    for name, tensor in (("bias is", bias), ("relative logits are", relative)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"its {name} {tensor.dtype}, the kernel adds float32 and bfloat16"
    for name, width in (("head width", q.shape[-1]), ("value width", v.shape[-1])):
        if not isinstance(width, int):
            return f"its {name} {width} is symbolic, the kernel's memory plan needs a number"
        if not 1 <= width <= WIDEST:
            return f"its {name} is {width}, beyond {WIDEST} a block of queries leaves the second-level cache"
    longest = max(kwargs["window"])
    if longest > 2**14:
        return f"its window is {longest} long, the kernel counts distances up to {2**14} in 16 bits"
    return None


TEMPLATE = Template(NAME, "local_attention", "cpu", accepts)


def axis_numbers(axis: Axis) -> tuple[int, ...]:
    """An axis's pattern in the order of the kernel's LocalAxis, after queries and keys."""
    border = BORDERS.index(axis.border)
    return axis.window, axis.stride, axis.block, axis.dilation, axis.shift, border, int(axis.causal), axis.sinks


def tables(axes: Sequence[Axis]) -> list[int]:
    """Where each of the kernel's three axes finds its distances among the relative logits; -1 for a missing axis."""
    starts = [-1] * (3 - len(axes))
    for i in range(len(axes)):
        starts.append(sum(a.offsets for a in axes[:i]))
    return starts


def lowering(
    q: Any,
    k: Any,
    v: Any,
    bias: Any = None,
    relative: Any = None,
    *,
    scale: float,
    softcap: float = 0.0,
    **pattern: Any,
) -> Any:
    """Inductor's lowering, of its own values; None where the kernel does not cover the call."""
    dtypes = [x.get_dtype() for x in (q, bias, relative) if x is not None]
    if q.get_device().type != "cpu" or any(d not in DTYPES for d in dtypes):
        return None
    inputs = {"q": q, "k": k, "v": v}
    if bias is not None:
        inputs["bias"] = bias
    if relative is not None:
        inputs["relative"] = relative
    size = [*q.get_size()[:-1], v.get_size()[-1]]
    strides: list[Any] = [1]
    for n in reversed(size[1:]):
        strides.insert(0, strides[0] * n)
    axes = axes_of(len(size) - 3, **pattern)

    def source(views: dict[str, Any]) -> tuple[str, str]:
        return marked(NAME, "local_attention.h"), _shape(views, axes, scale, softcap) + _call(views)

    return _torch.cpp_template(NAME, inputs, [(q.get_dtype(), size, strides)], source)[0]


def _shape(views: dict[str, Any], axes: Sequence[Axis], scale: float, softcap: float) -> str:
    """C++ statements that fill `s`, the kernel's LocalShape."""
    q, k, v, rank = views["q"], views["k"], views["v"], len(axes)
    missing = 3 - rank
    lines = ["compiled_attn_cpp::LocalShape s{};"]
    sizes = {"batch": q.sizes[0], "heads": q.sizes[-2], "width": q.sizes[-1], "value_width": v.sizes[-1]}
    lines += [f"s.{name} = {size};" for name, size in sizes.items()]
    rows = [("1", "1", Axis(1))] * missing
    rows += [(q.sizes[1 + i], k.sizes[1 + i], axis) for i, axis in enumerate(axes)]
    for i, (queries, keys, axis) in enumerate(rows):
        lines.append(f"s.axis[{i}] = {{{queries}, {keys}, {', '.join(str(n) for n in axis_numbers(axis))}}};")
    for name, view in (("q", q), ("k", k), ("v", v), ("out", views["out_0"]), ("relative", views.get("relative"))):
        if view is not None:
            places = [0, *range(1 + missing, 4), 4]
            lines += [f"s.{name}[{at}] = {view.strides[i]};" for i, at in enumerate(places)]
    if "bias" in views:
        places = [0, *range(1 + missing, 4)]
        lines += [f"s.bias[{at}] = {views['bias'].strides[i]};" for i, at in enumerate(places)]
    lines += [f"s.table[{i}] = {start};" for i, start in enumerate(tables(axes))]
    lines += [f"s.scale = {float(scale)!r};", f"s.softcap = {float(softcap)!r};"]
    return "\n".join(lines) + "\n"


def _call(views: dict[str, Any]) -> str:
    """The C++ statement that fills `out_0`."""
    kind = CTYPES[views["q"].dtype]
    read = ", ".join(f"reinterpret_cast<const {kind}*>({views[name].pointer})" for name in ("q", "k", "v"))
    added = ", ".join(_numbers(views.get(name)) for name in ("bias", "relative"))
    out = f"reinterpret_cast<{kind}*>({views['out_0'].pointer})"
    return f"compiled_attn_cpp::local_attention<{kind}>(s, {read}, {added}, {out});\n"


def _numbers(view: Any) -> str:
    """A bias or relative logits as the kernel's Numbers; a null pointer where there are none."""
    if view is None:
        return "compiled_attn_cpp::Numbers{nullptr, false}"
    return f"compiled_attn_cpp::Numbers{{{view.pointer}, {str(view.dtype == torch.bfloat16).lower()}}}"
