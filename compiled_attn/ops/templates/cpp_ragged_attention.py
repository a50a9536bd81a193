"""Attention within packed sequences in C++ (kernels/cpp/ragged_attention.h): the blocks of attention.h, per sequence.

Memory: attention's for each thread, and two int64 a sequence. Work: that of each sequence alone, blocks of at most 64
queries of one head dealt to the threads, the sequences with the most keys first.
"""

from __future__ import annotations

from typing import Any

from compiled_attn.ir import _torch
from compiled_attn.ops.templates import cpp_attention
from compiled_attn.ops.templates.base import Template, marked
from compiled_attn.ops.templates.cpp_attention import CTYPES, DTYPES

NAME = "cpp_ragged_attention"


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::ragged_attention, else why not."""
    return cpp_attention.accepts(args[:3], kwargs, target)


TEMPLATE = Template(NAME, "ragged_attention", "cpu", accepts)


def lowering(
    q: Any,
    k: Any,
    v: Any,
    q_offsets: Any,
    k_offsets: Any,
    *,
    scale: float,
    causal: bool = False,
    longest: Any = None,
) -> Any:
    """Inductor's lowering, of its own values; None where the kernel does not cover the call."""
    del longest
    if q.get_device().type != "cpu" or q.get_dtype() not in DTYPES:
        return None
    rows, heads, _ = q.get_size()
    width = v.get_size()[-1]
    inputs = {"q": q, "k": k, "v": v, "q_offsets": q_offsets, "k_offsets": k_offsets}
    out = (q.get_dtype(), [rows, heads, width], [heads * width, width, 1])

    def source(views: dict[str, Any]) -> tuple[str, str]:
        return marked(NAME, "ragged_attention.h"), _body(views, scale, causal)

    return _torch.cpp_template(NAME, inputs, [out], source)[0]


def _body(views: dict[str, Any], scale: float, causal: bool) -> str:
    q, k, v, out = views["q"], views["k"], views["v"], views["out_0"]
    lines = ["compiled_attn_cpp::AttentionShape s{};"]
    names = ("batch", "heads", "queries", "keys", "width", "value_width")
    sizes = (f"{views['q_offsets'].sizes[0]} - 1", q.sizes[1], q.sizes[0], k.sizes[0], q.sizes[2], v.sizes[2])
    lines += [f"s.{name} = {size};" for name, size in zip(names, sizes, strict=True)]
    for name, view in (("q", q), ("k", k), ("v", v), ("out", out)):
        lines += [f"s.{name}[2] = {view.strides[0]};", f"s.{name}[1] = {view.strides[1]};"]
    lines += [f"s.scale = {float(scale)!r};", f"s.causal = {str(causal).lower()};"]
    tensors = cpp_attention.pointers(views, ("q", "k", "v"))
    begins = f"{views['q_offsets'].pointer}, {views['k_offsets'].pointer}"
    call = f"ragged_attention<{CTYPES[q.dtype]}>(s, {tensors}, {begins}, {cpp_attention.written(out)})"
    return "\n".join([*lines, f"compiled_attn_cpp::{call};"]) + "\n"
