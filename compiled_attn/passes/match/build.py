"""Builds tensors of a wanted layout out of others, as views where strides allow it, with sizes that stay symbolic."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.program import Edit
from compiled_attn.passes.match.axes import COPIES, Axis, Dim, Layout, above, flat, is_layout_op, settled, whole
from compiled_attn.passes.match.values import DIVIDE, MULTIPLY, dtype, is_tensor, scalar, writes_in_place

aten = torch.ops.aten


@dataclass(frozen=True)
class Source:
    """A tensor from which a factor can be made: the factor is its values times `scale`, rearranged. copies: nodes above
    it, up to where the rearranging began, that copy or multiply."""

    node: fx.Node
    layout: Layout
    scale: float
    passed: int


class UnknownSizeError(Exception):
    """A symbolic size that no node of the graph holds."""


@dataclass
class Builder:
    """Makes nodes before the insertion point of an edit, with the provenance of `like`."""

    edit: Edit
    like: fx.Node
    sizes: dict[str, fx.Node] = field(default_factory=dict)

    def know(self, node: fx.Node) -> None:
        """Remembers where symbolic sizes can be read: from every dimension of this tensor."""
        for place, size in enumerate(node.meta["val"].shape):
            if _torch.is_symbolic(size):
                self.sizes.setdefault(str(_torch.expression(size)), _Lazy(node, place))  # type: ignore[arg-type]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.edit.call(target, args, kwargs, like=self.like)

    def size(self, axes: Sequence[Axis]) -> Any:
        """The size of merged axes: an int, or a node that holds it."""
        total = math.prod(axis.size for axis in axes)
        if not _torch.is_symbolic(total):
            return int(total)
        key = str(_torch.expression(total))
        found = self.sizes.get(key)
        if isinstance(found, _Lazy):
            found = self.sizes[key] = self.call(aten.sym_size.int, found.node, found.place)
        if found is not None:
            return found
        if len(axes) < 2:
            raise UnknownSizeError(key)
        product = self.size(axes[:1])
        for axis in axes[1:]:
            product = self.call(operator.mul, product, self.size([axis]))
        self.sizes[key] = product
        return product

    def arrange(self, node: fx.Node, layout: Layout, dims: Sequence[Dim], *, spread: bool = True) -> fx.Node:
        """`node` with its axes in the dimensions `dims`; axes that it lacks are expanded, or of size 1 if not `spread`.

        With `spread` off, a dimension some of whose axes are missing is still expanded, since it can not be merged.
        """
        layout, dims = settled(layout), [whole(dim) for dim in dims]
        have = flat(layout)
        if not spread:
            dims = [dim if any(axis in have for axis in dim) else () for dim in dims]
        if list(layout) == list(dims):
            return node
        if _is_permutation(layout, dims):
            return self.call(aten.permute.default, node, _permutation(layout, dims))
        wanted = [axis for dim in dims for axis in dim]
        order = [have.index(axis) for axis in wanted if axis in have]
        if order != list(range(len(order))):
            if any(len(dim) != 1 for dim in layout):
                node = self.call(aten.view.default, node, [self.size([axis]) for axis in have])
            node = self.call(aten.permute.default, node, order)
            layout = tuple((axis,) for axis in wanted if axis in have)
        if len(order) == len(wanted) and all(len(dim) <= 1 for dim in dims):
            return self._view(node, layout, dims)
        apart = [(axis,) if axis in have else () for axis in wanted]
        node = self._view(node, layout, apart)
        if len(order) < len(wanted):
            node = self.call(aten.expand.default, node, [self.size([axis]) for axis in wanted])
        return node if all(len(dim) == 1 for dim in dims) else self._merge(node, dims)

    def _view(self, node: fx.Node, layout: Layout, dims: Sequence[Dim]) -> fx.Node:
        """The same axes in the same order, one or none a dimension: always a view."""
        if list(layout) == list(dims):
            return node
        return self.call(aten.view.default, node, [self.size(dim) if dim else 1 for dim in dims])

    def _merge(self, node: fx.Node, dims: Sequence[Dim]) -> fx.Node:
        sizes = [self.size(dim) if dim else 1 for dim in dims]
        if not merges(node, dims):
            node = self.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.call(aten.view.default, node, sizes)


@dataclass(frozen=True)
class _Lazy:
    node: fx.Node
    place: int


def merges(node: fx.Node, dims: Sequence[Dim]) -> bool:
    """Whether a tensor with one dimension an axis can be viewed with the dimensions `dims`, by its strides."""
    value = node.meta["val"]
    place = 0
    for dim in dims:
        for i in range(place, place + len(dim) - 1):
            if not _torch.statically_true(value.stride(i) == value.stride(i + 1) * value.shape[i + 1]):
                return False
        place += len(dim)
    return True


def cost(source: Source, dims: Sequence[Dim]) -> tuple[bool, int, int]:
    """What `arrange` would need: whether a copy, how much was passed over above, how many view nodes."""
    layout, dims = settled(source.layout), [whole(dim) for dim in dims]
    if list(layout) == list(dims):
        return False, source.passed, 0
    if _is_permutation(layout, dims):
        return False, source.passed, 1
    have = flat(layout)
    wanted = [axis for dim in dims for axis in dim]
    missing = any(axis not in have for axis in wanted)
    splits = any(len(dim) != 1 for dim in layout)
    merged = any(len(dim) > 1 for dim in dims)
    copies = merged and (missing or not _mergeable(source.node, layout, dims))
    return copies, source.passed, 2 + splits + missing + merged


def _mergeable(node: fx.Node, layout: Layout, dims: Sequence[Dim]) -> bool:
    """As `merges`, for the axes of a tensor as they lie in memory."""
    value, strides = node.meta["val"], {}
    for place, dim in enumerate(layout):
        step = value.stride(place)
        for axis in reversed(dim):
            strides[axis] = step
            step = step * axis.size
    return all(
        _torch.statically_true(strides[a] == strides[b] * b.size) for dim in dims for a, b in itertools.pairwise(dim)
    )


def _is_permutation(layout: Layout, dims: Sequence[Dim]) -> bool:
    return len(layout) == len(dims) and sorted(map(_key, layout)) == sorted(map(_key, dims))


def _permutation(layout: Layout, dims: Sequence[Dim]) -> list[int]:
    left = list(range(len(layout)))
    order = []
    for dim in dims:
        place = next(i for i in left if _key(layout[i]) == _key(dim))
        left.remove(place)
        order.append(place)
    return order


def _key(dim: Dim) -> tuple[int, ...]:
    return tuple(id(axis) for axis in dim)


def sources(edit: Edit, node: fx.Node, layout: Layout, *, multiplied: bool) -> list[Source]:
    """The tensors that a factor is a rearrangement of, nearest first, through views, copies and, if `multiplied`,
    products with a constant (their factors are collected)."""
    found = [Source(node, layout, 1.0, 0)]
    scale = 1.0
    while node.op == "call_function" and not any(writes_in_place(user) for user in node.users):
        if is_layout_op(node):
            source = node.args[0]
            up = above(node, layout)
            if up is None or not isinstance(source, fx.Node):
                break
            layout = up
        elif multiplied and node.target in MULTIPLY | DIVIDE:
            step = _constant_factor(edit, node)
            if step is None:
                break
            source, number = step
            scale *= number
            found = [Source(s.node, s.layout, s.scale, s.passed + 1) for s in found]
        else:
            break
        if node.target in COPIES:
            found = [Source(s.node, s.layout, s.scale, s.passed + 1) for s in found]
        node = source
        found.append(Source(node, layout, scale, 0))
    return found


def _constant_factor(edit: Edit, node: fx.Node) -> tuple[fx.Node, float] | None:
    a, b = node.args[0], node.args[1]
    if node.target in DIVIDE:
        number = scalar(edit.program, b)
        return (a, 1 / number) if number and isinstance(a, fx.Node) else None
    for path, other in ((a, b), (b, a)):
        number = scalar(edit.program, other)
        if number is None or not is_tensor(path) or dtype(path) != dtype(node):
            continue
        if path.meta["val"].dim() == node.meta["val"].dim():
            return path, number
    return None
