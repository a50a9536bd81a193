"""The one printer: a Program as text, in names renumbered by order so that the same program gives the same text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.notes import module_path

if TYPE_CHECKING:
    from compiled_attn.ir.program import Program

DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def program_text(program: Program, *, places: bool = True) -> str:
    """One line a node: `v12: f32[s0, 197, 384] = linear(v11, blocks.0.attn.qkv.weight)  # blocks.0.attn`."""
    names = _names(program)
    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if not names[node].startswith("%"):
                continue
            lines.append(f"input {names[node]}: {type_text(node.meta.get('val'))}")
        elif node.op == "output":
            lines.append(f"return {_text(node.args[0], names)}")
        else:
            keywords = [f"{k}={_text(v, names)}" for k, v in node.kwargs.items()]
            arguments = ", ".join([_text(a, names) for a in node.args] + keywords)
            line = f"{names[node]}: {type_text(node.meta.get('val'))} = {target_text(node.target)}({arguments})"
            path = module_path(node)
            lines.append(line + (f"  # {path}" if places and path else ""))
    return "\n".join(lines)


def target_text(target: Any) -> str:
    """`linear`, `compiled_attn::attention`, `mul`: the op without its overload's noise."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        overload = target._schema.overload_name
        suffix = f".{overload}" if overload and overload not in ("default", "Tensor", "int") else ""
        return (name if namespace == "aten" else f"{namespace}::{name}") + suffix
    return str(getattr(target, "__name__", target))


def type_text(value: Any) -> str:
    """`f32[s0, 197, 384]` for a tensor, the expression for a symbolic int."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(_torch.expression(s)) for s in value.shape)
        return f"{DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(type_text(v) for v in value) + ")"
    return str(_torch.expression(value))


def _names(program: Program) -> dict[fx.Node, str]:
    lifted = {s.arg.name: s.target for s in program.signature.input_specs if s.target and hasattr(s.arg, "name")}
    names: dict[fx.Node, str] = {}
    count = 0
    for node in program.graph.nodes:
        if node.op == "placeholder":
            names[node] = lifted.get(node.name) or f"%{node.name}"
        else:
            names[node] = f"v{count}"
            count += 1
    return names


def _text(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_text(v, names) for v in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)
