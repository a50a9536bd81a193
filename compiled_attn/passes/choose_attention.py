"""Turns plain attention into the vocabulary's op where a CPU template serves it.

    y = scaled_dot_product_attention(q, k, v, m)     ->     y = attention(q, k, v, m, scale=0.125)

A mask of booleans becomes a bias of zeros and minus infinities. What stays SDPA gets a miss with its sentence:
attention with dropout, grouped heads, or what no template accepts. On CUDA, SDPA has fused kernels and stays.

Never changes which keys a query sees, and never touches a graph that is to be trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn import ops
from compiled_attn.ir import _torch
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.ops.rules import differ
from compiled_attn.ops.templates import registry

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
RULE = "attention"


@dataclass(frozen=True)
class Call:
    """One SDPA call, or one of the op itself, as the op takes it; `mask` may still be of booleans."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    causal: bool
    softcap: float = 0.0


def read(node: fx.Node) -> Call | str:
    """What an attention node computes, or the sentence that says why the op does not."""
    if node.target is ops.attention.overload:
        operands: list[Any] = [*node.args, None][:4]
        options: dict[str, Any] = {"causal": False, **node.kwargs}
        return Call(*operands, **options)
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v = (given[name] for name in names[:3])
    if given.get("dropout_p", 0.0):
        return f"it drops probabilities with p = {given['dropout_p']}"
    if given.get("enable_gqa", False):
        return "its key heads are shared by groups of query heads"
    if any(x.meta["val"].dim() != 4 for x in (q, k, v)):
        return f"its q, k and v have {q.meta['val'].dim()} dimensions, the op takes [B, H, N, D]"
    leading = [x.meta["val"].shape[:2] for x in (q, k, v)]
    if any(differ(a, b) for other in leading[1:] for a, b in zip(leading[0], other, strict=True)):
        return "its q, k and v broadcast over batch or heads"
    width = q.meta["val"].shape[-1]
    scale = given.get("scale")
    if scale is None and not isinstance(width, int):
        return f"its scale follows from a symbolic head width {width}"
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    if not isinstance(scale, (int, float)):
        return f"its scale {scale} is computed"
    return Call(q, k, v, given.get("attn_mask"), float(scale), bool(given.get("is_causal", False)))


def bias_value(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask's fake value as the bias's."""
    return mask.to(dtype) if mask is not None and mask.dtype == torch.bool else mask


@dataclass(frozen=True)
class ChooseAttention:
    name: ClassVar[str] = "choose-attention"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        found = [n for n in program.graph.nodes if n.op == "call_function" and n.target is SDPA]
        if not found or program.mode != "inference" or target.kind != "cpu":
            return program
        edit = program.edit()
        changed = False
        for node in found:
            call = read(edit.node_of[node])
            if isinstance(call, str):
                notes.miss(node, RULE, call)
                continue
            misses = refusals(program, call, target)
            for name, because in misses:
                notes.miss(node, name, because)
            if not misses:
                write(edit, edit.node_of[node], call)
                changed = True
        return edit.finish(self.name) if changed else program


def refusals(program: Program, call: Call, target: Target) -> list[tuple[str, str]]:
    """(template, because) where no template serves the call; empty where one does."""
    q, k, v = (x.meta["val"] for x in (call.q, call.k, call.v))
    with program.fake_mode:
        bias = bias_value(call.mask.meta["val"] if call.mask else None, q.dtype)
    template, misses = registry.choose(
        ops.attention.name, (q, k, v, bias), {"scale": call.scale, "causal": call.causal}, target
    )
    return [] if template else misses


def write(edit: Edit, node: fx.Node, call: Call) -> None:
    """Puts the op in the SDPA node's place."""
    with edit.graph.inserting_before(node):
        bias: Any = call.mask
        if call.mask is not None and call.mask.meta["val"].dtype == torch.bool:
            dtype, device = call.q.meta["val"].dtype, call.q.meta["val"].device
            kinds = {"dtype": dtype, "device": device}
            seen = edit.call(aten.scalar_tensor.default, (0.0,), kinds, like=node)
            hidden = edit.call(aten.scalar_tensor.default, (float("-inf"),), kinds, like=node)
            bias = edit.call(aten.where.self, (call.mask, seen, hidden), like=node)
        keywords = {"scale": call.scale, "causal": call.causal}
        new = edit.call(ops.attention.overload, (call.q, call.k, call.v, bias), keywords, like=node)
        if any(user.target is aten.view.default for user in node.users) and not _same_memory(node, new):
            new = edit.call(aten.clone.default, (new,), {"memory_format": torch.contiguous_format}, like=node)
    edit.replace(node, new)


def _same_memory(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values of one shape are known to lie alike in memory: what views one can view the other."""
    strides = zip(a.meta["val"].stride(), b.meta["val"].stride(), strict=True)
    return all(_torch.statically_true(x == y) for x, y in strides)
