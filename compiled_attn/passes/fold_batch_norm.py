"""Folds a batch norm in inference into the convolution or linear before it, or into the 1x1 convolution behind it.

    y = conv2d(x, w, b); z = batch_norm(y, g, h, mean, var, eps)
    ->  z = conv2d(x, w * g / sqrt(var + eps), (b - mean) * g / sqrt(var + eps) + h)

    y = linear(x, w, b); z = batch_norm(view(y, [B N, C]), g, ...)    ->  z = view(linear(x, w', b'), [B N, C])

    y = batch_norm(x, g, h, mean, var, eps); z = conv2d(y, w[O, C, 1, 1], b)          s = g / sqrt(var + eps)
    ->  z = conv2d(x, w * s[:, None, None], b + w (h - mean s))

Never folds where what stands between them is read by anyone else, nor a batch norm that still learns its statistics;
forward not through a border, whose zeros would no longer be zeros behind the norm.
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
FLATTENS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
POINTWISE = (aten.conv2d.default, aten.conv2d.padding)


def batch_norm_parts(node: fx.Node) -> tuple[Any, ...] | None:
    """(x, weight, bias, mean, variance, eps) of a batch norm in inference; None for any other node."""
    if node.target is aten.batch_norm.default:
        x, weight, bias, mean, variance, training, _, eps = node.args[:8]
        return None if training or mean is None else (x, weight, bias, mean, variance, eps)
    if node.target is aten._native_batch_norm_legit_no_training.default:
        x, weight, bias, mean, variance, _, eps = node.args
        return x, weight, bias, mean, variance, eps
    return None


def fold_one(edit: Edit, node: fx.Node, notes: Notes) -> bool:
    """Folds one batch norm, or notes the miss; returns whether it did."""
    parts = batch_norm_parts(node)
    if parts is None:
        return False
    if fold_forward(edit, node, parts, notes):
        return True
    x, weight, bias, mean, variance, eps = parts
    rows = x if _rows_of_linear(x) else None  # [B N, C] of a linear [B, N, C]
    x = x if rows is None else rows.args[0]
    if x.target not in CONVOLUTIONS:
        notes.miss(node, RULE, f"its input {x.name} is no convolution or linear")
        return False
    if len(x.users) != 1:
        notes.miss(node, RULE, f"{x.name} is read {len(x.users)} times ({', '.join(u.name for u in x.users)})")
        return False
    if x.target is aten.linear.default and x.meta["val"].dim() != 2 and rows is None:
        notes.miss(node, RULE, f"{x.name} has {x.meta['val'].dim()} dimensions, so its features are not the channels")
        return False
    if x.target is not aten.linear.default and x.meta["val"].dim() != x.args[1].meta["val"].dim():
        notes.miss(node, RULE, f"{x.name} has no batch, so its channels are not those of the norm")
        return False
    conv_bias = x.args[2] if len(x.args) > 2 else None
    nodes = [x.args[1], conv_bias, weight, bias, mean, variance]
    values = constants(edit, nodes)
    if values is None:
        notes.miss(node, RULE, "a weight of the convolution or of the norm is no constant")
        return False
    kernel, shift, g, h, m, v = values
    scale = torch.rsqrt(v + eps) if g is None else g * torch.rsqrt(v + eps)
    moved = (-m if shift is None else shift - m) * scale + (0 if h is None else h)
    kernel = kernel * scale.reshape(-1, *[1] * (kernel.dim() - 1))
    with edit.graph.inserting_before(node):
        fresh = with_weights(edit, x, x.args[0], kernel, moved, nodes)
        if rows is not None:
            fresh = edit.call(rows.target, (fresh, *rows.args[1:]), rows.kwargs, like=rows)
    for user in [node] if node.target is aten.batch_norm.default else list(node.users):
        edit.replace(user, fresh)
    notes.did(node, RULE, f"folded into {x.name}")
    return True


def _rows_of_linear(x: fx.Node) -> bool:
    """Whether a value is a linear's, its features still the last dimension, and read by nothing else on the way."""
    source: Any = x.args[0] if x.args else None
    if x.target not in FLATTENS or x.meta["val"].dim() != 2 or len(x.users) != 1 or len(source.users) != 1:
        return False
    sizes = [n.meta["val"].shape[-1] for n in (x, source)]
    return source.target is aten.linear.default and isinstance(sizes[0], int) and sizes[0] == sizes[1]


def fold_forward(edit: Edit, node: fx.Node, parts: tuple[Any, ...], notes: Notes) -> bool:
    """Folds a batch norm into the 1x1 convolution that alone reads it; returns whether it did."""
    x, weight, bias, mean, variance, eps = parts
    backward = x.target in CONVOLUTIONS and len(x.users) == 1
    found = node if node.target is aten.batch_norm.default else next((u for u in node.users if u.args[1] == 0), node)
    conv = next(iter(found.users), node)
    if backward or len(found.users) != 1 or conv.target not in POINTWISE or conv.args[0] is not found:
        return False
    given: Any = (*conv.args, *(None, [1, 1], [0, 0], [1, 1], 1)[len(conv.args) - 2 :])
    _, kernel_node, conv_bias, _, padding, _, groups = given
    nodes = [kernel_node, conv_bias, weight, bias, mean, variance]
    values = constants(edit, nodes)
    bordered = padding != "valid" if isinstance(padding, str) else any(padding)
    unbatched = conv.meta["val"].dim() != 4
    if values is None or unbatched or list(kernel_node.meta["val"].shape[2:]) != [1, 1] or bordered or groups != 1:
        return False
    kernel, shift, g, h, m, v = values
    scale = torch.rsqrt(v + eps) if g is None else g * torch.rsqrt(v + eps)
    moved = kernel.flatten(1) @ ((0 if h is None else h) - m * scale) + (0 if shift is None else shift)
    with edit.graph.inserting_before(conv):
        fresh = with_weights(edit, conv, x, kernel * scale[:, None, None], moved, nodes)
    edit.replace(conv, fresh)
    notes.did(node, RULE, f"folded into {conv.name}")
    return True


def constants(edit: Edit, nodes: list[fx.Node | None]) -> list[Any] | None:
    """Their tensors in float64, None for None; None where one is computed."""
    known = [None if n is None else edit.known(n) for n in nodes]
    if any(n is not None and k is None for n, k in zip(nodes, known, strict=True)):
        return None
    return [None if k is None else k[1].double() for k in known]


def with_weights(
    edit: Edit, conv: fx.Node, x: fx.Node, kernel: torch.Tensor, bias: torch.Tensor, made_from: list[fx.Node | None]
) -> fx.Node:
    """The convolution on x with another kernel and bias, made from the weights of the nodes `made_from`."""
    known = [found for n in made_from if n is not None and (found := edit.known(n)) is not None]
    sources = tuple(dict.fromkeys(name for _, _, names in known for name in names))
    name, value, _ = known[0]
    fresh = [
        edit.constant(f"{name.removeprefix('made_')}.{what}", new.to(value.dtype), made_from=sources)
        for what, new in (("folded", kernel), ("shift", bias))
    ]
    return edit.call(conv.target, (x, *fresh, *conv.args[3:]), conv.kwargs, like=conv)


@dataclass(frozen=True)
class FoldBatchNorm:
    """Folds batch norms in inference into what stands before them, or into the 1x1 convolution behind them."""

    name: ClassVar[str] = RULE
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        if program.mode == "train":
            return program
        edit = program.edit()
        changed = [fold_one(edit, n, notes) for n in list(edit.graph.nodes) if n.op == "call_function"]
        return edit.finish(self.name) if any(changed) else program
