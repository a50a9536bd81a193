"""Keeps maps in channels last between matrix products: 1x1 convolutions become linear maps, what is between follows.

    y = conv2d(x, w[O, C, 1, 1], b)        a = linear(permute(x, [0, 2, 3, 1]), w[O, C], b)
    z = gelu(y)                       ->   c = gelu(a)
    t = add(z, s)                          d = add(c, permute(s, [0, 2, 3, 1]));  t = permute(d, [0, 3, 1, 2])

A linear map has our packed product (PackLinear), whose epilogue takes what stands behind it; a convolution has
oneDNN's. Pointwise ops on maps that lie in channels last already are computed there, so that permutes meet and cancel:
one is left where something else reads the map, and in Inductor it costs nothing, for the memory is the same.

Never touches a convolution with steps, borders, groups or computed weights, nor where oneDNN serves the product better.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.passes.fold_constants import constant_placeholders
from compiled_attn.passes.pack_linear import ours_is_ahead
from compiled_attn.passes.strides import follow_strides, reads_strides

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
RULE = "channels-last"
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


@dataclass
class Maps:
    """The draft's maps that also stand in channels last: `last[n]` is n with its channels moved to the end."""

    edit: Edit
    last: dict[fx.Node, fx.Node] = field(default_factory=dict)
    computed: list[fx.Node] = field(default_factory=list)  # those that are now computed in channels last

    def of(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The map in channels last, permuted at the insertion point where it does not lie so yet."""
        if node not in self.last:
            self.last[node] = self.edit.call(aten.permute.default, (node, TO_LAST), like=reader)
        return self.last[node]

    def put(self, node: fx.Node, last: fx.Node) -> None:
        self.last[node] = last
        self.computed.append(node)


def refuses(node: fx.Node, constants: dict[str, str], target: Target) -> str | None:
    """Because of what a convolution is no linear map of ours; "" where its kernel is larger than 1x1 or has groups."""
    given: Any = (*node.args, *(None, [1, 1], [0, 0], [1, 1], 1)[len(node.args) - 2 :])
    x, weight, bias, stride, padding, _, groups = given
    outer, inner, *kernel = weight.meta["val"].shape
    if list(kernel) != [1, 1] or groups != 1:
        return ""
    if x.meta["val"].dim() != 4:
        return "its map has no batch"
    if list(stride) != [1, 1] or (not isinstance(padding, str) and any(padding)):
        return "it has steps or a border"
    if weight.name not in constants or (bias is not None and bias.name not in constants):
        return "its weight or bias is computed"
    value = weight.meta["val"]
    if value.dtype != x.meta["val"].dtype:
        return f"its input is {x.meta['val'].dtype} and its weight {value.dtype}"
    if not ours_is_ahead(inner, outer, value.dtype, target):
        return f"oneDNN serves {inner} x {outer} on target {target.name}"
    return None


def as_linear(maps: Maps, node: fx.Node, program: Program, constants: dict[str, str]) -> None:
    given: Any = (*node.args, None)
    x, weight, bias = given[:3]
    name = constants[weight.name]
    value = program.tensors()[weight.name].detach().flatten(1)
    flat = maps.edit.constant(f"{name}.flat", value, made_from=program.origin.get(name, (name,)))
    with maps.edit.graph.inserting_before(node):
        maps.put(node, maps.edit.call(aten.linear.default, (maps.of(x, node), flat, bias), like=node))


def follows(node: fx.Node, maps: Maps) -> bool:
    """Whether a node is pointwise on maps, one of them in channels last by now, and on one number or one a channel."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
        return False
    if not isinstance(node.meta.get("val"), torch.Tensor) or node.meta["val"].dim() != 4:
        return False
    if node.kwargs.get("memory_format") is not None:
        return False
    inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    known = all(n.meta["val"].dim() in (0, 4) or _a_channel(n) for n in inputs)
    return known and any(n in maps.last and n.meta["val"].dim() == 4 for n in inputs)


def _a_channel(node: fx.Node) -> bool:
    shape = node.meta["val"].shape
    return len(shape) == 3 and all(isinstance(n, int) and n == 1 for n in shape[1:])


def follow(maps: Maps, node: fx.Node) -> None:
    """Computes a pointwise node in channels last."""

    def moved(n: fx.Node) -> fx.Node:
        value = n.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return n
        if value.dim() == 3:
            return maps.edit.call(aten.permute.default, (n, [1, 2, 0]), like=node)
        return maps.of(n, node)

    with maps.edit.graph.inserting_before(node):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), moved)
        maps.put(node, maps.edit.call(node.target, args, kwargs, like=node))


def settle(maps: Maps) -> set[fx.Node]:
    """Gives the old layout, as a view, to what still reads a map that is now computed in channels last."""
    moved = set()
    for node in reversed(maps.computed):
        if node.users:
            last = maps.last[node]
            with maps.edit.graph.inserting_after(last):
                first = maps.edit.call(aten.permute.default, (last, TO_FIRST), like=node)
            if str(first.meta["val"].stride()) != str(node.meta["val"].stride()):
                moved.add(first)
            node.replace_all_uses_with(first)
        maps.edit.graph.erase_node(node)
    return moved


@dataclass(frozen=True)
class ChannelsLast:
    """1x1 convolutions become linear maps, and pointwise ops around them are computed in channels last."""

    name: ClassVar[str] = RULE
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        if program.mode != "inference" or target.kind != "cpu":
            return program
        constants = constant_placeholders(program)
        asked = {
            n: refuses(n, constants, target)
            for n in program.graph.nodes
            if n.target in (aten.conv2d.default, aten.conv2d.padding)
        }
        for node, because in asked.items():
            if because:
                notes.miss(node, RULE, because)
        permuted = any(n.target is aten.permute.default and n.args[1] == TO_FIRST for n in program.graph.nodes)
        if reads_strides(program.graph) is not None or not (permuted or None in asked.values()):
            return program
        maps = Maps(program.edit())
        fresh: set[fx.Node] = set()
        linear = {maps.edit.node_of[n]: n for n, because in asked.items() if because is None}
        for node in list(maps.edit.graph.nodes):
            if node in linear:
                as_linear(maps, node, program, constants)
                notes.did(linear[node], RULE, "linear map")
            elif node.target is aten.permute.default and node.args[1] == TO_FIRST:
                maps.last[node] = node.args[0]
            elif node.target is aten.permute.default and node.args[1] == TO_LAST and node.args[0] in maps.last:
                last = maps.last[node.args[0]]
                if str(last.meta["val"].stride()) != str(node.meta["val"].stride()):
                    fresh.add(last)
                maps.edit.replace(node, last)
            elif follows(node, maps):
                follow(maps, node)
        if not maps.computed:
            return program
        follow_strides(maps.edit, fresh | settle(maps))
        return maps.edit.finish(self.name)
