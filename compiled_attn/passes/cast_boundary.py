"""Lets a program that computes in a narrow dtype be called with, and answer in, a wide one.

    input x: bf16; return y: bf16     ->     input x: f32; x' = _to_copy(x, bf16); ...; return _to_copy(y, f32)

Never touches what happens between the boundary: the program must have been captured in the narrow dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target


def _copy(edit: Edit, node: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    return edit.call(torch.ops.aten._to_copy.default, (node,), {"dtype": dtype}, like=like)


@dataclass(frozen=True)
class CastBoundary:
    """Casts floating inputs from `outer` to `inner`, and floating outputs back. Low precision is approximate."""

    inner: str = "bfloat16"
    outer: str = "float32"
    name: ClassVar[str] = "cast-boundary"
    exact: ClassVar[bool] = False

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        inner, outer = getattr(torch, self.inner), getattr(torch, self.outer)
        if inner == outer:
            return program
        edit = program.edit()
        inputs = [edit.node_of[n] for n in program.inputs]
        first = next(n for n in edit.graph.nodes if n.op != "placeholder")
        for node in inputs:
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor) or value.dtype != inner:
                continue
            with program.fake_mode:
                node.meta["val"] = value.to(outer)
            with edit.graph.inserting_before(first):
                cast = _copy(edit, node, inner, like=next(iter(node.users), node))
            edit.replace(node, cast)
        output = next(n for n in edit.graph.nodes if n.op == "output")
        values = list(output.args[0])
        for i, (node, spec) in enumerate(zip(values, program.signature.output_specs, strict=True)):
            value = node.meta.get("val") if isinstance(node, fx.Node) else None
            user_output = spec.kind.name == "USER_OUTPUT"
            if user_output and isinstance(value, torch.Tensor) and value.dtype == inner:
                with edit.graph.inserting_before(output):
                    values[i] = _copy(edit, node, outer, like=node)
        output.args = (tuple(values),)
        notes.did("inputs and outputs", self.name, f"{self.outer} outside, {self.inner} inside")

        def widen(x: Any) -> Any:
            return x.to(outer) if isinstance(x, torch.Tensor) and x.dtype == inner else x

        return replace(edit.finish(self.name), example_inputs=pytree.tree_map(widen, program.example_inputs))
