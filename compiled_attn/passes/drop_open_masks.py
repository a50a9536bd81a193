"""Takes away boolean attention masks that hide nothing, as transformers builds them from sizes alone.

    m = expand(ge(unsqueeze(arange(n)), 0), [b, -1, n, n])
    y = scaled_dot_product_attention(q, k, v, m)                ->    scaled_dot_product_attention(q, k, v)

What a mask says is read from its values where it is a constant made from no weight or buffer, and else from how it is
computed, for all sizes. Never touches a mask that depends on an input or on a tensor that the model owns.
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
SDPA = aten.scaled_dot_product_attention.default
SAME_VALUES = {
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
}


def hides_nothing(node: Any, program: Program) -> bool:
    """Whether a boolean value is True everywhere, whatever the input and its sizes."""
    if not isinstance(node, fx.Node) or _dtype(node) is not torch.bool:
        return False
    if node.op == "placeholder":
        value = program.tensor_of(node)
        name = next((s.target for s in program.signature.input_specs if s.arg.name == node.name), None)
        made_here = name in program.constants and not program.origin.get(name or "", (name,))
        return made_here and value is not None and bool(value.all())
    args: tuple[Any, ...] = node.args
    if node.target in SAME_VALUES:
        return hides_nothing(args[0], program)
    if node.target in (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor):
        return all(hides_nothing(a, program) for a in args)
    if node.target in (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor):
        return any(hides_nothing(a, program) for a in args)
    if node.target is aten.full.default:
        return args[1] is True
    if node.target in (aten.ge.Scalar, aten.gt.Scalar) and isinstance(args[1], (int, float)):
        lowest = lower_bound(args[0])
        return lowest is not None and (lowest >= args[1] if node.target is aten.ge.Scalar else lowest > args[1])
    return False


def lower_bound(node: Any) -> int | None:
    """A number that no element of a value made of positions lies below, or None where that is not known."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    args: tuple[Any, ...] = node.args
    if node.target is aten.arange.default:
        return 0
    if node.target in (aten.arange.start, aten.arange.start_step):
        rises = len(args) < 3 or (isinstance(args[2], int) and args[2] > 0)
        return args[0] if isinstance(args[0], int) and rises else None
    if node.target in SAME_VALUES:
        return lower_bound(args[0])
    if node.target is aten.add.Tensor and isinstance(args[1], int) and not node.kwargs:
        below = lower_bound(args[0])
        return None if below is None else below + args[1]
    return None


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


@dataclass(frozen=True)
class DropOpenMasks:
    """Removes masks of scaled_dot_product_attention that are True everywhere."""

    name: ClassVar[str] = "drop-open-masks"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        edit = program.edit()
        fired = False
        for old in program.graph.nodes:
            if old.target is not SDPA:
                continue
            mask = old.kwargs.get("attn_mask", old.args[3] if len(old.args) > 3 else None)
            if not hides_nothing(mask, program):
                continue
            node = edit.node_of[old]
            node.args = (*node.args[:3], None, *node.args[4:])
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
            notes.did(old, self.name, "a mask that is True everywhere is not read")
            fired = True
        return edit.finish(self.name) if fired else program
