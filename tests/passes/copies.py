"""Copies of a Program that compute the same, or are wrong in one constant, on which a pass must not be fooled."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputSpec, TensorArgument

from compiled_attn.ir.program import LIFTED, Program

aten = torch.ops.aten
FLAT = {"": ("", "torch.nn.modules.module.Module")}


def renamed(program: Program) -> Program:
    """Nodes, parameters and modules under other names, and no module hierarchy."""
    copy = program.edit().finish("renamed")
    state, constants, specs = dict(copy.state), dict(copy.constants), []
    spec_of = {s.arg.name: s for s in copy.signature.input_specs}
    for number, node in enumerate(copy.graph.nodes):
        if node.op == "call_function":
            node.meta["nn_module_stack"] = FLAT
            node._rename(f"t{number}")
        if node.op != "placeholder":
            continue
        spec = spec_of[node.name]
        if spec.kind in LIFTED and isinstance(spec.arg, TensorArgument):
            node._rename(f"w{number}")
            for store in (state, constants):
                if spec.target in store:
                    store[f"w{number}"] = store.pop(spec.target)
            spec = InputSpec(spec.kind, TensorArgument(node.name), f"w{number}", spec.persistent)
        specs.append(spec)
    outputs = [
        replace(s, arg=TensorArgument(value.name)) if isinstance(value, fx.Node) else s
        for s, value in zip(copy.signature.output_specs, _output(copy.graph).args[0], strict=True)
    ]
    signature = replace(copy.signature, input_specs=specs, output_specs=outputs)
    return replace(copy, signature=signature, state=state, constants=constants)


def split(program: Program) -> Program:
    """Every linear layer whose width is a multiple of 3 as three, joined by cat."""
    edit = program.edit()
    for node in list(edit.graph.nodes):
        if node.target is not aten.linear.default or node.meta["val"].shape[-1] % 3:
            continue
        x, weight, bias = (*node.args, None)[:3]
        width = node.meta["val"].shape[-1] // 3
        with edit.graph.inserting_before(node):
            parts = []
            for i in range(3):
                rows = [
                    edit.call(aten.slice.Tensor, (t, 0, i * width, (i + 1) * width), like=node)
                    for t in (weight, bias)
                    if t is not None
                ]
                parts.append(edit.call(aten.linear.default, (x, *rows), like=node))
            joined = edit.call(aten.cat.default, (parts, -1), like=node)
        edit.replace(node, joined)
    return edit.finish("split")


def reordered(program: Program) -> Program:
    """Sums and products with their operands exchanged, a @ b as (b^T @ a^T)^T, nodes in another valid order."""
    edit = program.edit()
    for node in list(edit.graph.nodes):
        tensors = all(isinstance(a, fx.Node) and isinstance(a.meta["val"], torch.Tensor) for a in node.args[:2])
        if not tensors or len(node.args) < 2:
            continue
        if node.target in (aten.add.Tensor, aten.mul.Tensor) and not node.kwargs:
            node.args = (node.args[1], node.args[0])
        elif node.target in (aten.matmul.default, aten.bmm.default):
            with edit.graph.inserting_before(node):
                a, b = (edit.call(aten.transpose.int, (x, -2, -1), like=node) for x in node.args)
                exchanged = edit.call(node.target, (b, a), like=node)
                edit.replace(node, edit.call(aten.transpose.int, (exchanged, -2, -1), like=node))
    _latest_first(edit.graph)
    return edit.finish("reordered")


def _latest_first(graph: fx.Graph) -> None:
    """Sorts the computing nodes anew: of those that may come next, the one that came last."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    place = {n: i for i, n in enumerate(nodes)}
    waits = {n: sum(s in place for s in n.all_input_nodes) for n in nodes}
    ready = [-place[n] for n in nodes if not waits[n]]
    heapq.heapify(ready)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    while ready:
        node = nodes[-heapq.heappop(ready)]
        last.append(node)
        last = node
        for user in node.users:
            if user in waits:
                waits[user] -= 1
                if not waits[user]:
                    heapq.heappush(ready, -place[user])


def softmax_over_queries(program: Program) -> Program:
    """Every softmax over the last dimension moved to the one before."""
    edit = program.edit()
    for node in edit.graph.nodes:
        if node.target is aten.softmax.int:
            node.args = (node.args[0], -2, *node.args[2:])
    return edit.finish("softmax over queries")


def scale_off(program: Program) -> Program:
    """Every multiplication and division by a number made with 1.3 times that number."""
    edit = program.edit()
    for node in edit.graph.nodes:
        if node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], float):
            node.args = (node.args[0], node.args[1] * 1.3)
    return edit.finish("scale off")


def bias_transposed(program: Program) -> Program:
    """Every square tensor that is added to scores transposed first."""
    edit = program.edit()
    for node in list(edit.graph.nodes):
        if node.target is not aten.add.Tensor or not all(isinstance(a, fx.Node) for a in node.args):
            continue
        bias = node.args[1].meta["val"]
        if bias.dim() >= 4 and isinstance(bias.shape[-1], int) and bias.shape[-1] == bias.shape[-2]:
            with edit.graph.inserting_before(node):
                turned = edit.call(aten.transpose.int, (node.args[1], -2, -1), like=node)
            node.args = (node.args[0], turned)
    return edit.finish("bias transposed")


def _output(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if n.op == "output")


def remade(program: Program) -> Program:
    """Renamed, split and reordered at once."""
    return renamed(split(reordered(program)))


def rolled_back_wrong(program: Program) -> Program:
    """The last roll brings elements back by one place less along the first axis."""
    edit = program.edit()
    last = [n for n in edit.graph.nodes if n.target is aten.roll.default][-1]
    shifts = list(last.args[1])
    last.args = (last.args[0], [shifts[0] - 1, *shifts[1:]], *last.args[2:])
    return edit.finish("rolled back wrong")


def bias_bent(program: Program) -> Program:
    """The bias of one pair of tokens 0.1 larger in every attention."""
    return _with_masks(program, aten.add.Tensor, lambda n, m, kind: 0.1 * _pair(n, m).to(kind))


def mask_bent(program: Program) -> Program:
    """One more pair of tokens hidden in every mask of booleans."""
    return _with_masks(program, aten.logical_and.default, lambda n, m, _: ~_pair(n, m))


def _pair(queries: int, keys: int) -> torch.Tensor:
    """The second query and key: other pairs lie as far from each other."""
    one = torch.zeros(queries, keys, dtype=torch.bool)
    one[1, 1] = True
    return one


def _with_masks(program: Program, op: Any, make: Callable[[int, int, torch.dtype], torch.Tensor]) -> Program:
    edit = program.edit()
    for node in list(edit.graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or len(node.args) < 4 or node.args[3] is None:
            continue
        mask = node.args[3].meta["val"]
        constant = edit.constant(f"{node.name}_bent", make(*mask.shape[-2:], mask.dtype))
        with edit.graph.inserting_before(node):
            node.args = (*node.args[:3], edit.call(op, (node.args[3], constant), like=node), *node.args[4:])
    return edit.finish("masks bent")
