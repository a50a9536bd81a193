"""Attention for a GPU that is not here: SDPA becomes the fused ATen operator that torch would choose on the device.

    y = scaled_dot_product_attention(q, k, v)     ->  y = _scaled_dot_product_flash_attention(q, k, v, ...)[0]
    y = scaled_dot_product_attention(q, k, v, m)  ->  y = _scaled_dot_product_efficient_attention(q, k, v, b, ...)[0]

With no device torch takes the mathematical form for every dtype, silently. What neither operator covers stays SDPA,
which Inductor then writes out in that form, with a miss that says why. Never changes which keys a query sees.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from compiled_attn.ir.errors import LowerError
from compiled_attn.ir.notes import Notes, user_line
from compiled_attn.ir.program import Edit, Program
from compiled_attn.ir.targets import Target
from compiled_attn.passes.choose_attention import SDPA, Call, read

aten = torch.ops.aten
NAME = "fuse-attention"
RULE = "fused attention"
FLASH_SM, FLASH_WIDEST = 80, 256
HALVES = (torch.float16, torch.bfloat16)


def fuse_attention(program: Program, target: Target, notes: Notes, *, strict: bool = False) -> Program:
    """The program with a fused operator for each SDPA that one covers; the same object where none does."""
    found = [n for n in program.graph.nodes if n.op == "call_function" and n.target is SDPA]
    edit = program.edit()
    for node in found:
        call = read(edit.node_of[node])
        because = call if isinstance(call, str) else _uncovered(call, target)
        if isinstance(call, str) or because is not None:
            _refuse(node, because or "", notes, strict=strict)
            _keep_order(edit, edit.node_of[node])
        else:
            notes.did(node, RULE, _write(edit, edit.node_of[node], call, target))
    return edit.finish(NAME) if found else program


def foreseen(node: fx.Node, target: Target) -> tuple[str, str]:
    """(operator, because) for an SDPA node: "flash", "efficient", or "math" with the sentence that says why."""
    call = read(node)
    because = call if isinstance(call, str) else _uncovered(call, target)
    if isinstance(call, str) or because is not None:
        return "math", because or ""
    return ("flash" if _is_flash(call, target) else "efficient"), ""


def _refuse(node: fx.Node, because: str, notes: Notes, *, strict: bool) -> None:
    notes.miss(node, RULE, because)
    if strict:
        raise LowerError(
            "no fused operator serves scaled_dot_product_attention",
            where=user_line(node) or str(node.format_node()),
            facts=because,
            do="change what the sentence names, or build with strict=False, which stores N x N probabilities",
        )


def _uncovered(call: Call, target: Target) -> str | None:
    """None where an operator covers the call on the target, else the sentence that says why not."""
    q, k, v = (x.meta["val"] for x in (call.q, call.k, call.v))
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        return f"q is {q.dtype} but k is {k.dtype} and v is {v.dtype}"
    if q.dtype not in (*HALVES, torch.float32):
        return f"its elements are {q.dtype}, the fused operators read float32, float16 and bfloat16"
    if q.dtype == torch.bfloat16 and target.sm < FLASH_SM:
        return f"target {target.name} is sm_{target.sm}, which has no bfloat16"
    step = 4 if q.dtype == torch.float32 else 8
    for name, width in (("head width", q.shape[-1]), ("value width", v.shape[-1])):
        if not isinstance(width, int):
            return f"its {name} {width} is symbolic"
        if width % step:
            return f"its {name} is {width}, the fused operators take multiples of {step} in {q.dtype}"
    if call.causal and call.mask is not None:
        return "it is causal and has a mask as well"
    return None


def _is_flash(call: Call, target: Target) -> bool:
    q, k, v = (x.meta["val"] for x in (call.q, call.k, call.v))
    square = isinstance(q.shape[2], int) and q.shape[2] == k.shape[2]
    return (
        call.mask is None
        and q.dtype in HALVES
        and target.sm >= FLASH_SM
        and q.shape[-1] == v.shape[-1] <= FLASH_WIDEST
        and (square or not call.causal)  # flash aligns a causal mask at the end, SDPA at the beginning
    )


def _write(edit: Edit, node: fx.Node, call: Call, target: Target) -> str:
    """Puts the fused operator in the SDPA node's place; returns its name."""
    with edit.graph.inserting_before(node):
        q, k, v = (_dense_last(edit, node, x) for x in (call.q, call.k, call.v))
        if _is_flash(call, target):
            name, overload = "flash", aten._scaled_dot_product_flash_attention.default
            args: tuple[Any, ...] = (q, k, v, 0.0, call.causal)
        else:
            name, overload = "efficient", aten._scaled_dot_product_efficient_attention.default
            args = (q, k, v, _bias(edit, node, call), False, 0.0, call.causal)
        fused = edit.call(overload, args, {"scale": call.scale}, like=node)
        out = edit.call(operator.getitem, (fused, 0), like=node)
        if out.meta["val"].stride() != node.meta["val"].stride():
            out = _like_before(edit, node, out)
    edit.replace(node, out)
    return name


