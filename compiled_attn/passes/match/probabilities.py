"""From a softmax down to the product with v: what is done to the probabilities on the way."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from compiled_attn.ir.program import Program
from compiled_attn.ir.text import target_text
from compiled_attn.passes.match import values
from compiled_attn.passes.match.axes import Layout, below, is_layout_op
from compiled_attn.passes.match.products import PRODUCTS, Product, read_by
from compiled_attn.passes.match.scores import SEARCH, Decline
from compiled_attn.passes.match.values import ADD, DIVIDE, FILL, FLOOR, MULTIPLY, SUBTRACT, WHERE

aten = torch.ops.aten
CARRIERS = {
    *MULTIPLY, *DIVIDE, *ADD, *SUBTRACT, *FILL, *WHERE, *FLOOR,
    aten.dropout.default, aten.native_dropout.default, operator.getitem, aten.nan_to_num.default,
    aten.cat.default, aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.conv2d.default, aten.relu.default,
}  # fmt: skip


@dataclass(frozen=True)
class Mixed:
    """The product with v above which the probabilities go, with what happened to them on the way."""

    product: Product
    factor: fx.Node
    layout: Layout
    dropout: float
    scale: float
    path: tuple[fx.Node, ...]


def descend(program: Program, node: fx.Node, layout: Layout) -> Mixed | Decline:
    """From the softmax's result down to the product with v."""
    start, dropout, scale, path = node, 0.0, 1.0, [node]
    while True:
        users = values.readers(node)
        if len(users) != 1:
            names = ", ".join("the output" if u.op == "output" else u.name for u in users)
            return Decline(node, f"the probabilities {node.name} are read {len(users)} times: by {names}")
        user = users[0]
        found = read_by(user, node)
        if found is not None and found.addend is None:
            return Mixed(found, node, layout, dropout, scale * found.alpha, tuple(path))
        if values.inactive_dropout(user):
            pass
        elif (probability := values.active_dropout(user)) is not None:
            if dropout:
                return Decline(user, f"{user.name} is a second dropout of the probabilities of {start.name}")
            dropout = probability
        elif user.target is aten.native_dropout.default:
            kept = [u for u in user.users if u.args[1] == 0]
            if len(kept) != 1 or len(user.users) != 1:
                return Decline(user, f"the mask of {user.name} is read")
        elif is_layout_op(user) and user.args[0] is node:
            down = below(user, layout)
            if down is None:
                return Decline(user, f"{user.name} ({target_text(user.target)}) cuts across heads or tokens")
            layout = down
        elif (number := _scaled_by(program, user, node)) is not None:
            scale *= number
        else:
            what = target_text(user.target) if user.op == "call_function" else "the output"
            mixes = " and mixes heads" if user.target is aten.linear.default else ""
            return Decline(user, f"{user.name} ({what}) stands between {start.name} and the product with v{mixes}")
        node = user
        path.append(node)


def _scaled_by(program: Program, user: fx.Node, node: fx.Node) -> float | None:
    if user.target in MULTIPLY:
        other = user.args[1] if user.args[0] is node else user.args[0]
        return values.scalar(program, other)
    if user.target in DIVIDE and user.args[0] is node:
        number = values.scalar(program, user.args[1])
        return 1 / number if number else None
    return None


def reached(node: fx.Node) -> list[fx.Node]:
    """Products that a softmax's result goes into, through anything that keeps it a tensor, before another softmax."""
    queue, seen, found = [node], {node}, []
    while queue and len(seen) < SEARCH:
        current = queue.pop(0)
        for user in current.users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            if user.target in PRODUCTS:
                found.append(user)
            elif _passes_on(user, current):
                queue.append(user)
    return found


def _passes_on(user: fx.Node, node: fx.Node) -> bool:
    """Whether probabilities that enter `user` are still told token by token behind it."""
    if user.target is aten.linear.default:
        return user.args[0] is node
    return user.target in CARRIERS or is_layout_op(user)
