"""A decode step's attention over a slot cache in C++ (kernels/cpp/cached_attention.h), with the mass of each slot.

Memory: a thread holds share + 1 numbers a slot; where key heads are fewer than threads, several share a head's slots.
Prompts, whose queries are many, stay products of matrices.
"""

from __future__ import annotations

from typing import Any

import torch

from compiled_attn.ir import _torch
from compiled_attn.ops.templates.base import Template, marked
from compiled_attn.ops.templates.cpp_attention import DTYPES, pointers, written

NAME = "cpp_cached_attention"


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::cached_attention, else the sentence that says why."""
    del kwargs
    q, k = args[:2]
    if target.kind != "cpu":
        return f"target {target.name} runs no C++"
    if q.dtype not in DTYPES:
        return f"its elements are {q.dtype}, the kernel takes float32 and bfloat16"
    if not isinstance(q.shape[2], int) or q.shape[2] != 1:
        return f"it has {q.shape[2]} queries a head, which a product of matrices serves better"
    if not isinstance(q.shape[1], int) or not isinstance(k.shape[1], int):
        return "its number of heads is symbolic"
    return None


TEMPLATE = Template(NAME, "cached_attention", "cpu", accepts)


def lowering(
    q: Any, k: Any, v: Any, positions: Any, queries: Any, *, scale: float, window: int = 0, tail: int = 0
) -> Any:
    """Inductor's lowering, of its own values; None where the kernel does not cover the call."""
    if q.get_device().type != "cpu" or q.get_dtype() not in DTYPES:
        return None
    batch, heads, count, _ = q.get_size()
    width, slots = v.get_size()[3], k.get_size()[2]
    positions = _torch.inductor_copy(positions)  # an eviction writes into them next
    inputs = {"q": q, "k": k, "v": v, "positions": positions, "queries": queries}
    strides = [count * heads * width, width, heads * width, 1]
    groups = k.get_size()[1]
    outputs = [
        (q.get_dtype(), [batch, heads, count, width], strides),
        (torch.float32, [batch, groups, slots], [groups * slots, slots, 1]),
    ]

    def source(views: dict[str, Any]) -> tuple[str, str]:
        return marked(NAME, "cached_attention.h"), _body(views, scale, window, tail)

    return _torch.cpp_template(NAME, inputs, outputs, source)


def _body(views: dict[str, Any], scale: float, window: int, tail: int) -> str:
    """C++ statements that fill `s`, the kernel's CacheShape, and call the kernel."""
    q, k, v, out, mass = (views[name] for name in ("q", "k", "v", "out_0", "out_1"))
    lines = ["compiled_attn_cpp::CacheShape s{};"]
    sizes = {"batch": q.sizes[0], "groups": k.sizes[1], "share": f"{q.sizes[1]} / {k.sizes[1]}", "queries": q.sizes[2]}
    sizes |= {"slots": k.sizes[2], "width": q.sizes[3], "value_width": v.sizes[3]}
    lines += [f"s.{name} = {size};" for name, size in sizes.items()]
    tensors = (("q", q, 3), ("k", k, 3), ("v", v, 3), ("out", out, 3), ("positions", views["positions"], 3))
    for name, view, count in (*tensors, ("at", views["queries"], 2)):
        if view is not None:
            lines += [f"s.{name}[{i}] = {view.strides[i]};" for i in range(count)]
    lines += [f"s.scale = {float(scale)!r};", f"s.window = {window};", f"s.tail = {tail};"]
    given = [pointers(views, ("q", "k", "v")), views["positions"].pointer, views["queries"].pointer]
    given += ["nullptr" if out is None else written(out), "nullptr" if mass is None else mass.pointer]
    kind = "float" if q.dtype == torch.float32 else "compiled_attn_cpp::Bf16"
    lines.append(f"compiled_attn_cpp::cached_attention<{kind}>(s, {', '.join(given)});")
    return "\n".join(lines) + "\n"
