"""Puts a constant factor for each output of a linear map into its weights: layer scale, mostly.

    y = linear(x, w[N, K], b);  z = mul(y, g[N])        ->    z = linear(x, w * g[:, None], b * g)

What follows, as a residual's sum, then stands directly behind the product, whose epilogue takes it (PackLinear).

Never folds where the product is read by anyone else, nor a factor that is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
RULE = "fold-scale"
VIEWS = (aten.view.default, aten.reshape.default, aten.permute.default, aten.unsqueeze.default)


def product_and_factor(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The linear map that a product of two tensors scales, and the other factor."""
    if node.target is not aten.mul.Tensor:
        return None
    for one, other in (node.args[:2], node.args[1::-1]):
        if isinstance(one, fx.Node) and isinstance(other, fx.Node) and one.target is aten.linear.default:
            return one, other
    return None


def constant(node: fx.Node, edit: Edit) -> tuple[str, torch.Tensor, tuple[str, ...]] | None:
    """What `Edit.known` tells of a constant tensor or of a view of one; None for what is computed."""
    if node.target not in VIEWS:
        return edit.known(node)
    source, *options = node.args
    if not isinstance(source, fx.Node) or not all(isinstance(o, (int, list)) for o in options):
        return None
    found = constant(source, edit)
    return None if found is None else (found[0], node.target(found[1], *options), found[2])


def fold_one(edit: Edit, node: fx.Node, notes: Notes) -> bool:
    """Folds one factor, or notes the miss; returns whether it did."""
    found = product_and_factor(node)
    if found is None:
        return False
    linear, factor = found
    parts = [constant(n, edit) for n in (*linear.args[1:], factor) if isinstance(n, fx.Node)]
    given = [p for p in parts if p is not None]
    if len(given) < len(parts):
        return False
    (_, weight, _), *_, (_, scale, _) = given
    if weight.dim() != 2 or not 0 < scale.dim() <= linear.meta["val"].dim():
        return False
    if not scale.shape[-1] == scale.numel() == weight.shape[0]:
        return False
    if len(linear.users) != 1:
        notes.miss(node, RULE, f"{linear.name} is read {len(linear.users)} times")
        return False
    if any(value.dtype != weight.dtype for _, value, _ in given):
        notes.miss(node, RULE, f"the factor is {scale.dtype} and the weight {weight.dtype}")
        return False
    made_from = tuple(dict.fromkeys(name for _, _, names in given for name in names))
    scale = scale.flatten()
    fresh = [
        edit.constant(
            f"{name.removeprefix('made_')}.scaled",
            value * scale.view(-1, *[1] * (value.dim() - 1)),
            made_from=made_from,
        )
        for name, value, _ in given[:-1]
    ]
    with edit.graph.inserting_before(node):
        edit.replace(node, edit.call(aten.linear.default, (linear.args[0], *fresh), like=linear))
    notes.did(node, RULE, f"into the weights of {linear.name}")
    return True


@dataclass(frozen=True)
class FoldScale:
    """Factors for each output of a linear map go into its weights."""

    name: ClassVar[str] = RULE
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        if program.mode != "inference" or not any(product_and_factor(n) for n in program.graph.nodes):
            return program
        edit = program.edit()
        changed = [fold_one(edit, n, notes) for n in list(edit.graph.nodes) if n.op == "call_function"]
        return edit.finish(self.name) if any(changed) else program
