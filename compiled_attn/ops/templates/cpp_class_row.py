"""Attention with one query's row in C++: kernels/cpp/attention.h, then kernels/cpp/class_row.h on the same inputs.

Memory: attention's, and B * H * M floats for the row's probabilities before the mean.
"""

from __future__ import annotations

from typing import Any

import torch

from compiled_attn.ir import _torch
from compiled_attn.ops.templates import cpp_attention
from compiled_attn.ops.templates.base import Template, marked

NAME = "cpp_class_row"


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernels cover this call of compiled_attn::attention_with_class_row, else why not."""
    return cpp_attention.accepts(args, kwargs, target)


TEMPLATE = Template(NAME, "attention_with_class_row", "cpu", accepts)


def lowering(q: Any, k: Any, v: Any, bias: Any = None, *, scale: float, row: int = 0) -> Any:
    """Inductor's lowering, of its own values; None where the kernels do not cover the call."""
    if not cpp_attention.covered(q, bias):
        return None
    inputs, out = cpp_attention.operands(q, k, v, bias)
    batch, keys = q.get_size()[0], k.get_size()[2]
    mean = (torch.float32, [batch, keys], [keys, 1])

    def source(views: dict[str, Any]) -> tuple[str, str]:
        body = cpp_attention.shape(views, scale, causal=False)
        if views["out_0"] is not None:
            body += cpp_attention.attention_call(views)
        if views["out_1"] is not None:
            tensors = cpp_attention.pointers(views, ("q", "k", "bias"))
            call = f"class_row<{cpp_attention.types(views)}>(s, {tensors}, {views['out_1'].pointer}, {row})"
            body += f"compiled_attn_cpp::{call};\n"
        return marked(NAME, "class_row.h"), body

    return _torch.cpp_template(NAME, inputs, [out, mean], source)
