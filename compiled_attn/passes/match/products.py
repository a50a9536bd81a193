"""Products of two tensors, in whichever op they are written, as labels: matmul, bmm, mm, baddbmm, einsum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compiled_attn.passes.match.axes import Axis, Dim, Layout, is_one, shape, whole
from compiled_attn.passes.match.values import argument, is_tensor

aten = torch.ops.aten

PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.einsum.default}

Labels = tuple[str | None, ...]  # one a dimension; None where a dimension of size 1 is broadcast


@dataclass(frozen=True)
class Product:
    """out[labels] = alpha * sum over the labels that `out` lacks of left[labels] * right[labels] (+ beta * addend)."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: Labels
    right_labels: Labels
    out_labels: Labels
    alpha: float = 1.0
    addend: fx.Node | None = None
    beta: float = 0.0

    @property
    def contracted(self) -> list[str]:
        return [label for label in self.left_labels if label and label not in self.out_labels]


def product(node: fx.Node) -> Product | None:
    """The product that a node computes; None where it is none, or one with a diagonal or a lone sum in it."""
    if node.op != "call_function":
        return None
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return _matmul(node, node.args[0], node.args[1])
    if node.target is aten.baddbmm.default:
        alpha, beta = argument(node, 4, "alpha", 1), argument(node, 3, "beta", 1)
        found = _matmul(node, node.args[1], node.args[2])
        if found is None or not all(isinstance(x, (int, float)) for x in (alpha, beta)):
            return None
        addend = node.args[0] if beta != 0 and isinstance(node.args[0], fx.Node) else None
        labels = (found.left_labels, found.right_labels, found.out_labels)
        return Product(node, found.left, found.right, *labels, float(alpha), addend, float(beta))
    if node.target is aten.einsum.default:
        return _einsum(node)
    return None


def read_by(user: fx.Node, node: fx.Node) -> Product | None:
    """The product in `user` that has `node` as exactly one of its factors."""
    found = product(user)
    if found is None or (found.left is node) == (found.right is node):
        return None
    return found


def place_left_right(found: Product, out: Layout) -> tuple[Layout, Layout]:
    """Layouts of both factors, given that of the result; what is summed over gets new axes."""
    dims = _by_label(found.out_labels, out)
    for label, size in zip(found.left_labels, shape(found.left), strict=True):
        if label and label not in dims:
            dims[label] = () if is_one(size) else (Axis(size),)
    return _layout(found.left_labels, dims), _layout(found.right_labels, dims)


def place_other_out(found: Product, factor: fx.Node, layout: Layout) -> tuple[fx.Node, Layout, Layout]:
    """The other factor, its layout, and the result's, given one factor's; axes that only the other has are new."""
    is_left = found.left is factor
    own, other = (found.left_labels, found.right_labels)[:: 1 if is_left else -1]
    node = found.right if is_left else found.left
    dims = _by_label(own, layout)
    for label, size in zip(other, shape(node), strict=True):
        if label and label not in dims:
            dims[label] = () if is_one(size) else (Axis(size),)
    return node, _layout(other, dims), _layout(found.out_labels, dims)


def contraction(found: Product, factor: fx.Node, layout: Layout) -> Dim:
    """The axes of a factor that the product sums over."""
    own = found.left_labels if found.left is factor else found.right_labels
    dims = _by_label(own, layout)
    return whole([axis for label in found.contracted for axis in dims[label]])


def _by_label(labels: Labels, layout: Layout) -> dict[str, Dim]:
    return {label: dim for label, dim in zip(labels, layout, strict=True) if label}


def _layout(labels: Labels, dims: dict[str, Dim]) -> Layout:
    return tuple(dims[label] if label else () for label in labels)


def _matmul(node: fx.Node, left: Any, right: Any) -> Product | None:
    if not is_tensor(left) or not is_tensor(right):
        return None
    a, b = shape(left), shape(right)
    if len(a) < 2 or len(b) < 2:
        return None
    batch = max(len(a), len(b)) - 2
    out = tuple(f"b{i}" for i in range(batch))
    left_labels = (*_batch_labels(a[:-2], b[:-2], batch), "n", "d")
    right_labels = (*_batch_labels(b[:-2], a[:-2], batch), "d", "m")
    return Product(node, left, right, left_labels, right_labels, (*out, "n", "m"))


def _batch_labels(own: tuple[Any, ...], other: tuple[Any, ...], rank: int) -> tuple[str | None, ...]:
    padded = (1,) * (rank - len(other)) + other
    labels: list[str | None] = []
    for i, size in enumerate(own, start=rank - len(own)):
        labels.append(None if is_one(size) and not is_one(padded[i]) else f"b{i}")
    return tuple(labels)


def _einsum(node: fx.Node) -> Product | None:
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    left, right = operands
    if not is_tensor(left) or not is_tensor(right):
        return None
    terms, _, out = equation.replace(" ", "").partition("->")
    if "->" not in equation or terms.count(",") != 1:
        return None
    a, b = terms.split(",")
    count = max(len(shape(left)) - len(a.replace("...", "")), len(shape(right)) - len(b.replace("...", "")))
    left_names, right_names = _letters(a, len(shape(left))), _letters(b, len(shape(right)))
    names = _letters(out, len(out.replace("...", "")) + (count if "..." in out else 0))
    for own, other in ((left_names, right_names), (right_names, left_names)):
        if len(set(own)) != len(own) or any(n not in other and n not in names for n in own):
            return None
    if any(n not in left_names and n not in right_names for n in names):
        return None
    sizes_a = dict(zip(left_names, shape(left), strict=True))
    sizes_b = dict(zip(right_names, shape(right), strict=True))
    if any(n not in names and (_is_spread(n, sizes_a, sizes_b) or _is_spread(n, sizes_b, sizes_a)) for n in sizes_a):
        return None
    left_labels = tuple(None if _is_spread(n, sizes_a, sizes_b) else n for n in left_names)
    right_labels = tuple(None if _is_spread(n, sizes_b, sizes_a) else n for n in right_names)
    return Product(node, left, right, left_labels, right_labels, tuple(names))


def _letters(term: str, rank: int) -> list[str]:
    """One name a dimension; the dimensions of an ellipsis are numbered from the right."""
    head, dots, tail = term.partition("...")
    if not dots:
        return list(term)
    count = rank - len(head) - len(tail)
    return [*head, *(f".{i}" for i in reversed(range(count))), *tail]


def _is_spread(name: str, own: dict[str, Any], other: dict[str, Any]) -> bool:
    return name in other and is_one(own[name]) and not is_one(other[name])
