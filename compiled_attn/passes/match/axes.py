"""Axes of tensors by identity: which dimension of one tensor is which dimension of another, through views and permutes.

A layout lists, for each dimension of a tensor, the axes it runs over, slowest first. A dimension of size 1 runs over
none; a flattened dimension runs over several. A view that splits an axis refines it in place, so that every layout
that holds the axis sees its parts. Sizes may be symbolic: they are compared for all allowed values, never by hint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compiled_attn.ir import _torch

aten = torch.ops.aten

SAME = {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten._conj.default,
}
REGROUP = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.view_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
SWAP = {aten.transpose.int, aten.swapaxes.default, aten.swapdims.default}
SPREAD = {aten.expand.default, aten.expand_as.default, aten.broadcast_to.default}
COPIES = {aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.reshape.default}


@dataclass(eq=False)
class Axis:
    """One axis that values run over; `parts`, slowest first, once a view has split it."""

    size: Any
    parts: tuple[Axis, ...] = ()


Dim = tuple[Axis, ...]
Layout = tuple[Dim, ...]


def whole(dim: Sequence[Axis]) -> Dim:
    """The axes of a dimension with every split axis replaced by its parts."""
    found: list[Axis] = []
    for axis in dim:
        found += whole(axis.parts) if axis.parts else (axis,)
    return tuple(found)


def settled(layout: Layout) -> Layout:
    return tuple(whole(dim) for dim in layout)


def flat(layout: Layout) -> Dim:
    return whole([axis for dim in layout for axis in dim])


def fresh(shape: Sequence[Any]) -> Layout:
    """A layout of new axes, one for each dimension that is not known to be 1."""
    return tuple(() if is_one(size) else (Axis(size),) for size in shape)


def is_one(size: Any) -> bool:
    return _torch.statically_true(size == 1)


def size_of(axes: Sequence[Axis]) -> Any:
    return math.prod(axis.size for axis in axes)


def shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def regroup(axes: Dim, sizes: Sequence[Any]) -> Layout | None:
    """`axes`, in row-major order, as dimensions of the given sizes; None where a dimension would cut across axes."""
    axes = whole(axes)
    places = [i for i, size in enumerate(sizes) if not is_one(size)]
    dims: list[Dim] = [() for _ in sizes]
    i = j = 0
    while i < len(axes) or j < len(places):
        cut = _first_cut([a.size for a in axes[i:]], [sizes[p] for p in places[j:]])
        if cut is None:
            return None
        taken, made = cut
        if made == 1:
            dims[places[j]] = axes[i : i + taken]
        elif taken == 1:
            parts = tuple(Axis(sizes[p]) for p in places[j : j + made])
            axes[i].parts = parts
            for place, part in zip(places[j : j + made], parts, strict=True):
                dims[place] = (part,)
        else:
            found = _interleave(axes[i : i + taken], [sizes[p] for p in places[j : j + made]])
            if found is None:
                return None
            for place, dim in zip(places[j : j + made], found, strict=True):
                dims[place] = dim
        i, j = i + taken, j + made
    return tuple(dims)


def _first_cut(left: list[Any], right: list[Any]) -> tuple[int, int] | None:
    """Fewest leading sizes of both sides whose products are equal."""
    for total in range(2, len(left) + len(right) + 1):
        for taken in range(1, total):
            made = total - taken
            fits = taken <= len(left) and made <= len(right)
            if fits and _torch.statically_true(math.prod(left[:taken]) == math.prod(right[:made])):
                return taken, made
    return None


def _interleave(axes: Dim, sizes: Sequence[Any]) -> list[Dim] | None:
    """Dimensions that neither split one axis nor merge several: (6, 4) as (2, 12) splits 6 and merges 3 with 4."""
    left, dims = list(axes), []
    for size in sizes:
        dim: list[Axis] = []
        while not is_one(size):
            if not left:
                return None
            axis = left.pop(0)
            rest = _quotient(axis.size, size)
            if rest is not None and not is_one(rest):
                axis.parts = (Axis(size), Axis(rest))
                axis, behind = axis.parts
                left.insert(0, behind)
            size = 1 if rest is not None else _quotient(size, axis.size)
            if size is None:
                return None
            dim.append(axis)
        dims.append(tuple(dim))
    return None if left else dims


def _quotient(size: Any, divisor: Any) -> Any:
    """size / divisor where that is known to be whole, else None."""
    found = size // divisor
    return found if _torch.statically_true(found * divisor == size) else None


def is_layout_op(node: fx.Node) -> bool:
    """Whether a node only renames, reorders, splits, merges or repeats the dimensions of its first argument."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if not isinstance(node.meta.get("val"), torch.Tensor) or not isinstance(node.args[0].meta.get("val"), torch.Tensor):
        return False
    if node.target in SAME or node.target in REGROUP or node.target in SPREAD or _order(node) is not None:
        return True
    return _keeps_all(node)


def above(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of a layout op's input, given that of its output."""
    source = shape(_input(node))
    if node.target in SAME:
        return layout
    order = _order(node)
    if order is not None:
        dims: list[Dim] = [()] * len(order)
        for place, dim in zip(order, layout, strict=True):
            dims[place] = dim
        return tuple(dims)
    if node.target in SPREAD:
        kept = layout[len(layout) - len(source) :]
        return tuple(() if is_one(size) else dim for size, dim in zip(source, kept, strict=True))
    return regroup(flat(layout), source)


def below(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of a layout op's output, given that of its input."""
    if node.target in SAME:
        return layout
    order = _order(node)
    if order is not None:
        return tuple(layout[place] for place in order)
    result = shape(node)
    if node.target in SPREAD:
        padded = ((),) * (len(result) - len(layout)) + layout
        return tuple(dim or (() if is_one(size) else (Axis(size),)) for size, dim in zip(result, padded, strict=True))
    return regroup(flat(layout), result)


def broadcast(layout: Layout, sizes: Sequence[Any]) -> Layout:
    """The layout of an operand of the given sizes that was broadcast, from the right, to a result of `layout`."""
    kept = layout[len(layout) - len(sizes) :] if sizes else ()
    return tuple(() if is_one(size) else dim for size, dim in zip(sizes, kept, strict=True))


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        raise TypeError(f"{node.name} has no tensor as its first argument")
    return source


def _order(node: fx.Node) -> list[int] | None:
    """For a permutation: which dimension of the input each dimension of the output is."""
    value = _input(node).meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    rank = value.dim()
    order = list(range(rank))
    arguments: Any = node.args
    if node.target is aten.permute.default:
        return [d % rank for d in arguments[1]]
    if node.target in SWAP:
        a, b = (d % rank for d in arguments[1:3])
    elif node.target in (aten.t.default, aten.mT.default, aten.numpy_T.default) and rank == 2:
        a, b = 0, 1
    elif node.target is aten.mT.default:
        a, b = rank - 2, rank - 1
    else:
        return None
    order[a], order[b] = order[b], order[a]
    return order


def _keeps_all(node: fx.Node) -> bool:
    """A slice that takes all, or the selection of the one element of a dimension of size 1."""
    source: Any = shape(_input(node))
    arguments: Any = node.args
    if node.target is aten.slice.Tensor:
        same = all(_torch.statically_true(a == b) for a, b in zip(source, shape(node), strict=True))
        return same and (len(arguments) < 5 or (isinstance(arguments[4], int) and arguments[4] == 1))
    return node.target is aten.select.int and is_one(source[arguments[1]])
