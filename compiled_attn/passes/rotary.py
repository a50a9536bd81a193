"""Which entry of a rotary table is the identity: 1 in the cosines, 0 in the sines. Found by dataflow, never by name.

add(mul(x, c), mul(turned(x), s))                       turned: a neg and rearrangements of x
sub(mul(x1, c), mul(x2, s)); add(mul(x2, c), mul(x1, s))    the same on halves
mul(view_as_complex(x), t)                              a complex table: its identity is 1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from compiled_attn.passes.follow import Follow

REARRANGE = frozenset(
    (
        "view",
        "reshape",
        "_unsafe_view",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "cat",
        "stack",
        "unsqueeze",
        "squeeze",
        "expand",
        "transpose",
        "permute",
        "clone",
        "contiguous",
        "flip",
        "roll",
        "_to_copy",
        "to",
        "type_as",
        "alias",
        "detach",
        "repeat",
    )
)


def role_of(f: Follow, node: fx.Node, table: fx.Node) -> float:
    """The fused token's factor in `table`, which `node` (a mul) multiplies the tokens with. Raises Lost."""
    from compiled_attn.passes.follow import Lost

    if table.meta["val"].is_complex():
        return 1.0
    made = _trigonometric(table)
    if made is not None:
        return made
    roles = roles_by_sums(f)
    number = f.numbers(table)
    if number in roles:
        return roles[number]
    if any(_products(f, user) for user in _readers(node)):
        raise Lost(node, f"{table} is one of two tables in a sum of products that is no rotation, so a fused token has "
                   "no entry in it")  # fmt: skip
    return 1.0


def roles_by_sums(f: Follow) -> dict[int, float]:
    """Value number of a table -> 1 (cosine) or 0 (sine), from every sum of two products in the graph."""
    if f._roles is not None:
        return f._roles
    roles: dict[int, float] = {}
    for node in f.graph.nodes:
        found = _products(f, node)
        if found is None:
            continue
        (x, c), (y, s) = found
        if name_of(node) == "sub":
            if _sources(x).keys() & _sources(y).keys():
                roles[f.numbers(c)], roles[f.numbers(s)] = 1.0, 0.0
        elif _sources(y).get(x):
            roles[f.numbers(c)], roles[f.numbers(s)] = 1.0, 0.0
        elif _sources(x).get(y):
            roles[f.numbers(c)], roles[f.numbers(s)] = 0.0, 1.0
    f._roles = roles
    return roles


def name_of(node: fx.Node) -> str:
    target: Any = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else ""


def _products(f: Follow, node: fx.Node) -> tuple[tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node]] | None:
    """Both terms of a sum or difference, each as (tokens, table), where each is a product of the two."""
    if name_of(node) not in ("add", "sub") or len(node.args) != 2:
        return None
    terms = [_product(f, _through(a)) if isinstance(a, fx.Node) else None for a in node.args]
    if terms[0] is None or terms[1] is None:
        return None
    return terms[0], terms[1]


def _product(f: Follow, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    a, b = node.args[:2] if name_of(node) == "mul" else (None, None)
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    if (a in f.data) == (b in f.data):
        return None
    return (a, b) if a in f.data else (b, a)


def _through(node: fx.Node) -> fx.Node:
    while name_of(node) in ("clone", "_to_copy", "to", "alias", "contiguous", "type_as"):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _readers(node: fx.Node) -> list[fx.Node]:
    found = []
    for user in node.users:
        found += _readers(user) if name_of(user) in ("clone", "_to_copy", "to", "alias", "type_as") else [user]
    return found


def _sources(node: fx.Node) -> dict[fx.Node, bool]:
    """Values that `node` only rearranges, and whether a sign is turned on the way."""
    found: dict[fx.Node, bool] = {}
    stack = [(node, False)]
    while stack:
        current, negated = stack.pop()
        if found.get(current, False) or (current in found and not negated):
            continue
        found[current] = negated
        name = name_of(current)
        if name == "neg" or name in REARRANGE or "getitem" in str(current.target):
            first = current.args[0]
            for source in first if isinstance(first, (list, tuple)) else [first]:
                if isinstance(source, fx.Node):
                    stack.append((source, negated or name == "neg"))
    return found


def _trigonometric(table: fx.Node) -> float | None:
    """1 for rearranged cosines, 0 for rearranged sines, None for anything else."""
    kinds = {name_of(n) for n in _sources(table) if name_of(n) in ("cos", "sin")}
    return {"cos": 1.0, "sin": 0.0}[kinds.pop()] if len(kinds) == 1 else None
