"""Computes once, at compile time, whatever does not depend on the input (hoisting).

    t = index(table, positions); b = permute(t, ...)      ->    b is a constant

Never folds random ops, parameters of a program that trains, or a value more than `growth` times as large as what it
was made from (a broadcast is cheaper to repeat than to read). What is gathered from a table (a relative bias) is dearer
to gather than to read, however much larger than the table: it is folded while all such values together hold no more
than the program's own tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

FREE = 4096  # elements: a constant this small is always worth keeping
GATHERS = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
    torch.ops.aten.gather.default,
    torch.ops.aten.embedding.default,
}


def constant_placeholders(program: Program) -> dict[str, str]:
    """Placeholder name -> name of a tensor that the program never changes (parameters too, unless it trains)."""
    kinds = [InputKind.BUFFER, InputKind.CONSTANT_TENSOR]
    if program.mode == "inference":
        kinds.append(InputKind.PARAMETER)
    mutated = set(program.signature.buffers_to_mutate.values())
    return {
        s.arg.name: s.target
        for s in program.signature.input_specs
        if s.kind in kinds and s.target is not None and s.target not in mutated
    }


def _foldable(node: fx.Node, known: set[fx.Node]) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            return False
    elif getattr(target, "__module__", "") != "_operator":
        return False
    values = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return bool(values) and all(a in known for a in node.all_input_nodes)


def fold(edit: Edit, program: Program, growth: float) -> list[tuple[fx.Node, tuple[str, ...]]]:
    """Replaces the outermost constant nodes; returns them with the names of the tensors they were made from."""
    sources = constant_placeholders(program)
    tensors = program.tensors()
    known: set[fx.Node] = set()
    roots: dict[fx.Node, frozenset[str]] = {}
    for node in edit.graph.nodes:
        if node.op == "placeholder" and node.name in sources and node.name in tensors:
            known.add(node)
            roots[node] = frozenset((sources[node.name],))
        elif node.op == "call_function" and _foldable(node, known):
            known.add(node)
            roots[node] = frozenset().union(*(roots[a] for a in node.all_input_nodes))
    borders = [
        n
        for n in edit.graph.nodes
        if n in known
        and n.op == "call_function"
        and isinstance(n.meta.get("val"), torch.Tensor)
        and any(u not in known for u in n.users)
    ]
    memo: dict[fx.Node, Any] = {}
    folded = []
    room = sum(t.numel() * t.element_size() for t in tensors.values())  # bytes, for what only a gather makes large
    for node in borders:
        made_from = tuple(sorted(roots[node]))
        size = node.meta["val"].numel()
        if not isinstance(size, int) or _is_view(node):
            continue
        if size > max(FREE, growth * _elements(node, frozenset())):
            held = size * node.meta["val"].element_size()
            if size > growth * _elements(node, GATHERS) or held > room:
                continue
            room -= held
        value = _evaluate(node, tensors, memo)
        origins = tuple(o for name in made_from for o in program.origin.get(name, (name,)))
        layout = torch.preserve_format if _sets_a_layout(node) else torch.contiguous_format
        kept = value.clone(memory_format=layout)
        constant = edit.constant(f"folded.{node.name}", kept, made_from=origins)
        edit.replace(node, constant)
        tensors[constant.name] = value  # a later border may be made from this one
        folded.append((node, made_from))
    return folded


def _elements(node: fx.Node, ends: Collection[Any]) -> int:
    """How many the values hold that a node is made from: placeholders, and results of the ops `ends`."""
    stack, met, total = [node], {node}, 0
    while stack:
        top = stack.pop()
        if top.op == "placeholder" or top.target in ends:
            total += top.meta["val"].numel()
        else:
            fresh = [n for n in top.all_input_nodes if n not in met]
            met.update(fresh)
            stack += fresh
    return total


def _sets_a_layout(node: fx.Node) -> bool:
    """Whether attention reads it as q, k or v: its result is laid out as these are, and views behind rely on that."""
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    return any(user.target is sdpa and node in user.args[:3] for user in node.users)


def _is_view(node: fx.Node) -> bool:
    """Whether the value is a view of one placeholder's memory: nothing is saved by a copy of it."""
    while node.op == "call_function":
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target is torch.ops.aten.expand.default:
            return target is torch.ops.aten.expand.default
        if not (target.is_view or target is torch.ops.aten.reshape.default):
            return False
        node = node.all_input_nodes[0]
    return True


def _evaluate(node: fx.Node, tensors: dict[str, torch.Tensor], memo: dict[fx.Node, Any]) -> Any:
    if node in memo:
        return memo[node]
    if node.op == "placeholder":
        return tensors[node.name]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _evaluate(n, tensors, memo))
    target: Any = node.target
    with torch.no_grad():
        memo[node] = target(*args, **kwargs)
    return memo[node]


@dataclass(frozen=True)
class FoldConstants:
    """Hoists what does not depend on the input. growth: largest allowed size of a result over that of its sources."""

    growth: float = 8.0
    name: ClassVar[str] = "fold-constants"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        edit = program.edit()
        folded = fold(edit, program, self.growth)
        for node, made_from in folded:
            notes.did(node, self.name, f"{node.name} computed once, from {', '.join(made_from)}")
        return edit.finish(self.name) if folded else program
