"""neighborhood_apply in C++ (kernels/cpp/neighborhood.h): windows are mixed where they lie, sums are in registers.

Memory: a thread holds nothing where values are float32 and whole vectors wide; else, as float32, the rows of values
that one row of queries sees, of one head or as many as 384 KiB hold; with bfloat16 also the weights of four queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compiled_attn.ir import _torch
from compiled_attn.ops.local_geometry import Axis, axes_of
from compiled_attn.ops.templates.base import Template, marked
from compiled_attn.ops.templates.cpp_attention import CTYPES, DTYPES
from compiled_attn.ops.templates.cpp_local_attention import axis_numbers

NAME = "cpp_neighborhood"


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::neighborhood_apply, else why not."""
    del kwargs
    v = args[1]
    if target.kind != "cpu":
        return f"target {target.name} runs no C++"
    if v.dtype not in DTYPES:
        return f"its elements are {v.dtype}, the kernel takes float32 and bfloat16"
    return None


TEMPLATE = Template(NAME, "neighborhood_apply", "cpu", accepts)


def lowering(weights: Any, v: Any, **pattern: Any) -> Any:
    """Inductor's lowering, of its own values; None where the kernel does not cover the call."""
    if v.get_device().type != "cpu" or v.get_dtype() not in DTYPES:
        return None
    size = [*weights.get_size()[:-1], v.get_size()[-1]]
    strides: list[Any] = [1]
    for n in reversed(size[1:]):
        strides.insert(0, strides[0] * n)
    axes = axes_of(len(size) - 4, **pattern)

    def source(views: dict[str, Any]) -> tuple[str, str]:
        return marked(NAME, "neighborhood.h"), _shape(views, axes) + _call(views)

    inputs = {"weights": weights, "v": v}
    return _torch.cpp_template(NAME, inputs, [(v.get_dtype(), size, strides)], source, strided=frozenset(inputs))[0]


def _shape(views: dict[str, Any], axes: Sequence[Axis]) -> str:
    """C++ statements that fill `s`, the kernel's NeighborhoodShape."""
    weights, v, missing = views["weights"], views["v"], 3 - len(axes)
    lines = ["compiled_attn_cpp::NeighborhoodShape s{};"]
    sizes = {"batch": v.sizes[0], "heads": v.sizes[-2], "mixes": weights.sizes[-2], "width": v.sizes[-1]}
    lines += [f"s.{name} = {size};" for name, size in sizes.items()]
    rows = [("1", "1", Axis(1))] * missing
    rows += [(weights.sizes[1 + i], v.sizes[1 + i], axis) for i, axis in enumerate(axes)]
    for i, (queries, keys, axis) in enumerate(rows):
        lines.append(f"s.axis[{i}] = {{{queries}, {keys}, {', '.join(str(n) for n in axis_numbers(axis))}}};")
    for name, view, count in (("weights", weights, 7), ("v", v, 6), ("out", views["out_0"], 6)):
        places = [0, *range(1 + missing, count)]
        lines += [f"s.{name}[{at}] = {stride};" for at, stride in zip(places, view.strides, strict=False)]
    return "\n".join(lines) + "\n"


def _call(views: dict[str, Any]) -> str:
    """The C++ statement that fills `out_0`."""
    kind = CTYPES[views["v"].dtype]
    read = ", ".join(f"reinterpret_cast<const {kind}*>({views[name].pointer})" for name in ("weights", "v"))
    out = f"reinterpret_cast<{kind}*>({views['out_0'].pointer})"
    return f"compiled_attn_cpp::neighborhood_apply<{kind}>(s, {read}, {out});\n"
