"""Keeps a draft's fake values true after an op began to give its result in another memory layout.

    v = view(y, [2, 96, 196])    ->    v = reshape(y, [2, 96, 196])        where y now lies in channels last

A view that the new strides may forbid becomes a reshape, an output gets back the dense layout that it had. Inductor
makes no difference between a view and a reshape.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch
from compiled_attn.ir.program import Edit, fake_call

aten = torch.ops.aten
READS_STRIDES = (aten.as_strided.default, aten.view_as_real.default, aten.view.dtype)


def reads_strides(graph: fx.Graph) -> fx.Node | None:
    """A node whose meaning depends on the memory of its input, if there is one."""
    return next((n for n in graph.nodes if n.op == "call_function" and n.target in READS_STRIDES), None)


def moved(written: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """Those nodes whose strides are not those of the nodes that they stand for."""
    return {new for new, old in written.items() if _strides(new.meta["val"]) != _strides(old.meta["val"])}


def follow_strides(edit: Edit, fresh: set[fx.Node]) -> None:
    """Recomputes the values of what follows the nodes `fresh`, whose strides are not those that stood there before."""
    mode = edit.program.fake_mode
    changed = set(fresh)
    for node in list(edit.graph.nodes):
        if node.op == "output":
            _restore_outputs(edit, node, changed)
        if node.op != "call_function" or not changed.intersection(node.all_input_nodes) or node in fresh:
            continue
        known = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        if node.meta.get("unbacked_bindings") or not known or "val" not in node.meta:
            continue
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        with _torch.without_guards(edit.program.shape_env):
            value = fake_call(mode, node.target, node.args, node.kwargs)
        if _strides(value) != _strides(node.meta["val"]):
            changed.add(node)
            node.meta["val"] = value


def _restore_outputs(edit: Edit, output: fx.Node, changed: set[fx.Node]) -> None:
    for node in changed.intersection(output.all_input_nodes):
        value: Any = node.meta["val"]
        if isinstance(value, torch.Tensor) and not value.is_contiguous():
            with edit.graph.inserting_before(output):
                dense = edit.call(aten.clone.default, (node,), {"memory_format": torch.contiguous_format}, like=node)
            output.replace_input_with(node, dense)


def _strides(value: Any) -> list[str]:
    return [str(leaf.stride()) for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