def _dense_last(edit: Edit, node: fx.Node, value: fx.Node) -> fx.Node:
    """The value, copied where its last dimension is not dense, which the operators refuse on the device."""
    if value.meta["val"].stride(-1) == 1:
        return value
    return edit.call(aten.clone.default, (value,), {"memory_format": torch.contiguous_format}, like=node)


def _bias(edit: Edit, node: fx.Node, call: Call) -> fx.Node | None:
    """The mask as an additive bias of q's dtype, expanded to [B, H, N, M]."""
    if call.mask is None:
        return None
    bias, q, k = call.mask, call.q.meta["val"], call.k.meta["val"]
    if bias.meta["val"].dtype == torch.bool:
        kinds = {"dtype": q.dtype, "device": q.device}
        seen = edit.call(aten.scalar_tensor.default, (0.0,), kinds, like=node)
        hidden = edit.call(aten.scalar_tensor.default, (float("-inf"),), kinds, like=node)
        bias = edit.call(aten.where.self, (bias, seen, hidden), like=node)
    elif bias.meta["val"].dtype != q.dtype:
        bias = edit.call(aten.to.dtype, (bias, q.dtype), like=node)
    sizes: list[Any] = []
    for dim, size in enumerate((*q.shape[:3], k.shape[2])):
        sizes.append(size if isinstance(size, int) else _size_node(edit, node, call.q if dim < 3 else call.k, dim))
    return edit.call(aten.expand.default, (bias, sizes), like=node)


def _size_node(edit: Edit, node: fx.Node, of: fx.Node, dim: int) -> fx.Node:
    return edit.call(aten.sym_size.int, (of, min(dim, 2)), like=node)


def _keep_order(edit: Edit, node: fx.Node) -> None:
    """Behind an SDPA that is written out: a copy in the memory order that SDPA had when its readers were captured."""
    value = node.meta["val"]
    readers = list(node.users)
    with edit.graph.inserting_before(node.next):
        swap = not value.is_contiguous() and value.transpose(1, 2).is_contiguous()
        turned = edit.call(aten.transpose.int, (node, 1, 2), like=node) if swap else node
        kept = edit.call(aten.clone.default, (turned,), {"memory_format": torch.contiguous_format}, like=node)
        out = edit.call(aten.transpose.int, (kept, 1, 2), like=node) if swap else kept
    for reader in readers:
        reader.replace_input_with(node, out)


def _like_before(edit: Edit, node: fx.Node, out: fx.Node) -> fx.Node:
    """A copy in dense memory, where a reader views the result and counted on SDPA's own memory order."""
    if all(user.target is not aten.view.default for user in node.users):
        return out
    return edit.call(aten.clone.default, (out,), {"memory_format": torch.contiguous_format}, like=node)
