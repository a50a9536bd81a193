"""Attention with more or fewer leading axes than batch and heads becomes attention with these two.

    y = sdpa(q [B, H, W, N, D], k, v, m [W, N, M])            y = reshape(z, [B, H, W, N, D])
                                                      ->      z = sdpa(reshape(q, [B H, W, N, D]), ..., m)

Windows or rows of a map stand as an axis of their own in models such as Hiera; what recognises patterns and what
computes attention takes two. Axes that a mask tells apart stay together. Never flattens where q, k and v broadcast over
leading axes, nor where two of them have symbolic sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.ops.rules import differ
from compiled_attn.passes.strides import follow_strides

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
MASK = 3  # its place among the arguments


def split_of(sizes: Sequence[Any], mask: Sequence[Any]) -> int | str:
    """After how many of the leading axes of `sizes` the second group begins; a sentence where there is no such place.

    mask: its sizes over the same axes; axes that are joined are all 1 in it, or all as long as the scores'.
    """
    if sum(not isinstance(n, int) for n in sizes) > 1:
        return f"its leading axes {list(sizes)} hold more than one symbol"
    for split in range(1, len(sizes)):
        groups = (range(split), range(split, len(sizes)))
        if all(_alike([mask[i] for i in group], [sizes[i] for i in group]) for group in groups):
            return split
    return f"its mask tells apart axes {list(mask)} that can not be joined"


def _alike(mask: Sequence[Any], sizes: Sequence[Any]) -> bool:
    return all(isinstance(n, int) and n == 1 for n in mask) or not any(map(differ, mask, sizes))


def match(node: fx.Node) -> int | str | None:
    """Where to split the leading axes; a sentence where they stay, None where there are two already."""
    shapes = [list(x.meta["val"].shape) for x in node.args[:3]]  # type: ignore[union-attr]
    rank = len(shapes[0])
    if rank == 4 and all(len(s) == 4 for s in shapes):
        return None
    if any(len(s) != rank for s in shapes) or any(any(map(differ, shapes[0][:-2], s[:-2])) for s in shapes[1:]):
        return "its q, k and v broadcast over leading axes"
    mask: Any = node.kwargs.get("attn_mask", node.args[MASK] if len(node.args) > MASK else None)
    lead = [] if mask is None else list(mask.meta["val"].shape[:-2])
    if mask is not None and not 2 <= mask.meta["val"].dim() <= rank:
        return f"its mask has {mask.meta['val'].dim()} dimensions, its scores {rank}"
    return 1 if rank < 4 else split_of(shapes[0][:-2], [1] * (rank - 2 - len(lead)) + lead)


def joined(sizes: Sequence[Any], split: int) -> list[Any]:
    """Sizes of the two groups; -1 for the one that holds a symbol."""
    groups = []
    for group in (sizes[:split], sizes[split:]):
        total: Any = 1
        for n in group:
            total = total * n if isinstance(n, int) and total != -1 else -1
        groups.append(total)
    return groups


def write(edit: Edit, node: fx.Node, split: int) -> fx.Node:
    """Puts the attention over two groups of axes in the node's place; returns what has the old shape again."""
    args: list[Any] = list(node.args)
    shape = node.meta["val"].shape
    with edit.graph.inserting_before(node):

        def flat(x: fx.Node) -> fx.Node:
            *lead, n, width = x.meta["val"].shape
            lead = [1] * (len(shape) - 2 - len(lead)) + lead
            return edit.call(aten.reshape.default, (x, [*joined(lead, split), n, width]), like=node)

        kwargs = dict(node.kwargs)
        for i in range(3):
            args[i] = flat(args[i])
        if kwargs.get("attn_mask") is not None:
            kwargs["attn_mask"] = flat(kwargs["attn_mask"])  # type: ignore[arg-type]
        elif len(args) > MASK and args[MASK] is not None:
            args[MASK] = flat(args[MASK])
        out = edit.call(SDPA, tuple(args), kwargs, like=node)
        back = [n if isinstance(n, int) else -1 for n in shape]
        whole = edit.call(aten.reshape.default, (out, back), like=node)
    edit.replace(node, whole)
    return whole


@dataclass(frozen=True)
class FlattenAttention:
    """Attention over any number of leading axes as attention over two."""

    name: ClassVar[str] = "flatten-attention"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        if program.mode != "inference":
            return program
        edit, fresh = program.edit(), set()
        for node in program.graph.nodes:
            split = match(node) if node.target is SDPA else None
            if isinstance(split, str):
                notes.miss(node, self.name, split)
            if not isinstance(split, int):
                continue
            fresh.add(write(edit, edit.node_of[node], split))
            notes.did(node, self.name, f"{node.meta['val'].dim() - 2} leading axes as two")
        if not fresh:
            return program
        follow_strides(edit, fresh)
        return edit.finish(self.name)
