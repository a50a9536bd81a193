"""All templates, and which of them serves a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compiled_attn.ops.templates import (
    cpp_attention,
    cpp_cached_attention,
    cpp_class_row,
    cpp_depthwise,
    cpp_depthwise_gradient,
    cpp_depthwise_input_gradient,
    cpp_gemm,
    cpp_local_attention,
    cpp_neighborhood,
    cpp_ragged_attention,
    cpp_select_tokens,
    triton_attention,
    triton_cached_attention,
    triton_class_row,
    triton_decay_attention,
    triton_depthwise,
    triton_depthwise_gradient,
    triton_depthwise_input_gradient,
    triton_local_attention,
    triton_neighborhood,
    triton_ragged_attention,
    triton_select_tokens,
)
from compiled_attn.ops.templates.base import Template

# In the order in which they are asked. A user's own template is appended.
TEMPLATES: list[Template] = [
    cpp_attention.TEMPLATE,
    cpp_cached_attention.TEMPLATE,
    cpp_class_row.TEMPLATE,
    cpp_depthwise.TEMPLATE,
    cpp_depthwise_gradient.TEMPLATE,
    cpp_depthwise_input_gradient.TEMPLATE,
    cpp_gemm.TEMPLATE,
    cpp_local_attention.TEMPLATE,
    cpp_neighborhood.TEMPLATE,
    cpp_ragged_attention.TEMPLATE,
    cpp_select_tokens.TEMPLATE,
    triton_attention.TEMPLATE,
    triton_cached_attention.TEMPLATE,
    triton_class_row.TEMPLATE,
    triton_decay_attention.TEMPLATE,
    triton_depthwise.TEMPLATE,
    triton_depthwise_gradient.TEMPLATE,
    triton_depthwise_input_gradient.TEMPLATE,
    triton_local_attention.TEMPLATE,
    triton_neighborhood.TEMPLATE,
    triton_ragged_attention.TEMPLATE,
    triton_select_tokens.TEMPLATE,
]

# Op -> its lowering inside Inductor, for the templates that are C++.
CPP_LOWERINGS: dict[str, Callable[..., Any]] = {
    cpp_attention.TEMPLATE.op: cpp_attention.lowering,
    cpp_cached_attention.TEMPLATE.op: cpp_cached_attention.lowering,
    cpp_class_row.TEMPLATE.op: cpp_class_row.lowering,
    cpp_depthwise.TEMPLATE.op: cpp_depthwise.lowering,
    cpp_depthwise_gradient.TEMPLATE.op: cpp_depthwise_gradient.lowering,
    cpp_depthwise_input_gradient.TEMPLATE.op: cpp_depthwise_input_gradient.lowering,
    cpp_gemm.TEMPLATE.op: cpp_gemm.lowering,
    cpp_local_attention.TEMPLATE.op: cpp_local_attention.lowering,
    cpp_neighborhood.TEMPLATE.op: cpp_neighborhood.lowering,
    cpp_ragged_attention.TEMPLATE.op: cpp_ragged_attention.lowering,
    cpp_select_tokens.TEMPLATE.op: cpp_select_tokens.lowering,
}


# Ops that have no template because their decomposition is what one would do; `strict` does not ask for one.
PLAIN: dict[str, str] = {
    "pack_tokens": "its size is known only once the kept tokens are counted: nonzero, then a gather",
    "unpack_tokens": "one copy of rows to their places",
}


def choose(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any
) -> tuple[Template | None, list[tuple[str, str]]]:
    """The first template for the target's kind of device that accepts, and (name, because) of those that do not."""
    refused: list[tuple[str, str]] = []
    for template in TEMPLATES:
        if template.op != op or template.device != target.kind:
            continue
        because = template.accepts(args, kwargs, target)
        if because is None:
            return template, refused
        refused.append((template.name, because))
    return None, refused or [(f"{target.kind} template", f"there is none for {op}")]
