"""Folds a batch norm in inference into the convolution or linear before it.

    y = conv2d(x, w, b); z = batch_norm(y, g, h, mean, var, eps)
    ->  z = conv2d(x, w * g / sqrt(var + eps), (b - mean) * g / sqrt(var + eps) + h)

Never folds where the convolution is read by anyone else, nor a batch norm that still learns its statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
RULE = "fold-batch-norm"
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv2d.padding,
    aten.conv1d.padding,
    aten.conv3d.padding,
    aten.linear.default,
)


def batch_norm_parts(node: fx.Node) -> tuple[Any, ...] | None:
    """(x, weight, bias, mean, variance, eps) of a batch norm in inference; None for any other node."""
    if node.target is aten.batch_norm.default:
        x, weight, bias, mean, variance, training, _, eps = node.args[:8]
        return None if training or mean is None else (x, weight, bias, mean, variance, eps)
    if node.target is aten._native_batch_norm_legit_no_training.default:
        x, weight, bias, mean, variance, _, eps = node.args
        return x, weight, bias, mean, variance, eps
    return None


def fold_one(edit: Edit, program: Program, node: fx.Node, notes: Notes) -> bool:
    """Folds one batch norm, or notes the miss; returns whether it did."""
    parts = batch_norm_parts(node)
    if parts is None:
        return False
    x, weight, bias, mean, variance, eps = parts
    if x.target not in CONVOLUTIONS:
        notes.miss(node, RULE, f"its input {x.name} is no convolution or linear")
        return False
    if len(x.users) != 1:
        notes.miss(node, RULE, f"{x.name} is read {len(x.users)} times ({', '.join(u.name for u in x.users)})")
        return False
    if x.target is aten.linear.default and x.meta["val"].dim() != 2:
        notes.miss(node, RULE, f"{x.name} has {x.meta['val'].dim()} dimensions, so its features are not the channels")
        return False
    tensors = program.tensors()
    conv_bias = x.args[2] if len(x.args) > 2 else None
    nodes = [x.args[1], conv_bias, weight, bias, mean, variance]
    if any(n is not None and n.name not in tensors for n in nodes):
        notes.miss(node, RULE, "a weight of the convolution or of the norm is no constant")
        return False
    values: list[Any] = [None if n is None else tensors[n.name].detach().double() for n in nodes]
    kernel, shift, g, h, m, v = values
    scale = torch.rsqrt(v + eps) if g is None else g * torch.rsqrt(v + eps)
    moved = (-m if shift is None else shift - m) * scale + (0 if h is None else h)
    dtype = x.args[1].meta["val"].dtype
    names = {s.arg.name: s.target or "" for s in program.signature.input_specs}
    made_from = tuple(names[n.name] for n in nodes if n is not None)
    folded = (kernel * scale.reshape(-1, *[1] * (kernel.dim() - 1))).to(dtype)
    new_weight = edit.constant(f"{names[x.args[1].name]}.folded", folded, made_from=made_from)
    new_bias = edit.constant(f"{names[x.args[1].name]}.shift", moved.to(dtype), made_from=made_from)
    with edit.graph.inserting_before(node):
        fresh = edit.call(x.target, (x.args[0], new_weight, new_bias, *x.args[3:]), x.kwargs, like=x)
    if node.target is aten.batch_norm.default:
        edit.replace(node, fresh)
    else:
        for user in list(node.users):
            edit.replace(user, fresh)
    notes.did(node, RULE, f"folded into {x.name}")
    return True


@dataclass(frozen=True)
class FoldBatchNorm:
    """Folds batch norms in inference into what stands before them."""

    name: ClassVar[str] = RULE
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        if program.mode == "train":
            return program
        edit = program.edit()
        changed = [fold_one(edit, program, n, notes) for n in list(edit.graph.nodes) if n.op == "call_function"]
        return edit.finish(self.name) if any(changed) else program
