"""Where each element of a value comes from: ops that only move elements, run on a tensor of element numbers.

Rolls, partitions into windows, heads and their inverses can be written in many ways; what they do to numbers tells
them apart from everything else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from compiled_attn.ir import _torch

aten = torch.ops.aten
MOVES = {
    operator.getitem,
    aten.alias.default,
    aten.chunk.default,
    aten.clone.default,
    aten.expand.default,
    aten.permute.default,
    aten.reshape.default,
    aten.roll.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.transpose.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
}
VIEWS = {aten.view.default, aten._unsafe_view.default}
BATCH = 2  # pictures that element numbers are followed for, where the batch is symbolic


def moves(node: fx.Node) -> bool:
    """Whether a node only moves elements of its first argument (padding by nothing is no padding)."""
    if node.op != "call_function":
        return False
    return node.target in MOVES or (node.target is aten.pad.default and not any(node.args[1]))  # type: ignore[arg-type]


def upstream(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Nodes from the nearest that is wanted, exclusive, to `node`, in order; all of them move elements only.

    The first element's first argument is the wanted node; empty where there is none.
    """
    chain = [node]
    while moves(chain[-1]):
        source = chain[-1].args[0]
        if not isinstance(source, fx.Node):
            return []
        if wanted(source):
            return chain[::-1]
        chain.append(source)
    return []


class Numbering:
    """Runs chains of moving ops on element numbers, with `BATCH` for the batch where that is a symbol."""

    def __init__(self, batch: Any) -> None:
        expression = _torch.expression(batch)
        self.symbol = None if isinstance(expression, int) or expression.is_number else expression
        self.batch = BATCH if self.symbol is not None else int(batch)

    @property
    def simple(self) -> bool:
        """Whether the batch is a number or one symbol by itself."""
        return self.symbol is None or self.symbol.is_Symbol

    def size(self, value: Any) -> int | None:
        """A size as a number; None where another symbol is in it."""
        expression = _torch.expression(value)
        if isinstance(expression, int):
            return expression
        number = expression.subs(self.symbol, self.batch) if self.symbol is not None else expression
        return int(number) if number.is_number else None

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        sizes = [self.size(n) for n in node.meta["val"].shape]
        return None if any(n is None for n in sizes) else tuple(n for n in sizes if n is not None)

    def run(self, chain: Sequence[fx.Node], value: torch.Tensor) -> torch.Tensor | None:
        """What becomes of `value` along a chain; None where a size is unknown or does not fit."""
        known: Any = value
        for node in chain:
            args = fx.node.map_arg(node.args[1:], self._number)
            target: Any = aten.reshape.default if node.target in VIEWS else node.target  # memory may lie otherwise here
            if any(a is None for a in torch.utils._pytree.tree_leaves(args)):
                return None
            try:
                known = target(known, *args, **node.kwargs)
            except RuntimeError:
                return None
        return known if isinstance(known, torch.Tensor) else None

    def _number(self, node: fx.Node) -> int | None:
        return self.size(node.meta["val"])


def numbered(*sizes: int) -> torch.Tensor:
    """0, 1, 2, ... in the shape."""
    total = 1
    for n in sizes:
        total *= n
    return torch.arange(total).view(sizes)
