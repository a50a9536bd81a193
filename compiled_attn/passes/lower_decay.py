"""Turns attention with decay into plain attention with a bias, where no template serves it and its sizes are known.

    y = decay_attention(q, k, v, decay, scale=0.2, along=[1])     ->     q, k, v = [B Y, H, X, D] views of q, k, v
                                                                         a = scaled_dot_product_attention(q, k, v, bias)
                                                                         y = a as a map

bias [1, H, N, N] is decay times distance, computed once. A template that accepts the op (Triton's) moves less: it
stores no bias and copies no map whose columns are attended along, and the op stays for it. Retention has no softmax and
stays, with its sentence, as does decay along symbolic axes. Never changes the numbers beyond rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn import ops
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.ops.decay import along_of, decay_bias
from compiled_attn.ops.templates import registry
from compiled_attn.passes.match.positions import Numbering

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten


def refused(node: fx.Node, numbering: Numbering) -> str | None:
    """The sentence that says why a decay_attention node is no plain attention."""
    q, decay = node.args[0], node.args[3]
    if not node.kwargs.get("softmax", True):
        return "retention has no softmax"
    sizes = [q.meta["val"].shape[1 + a] for a in along(node)]  # type: ignore[union-attr]
    if not all(isinstance(n, int) for n in sizes):
        return f"its sizes {sizes} are symbolic, the bias is computed for numbers"
    if numbering.constant(decay) is None:  # type: ignore[arg-type]
        return "its decay depends on the input"
    return None


def along(node: fx.Node) -> list[int]:
    """The spatial axes that attention goes along."""
    given: Any = node.kwargs.get("along")
    return along_of(node.args[0].meta["val"], given)  # type: ignore[union-attr]


def served(node: fx.Node, target: Target) -> bool:
    """Whether a template of the target's takes the op as it is."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return registry.choose(ops.decay_attention.name, args, kwargs, target)[0] is not None


def write(edit: Edit, node: fx.Node, numbering: Numbering) -> None:
    """Puts plain attention between two rearrangements in the node's place."""
    new = edit.node_of[node]
    q, k, v = new.args[:3]
    value: Any = numbering.constant(node.args[3])  # type: ignore[arg-type]
    axes, rank = along(node), q.meta["val"].dim() - 3  # type: ignore[union-attr]
    rest = [a for a in range(rank) if a not in axes]
    order = [0, *(1 + a for a in rest), rank + 1, *(1 + a for a in axes), rank + 2]
    sizes = [q.meta["val"].shape[1 + a] for a in axes]  # type: ignore[union-attr]
    heads = q.meta["val"].shape[-2]  # type: ignore[union-attr]
    with edit.graph.inserting_before(new):

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return edit.call(target, args, kwargs, like=new)

        def places(x: Any) -> fx.Node:
            shape = [-1, heads, math.prod(sizes), x.meta["val"].shape[-1]]
            return call(aten.reshape.default, call(aten.permute.default, x, order), shape)

        bias = decay_bias(value.float(), sizes, bool(node.kwargs.get("causal", False))).unsqueeze(0)
        kind = q.meta["val"].dtype  # type: ignore[union-attr]
        made = edit.constant(f"{node.name}_bias", bias.to(kind), made_from=numbering.made_from(node.args[3]))  # type: ignore[arg-type]
        scale: Any = node.kwargs["scale"]
        out = call(
            aten.scaled_dot_product_attention.default, places(q), places(k), places(v), made, 0.0, False, scale=scale
        )
        shape = [n for i, n in enumerate(new.meta["val"].shape) if i]
        shape = [-1, *(shape[a] for a in rest), heads, *sizes, shape[-1]]
        back = [order.index(i) for i in range(rank + 3)]
        out = call(aten.permute.default, call(aten.reshape.default, out, shape), back)
    edit.replace(new, out)


@dataclass(frozen=True)
class LowerDecay:
    """Attention with decay as plain attention with a bias."""

    name: ClassVar[str] = "lower-decay"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        calls = [n for n in program.graph.nodes if n.target is ops.decay_attention.overload]
        found = [n for n in calls if not served(n, target)]
        edit = None
        numbering = Numbering(program, None)
        for node in found:
            because = refused(node, numbering)
            if because is not None:
                notes.miss(node, self.name, because)
                continue
            edit = edit or program.edit()
            write(edit, node, numbering)
            notes.did(node, self.name, f"plain attention along axes {along(node)} with its decay as bias")
        if edit is None:
            return program
        for node in edit.graph.nodes:
            if node.target is aten.view.default:  # what it views may now lie in another memory order
                node.target = aten.reshape.default
        return edit.finish(self.name)
