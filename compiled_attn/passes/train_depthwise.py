"""In a program that trains, depthwise convolutions become the vocabulary's op, whose gradients are templates' too.

    y = conv2d(x, w, b, [1, 1], [3, 3], [1, 1], 96)    ->    t = clone(permute(squeeze(w, 1), [1, 2, 0]))
                                                             y = depthwise_block(x, t, b, padding=[3, 3])

w stays the user's own parameter. Of what surrounds the convolution only zeros around its map are taken into the op: its
gradient would make the sums again, and batch norm's statistics are the batch's. Never touches a convolution of several
results a channel, nor, on a CPU, one of few places on a large map, where oneDNN is as fast. Elsewhere a step was
measured to take a quarter of ATen's time and less, strided or not, 3x3 half of it to all of it
(bench/depthwise_gradients.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.ops.depthwise import depthwise_block
from compiled_attn.ops.templates import registry
from compiled_attn.passes.fuse_depthwise import slower
from compiled_attn.passes.match.depthwise import zeros_around
from compiled_attn.passes.strides import follow_strides, reads_strides

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
RULE = "depthwise_block"


@dataclass(frozen=True)
class TrainDepthwise:
    """Depthwise convolutions become depthwise_block where templates serve it and its gradients."""

    name: ClassVar[str] = "train-depthwise"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        if program.mode != "train":
            return program
        edit: Edit | None = None
        moved: set[fx.Node] = set()
        hindrance = reads_strides(program.graph)
        for node in program.graph.nodes:
            if node.target is not aten.conv2d.default or not is_depthwise(node):
                continue
            because = refuses(node, target)
            if hindrance is not None:
                because = f"{hindrance.name} reads the strides of the map, which would change"
            if because is not None:
                notes.miss(node, RULE, because)
                continue
            edit = edit or program.edit()
            moved.add(write(edit, edit.node_of[node]))
            notes.did(node, RULE, "x".join(str(int(n)) for n in node.args[1].meta["val"].shape[2:]) + ", trained")
        if edit is None:
            return program
        follow_strides(edit, moved)
        return edit.finish(self.name)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """x, weight, bias, stride, padding, dilation, groups."""
    return (*node.args, *(None, [1, 1], [0, 0], [1, 1], 1)[len(node.args) - 2 :])


def source_of(node: fx.Node) -> tuple[fx.Node, list[int]]:
    """The map that the convolution reads without the zeros around it, and the op's padding."""
    x, _, _, _, padding, *_ = arguments(node)
    found = zeros_around(x)
    rows, columns = _pair(padding)
    if found is None:
        return x, [rows, columns]
    source, (top, bottom, left, right) = found
    ends = [rows + top, rows + bottom, columns + left, columns + right]
    return source, ends[::2] if ends[::2] == ends[1::2] else ends


def is_depthwise(node: fx.Node) -> bool:
    x, weight, *_, groups = arguments(node)
    return groups != 1 and weight.meta["val"].shape[1] == 1 and x.meta["val"].dim() == 4


def refuses(node: fx.Node, target: Target) -> str | None:
    """Because of what the convolution stays as it is."""
    _, weight, _, stride, _, dilation, groups = arguments(node)
    x, padding = source_of(node)
    channels, _, rows, columns = (int(n) for n in weight.meta["val"].shape)
    if channels != groups:
        return f"it makes {channels // groups} results of every channel"
    value, result = x.meta["val"], node.meta["val"]
    behind = slower((rows, columns), dilation, [value, result]) if target.kind == "cpu" else None
    if behind is not None:
        return behind
    if not value.dtype == weight.meta["val"].dtype == result.dtype:
        return f"its weight is {weight.meta['val'].dtype} and its input {value.dtype}"
    pairs: dict[str, Any] = {"stride": _pair(stride), "padding": padding, "dilation": _pair(dilation)}
    kernel = value.new_empty((rows, columns, channels))
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        (RULE, (value, kernel), {}),
        ("depthwise_input_gradient", (result, kernel), {"size": list(value.shape[2:]), **pairs}),
        ("depthwise_weight_gradient", (value, result), {"kernel": [rows, columns], **pairs}),
    ]
    for op, args, kwargs in calls:
        template, misses = registry.choose(op, args, kwargs, target)
        if template is None:
            return "; ".join(because for _, because in misses)
    return None


def write(edit: Edit, node: fx.Node) -> fx.Node:
    """Puts the op in the convolution's place and returns it."""
    _, weight, bias, stride, _, dilation, _ = arguments(node)
    x, padding = source_of(node)
    with edit.graph.inserting_before(node):
        kernel = edit.call(aten.squeeze.dim, (weight, 1), like=node)
        kernel = edit.call(aten.permute.default, (kernel, [1, 2, 0]), like=node)
        kernel = edit.call(aten.clone.default, (kernel,), {"memory_format": torch.contiguous_format}, like=node)
        options = {"stride": _pair(stride), "padding": padding, "dilation": _pair(dilation)}
        new = edit.call(depthwise_block.overload, (x, kernel, bias), options, like=node)
    edit.replace(node, new)
    return new


def _pair(numbers: Any) -> list[int]:
    return [int(numbers[0]), int(numbers[-1])]
