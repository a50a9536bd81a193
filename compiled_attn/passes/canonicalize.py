"""Removes what computes nothing, and computes the same thing once.

    v1 = clone(v0); v2 = dropout(v1, 0.1, False); v3 = _to_copy(v2, dtype=f32)    ->    v0        (v0 is f32)
    a = sym_size(x, 0); b = sym_size(x, 0)                                        ->    a

Never removes a copy that changes strides (a later `view` may rely on them), never one that keeps an output from
aliasing an input, and never merges random or mutating ops.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
SAME_IF_EQUAL = (
    aten.clone.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.slice.Tensor,
    aten.permute.default,
)


def computes_nothing(node: fx.Node) -> bool:
    """Whether a node's value is its first argument's: same numbers, dtype, device, shape and strides."""
    args: tuple[Any, ...] = node.args
    if node.target is aten.dropout.default:
        return bool(not args[2] or args[1] == 0)
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return type(args[1]) in (int, float) and args[1] == 1 and _same(node)
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        return type(args[1]) in (int, float) and args[1] == 0 and _same(node)
    if node.target is aten.permute.default and list(args[1]) != sorted(args[1]):
        return False
    return node.target in SAME_IF_EQUAL and _same(node)


def _same(node: fx.Node) -> bool:
    source: Any = node.args[0]
    a, b = source.meta.get("val"), node.meta.get("val")
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    if a.dtype != b.dtype or a.device != b.device or a.dim() != b.dim():
        return False
    pairs = [*zip(a.shape, b.shape, strict=True), *zip(a.stride(), b.stride(), strict=True)]
    return all(_torch.statically_true(x == y) for x, y in pairs) and _torch.statically_true(
        a.storage_offset() == b.storage_offset() if node.target is aten.slice.Tensor else True
    )


def _keeps_output_apart(node: fx.Node) -> bool:
    """Whether removing the node would make an output of the program an input or a weight of it."""
    source: Any = node.args[0]
    while isinstance(source, fx.Node) and source.op == "call_function" and computes_nothing(source):
        source = source.args[0]
    return source.op == "placeholder" and any(user.op == "output" for user in node.users)


def _key(node: fx.Node) -> Any:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            return None
    elif target is not operator.getitem:
        return None
    try:
        key = (target, _frozen(node.args), _frozen(node.kwargs))
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return (type(value), value) if isinstance(value, (int, float, bool)) else value


def _fresh(node: fx.Node) -> bool:
    return bool(node.meta.get("unbacked_bindings"))


@dataclass(frozen=True)
class Canonicalize:
    """Removes no-ops, and merges nodes that compute the same value."""

    name: ClassVar[str] = "canonicalize"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        if program.mode == "train":
            return program  # views and in-place ops alias there
        edit = program.edit()
        gone, merged = 0, 0
        for node in [n for n in edit.graph.nodes if n.target is aten._assert_tensor_metadata.default]:
            edit.graph.erase_node(node)  # it asks for the dtype that the verifier has asked for
            gone += 1
        seen: dict[Any, fx.Node] = {}
        for node in list(edit.graph.nodes):
            if node.op != "call_function":
                continue
            if computes_nothing(node) and not _keeps_output_apart(node):
                edit.replace(node, node.args[0])
                gone += 1
                continue
            key = None if _fresh(node) else _key(node)
            if key is not None and key in seen and not any(u.op == "output" for u in node.users):
                edit.replace(node, seen[key])
                merged += 1
            elif key is not None:
                seen[key] = node
        if not gone and not merged:
            return program
        notes.did("graph", self.name, f"{gone} no-ops removed, {merged} repeated values merged")
        return edit.finish(self.name)
