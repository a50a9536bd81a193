"""The rotation of queries and keys by position, found in a graph as the part between raw heads and turned ones.

r = transpose(view(linear(x, w)))                    raw: the last value of that shape through which all passes
k = add(mul(r, cos(p)), mul(half_turned(r), sin(p)))  turned: reads, beside r, only values made of positions
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import place
from compiled_attn.passes.evict_match import evaluate, sources

Turn = Callable[[Tensor, Tensor, Mapping[fx.Node, Any]], Tensor]


def turns_of(turned: Any, positions: fx.Node, inputs: Collection[str]) -> tuple[Turn, fx.Node, list[fx.Node]]:
    """The rotation that made `turned` [B, *, T, D] of a raw node, which comes second, by the argument `positions`.

    It is a function of other heads [B, *, n, D], their places [B, n] and the values of the constants that come third.
    inputs: names of the program's arguments. Raises PassError where there is none.
    """
    raw = _raw(turned, positions, inputs)
    if raw is None:
        raise PassError(
            "the policy turns keys by their place, and the model does not rotate them by an argument",
            where=place(turned),
            facts=f"no part of {turned.name} reads {positions.name} beside the heads that it turns",
            do="keep positions in the text: SinkAndRecent(rolling=False)",
        )
    free = [n for n in _between(turned, raw) if n.op == "placeholder" and n is not positions]

    def turn(heads: Tensor, places: Tensor, values: Mapping[fx.Node, Any]) -> Tensor:
        out: Tensor = evaluate(turned, {raw: heads, positions: places, **values}, lambda n: n.meta["val"])
        if out.dim() != heads.dim() or not all(
            _torch.statically_true(a == b) for a, b in zip(out.shape, heads.shape, strict=True)
        ):
            raise PassError(
                "the rotation of the model does not take another number of tokens",
                where=place(turned),
                facts=f"heads {tuple(heads.shape)} became {tuple(out.shape)}",
                do="keep positions in the text: SinkAndRecent(rolling=False)",
            )
        return out

    return turn, raw, free


def with_values(turn: Turn, values: Mapping[fx.Node, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The rotation of heads by places, its constants given."""
    return lambda heads, places: turn(heads, places, values)


def _raw(turned: fx.Node, positions: fx.Node, inputs: Collection[str]) -> fx.Node | None:
    """The nearest node of the same shape that all content of `turned` passes through, positions joining behind it."""
    shape = turned.meta["val"].shape
    above = set(sources(turned))
    for node in reversed([n for n in turned.graph.nodes if n in above and n is not turned]):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.shape == shape:
            reached = _between(turned, node)
            given = [n for n in reached if n.op == "placeholder" and n is not positions]
            if positions in reached and all(n.name not in inputs and n.meta["val"].dim() <= 1 for n in given):
                return node
    return None


def _between(turned: fx.Node, raw: fx.Node) -> list[fx.Node]:
    """What `turned` is made of beside `raw`; what only gives sizes does not count."""
    found: dict[fx.Node, None] = {}
    stack = [turned]
    while stack:
        node = stack.pop()
        if node is not raw and node not in found:
            found[node] = None
            if node.target is not torch.ops.aten.sym_size.int:
                stack += node.all_input_nodes
    return list(found)
