"""Puts a border of zeros into the convolution that reads it, where both ends are alike.

    y = conv2d(pad(x, [1, 1, 2, 2]), w, b)      ->    y = conv2d(x, w, b, padding=[2, 1])

The padded map is not written. A border that differs from end to end (TensorFlow's "same" at a stride of two) stays; a
depthwise convolution takes it in fuse-depthwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
RULE = "fold-padding"
RANKS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
PADS = (aten.constant_pad_nd.default, aten.pad.default)


def border(node: fx.Node, rank: int) -> list[int] | str | None:
    """Zeros at both ends of each spatial axis; a sentence where they differ, None where the node is no such border."""
    mode, value = "constant", 0.0
    if node.target is aten.pad.default:
        mode, value = (*node.args[2:], *("constant", None)[len(node.args) - 2 :])[:2]  # type: ignore[assignment]
    elif len(node.args) > 2:
        value = node.args[2]  # type: ignore[assignment]
    ends: Any = node.args[1]
    if mode != "constant" or value not in (None, 0) or not all(isinstance(e, int) and e >= 0 for e in ends):
        return None
    if any(ends[2 * rank :]):
        return "it is padded along channels or batch"
    ends = [*ends, *[0] * (2 * rank - len(ends))][: 2 * rank]
    if ends[::2] != ends[1::2]:
        return f"its ends differ: {ends}"
    return ends[::2][::-1]


@dataclass(frozen=True)
class FoldPadding:
    """Borders of zeros go into the convolutions that read them."""

    name: ClassVar[str] = RULE
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        if program.mode != "inference":
            return program
        edit, changed = program.edit(), False
        for node in list(edit.graph.nodes):
            rank, pad = RANKS.get(node.target), node.args[0] if node.args else None
            if rank is None or not isinstance(pad, fx.Node) or pad.target not in PADS:
                continue
            found = border(pad, rank)
            if not isinstance(found, list):
                if found is not None:
                    notes.miss(node, RULE, found)
                continue
            given: Any = (*node.args, *(None, [1] * rank, [0] * rank)[len(node.args) - 2 :])
            _, weight, bias, stride, padding, *rest = given
            total = [a + b for a, b in zip(padding if len(padding) == rank else padding * rank, found, strict=True)]
            with edit.graph.inserting_before(node):
                new = edit.call(node.target, (pad.args[0], weight, bias, stride, total, *rest), node.kwargs, like=node)
            edit.replace(node, new)
            notes.did(node, RULE, f"border of {found}")
            changed = True
        return edit.finish(self.name) if changed else program
