"""Value numbers: which nodes of a graph compute the same thing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree


class Numbers:
    """Value numbers: two nodes that compute the same from the same have the same number."""

    def __init__(self) -> None:
        self.table: dict[Any, int] = {}
        self.memo: dict[fx.Node, int] = {}

    def __call__(self, node: fx.Node) -> int:
        for current in _in_order(node, self.memo):
            self.memo[current] = self.table.setdefault(self._key(current), len(self.table))
        return self.memo[node]

    def _key(self, node: fx.Node) -> Any:
        target: Any = node.target
        random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
        if node.op != "call_function" or random:
            return ("node", node.name)
        number: Any = lambda n: _Number(self.memo[n])  # noqa: E731
        args = fx.node.map_arg((node.args, node.kwargs), number)
        return (target, str(pytree.tree_flatten(args)))


@dataclass(frozen=True)
class _Number:
    value: int


def _in_order(node: fx.Node, known: dict[fx.Node, int]) -> Iterator[fx.Node]:
    """The nodes that `node` is computed from and that are not in `known`, arguments first."""
    stack, done = [(node, False)], set(known)
    while stack:
        current, ready = stack.pop()
        if current in done:
            continue
        if ready or not current.all_input_nodes:
            done.add(current)
            yield current
        else:
            stack.append((current, True))
            stack.extend((a, False) for a in current.all_input_nodes)
