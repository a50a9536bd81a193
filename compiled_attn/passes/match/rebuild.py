"""Makes what an attention in groups holds in the map's own order, and finds where its result is in that order again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from compiled_attn.ir.program import Edit
from compiled_attn.passes.match.positions import Numbering, moves, numbered
from compiled_attn.passes.match.table import AxisLogits
from compiled_attn.passes.match.tokens import REDUCTIONS, Tokens

aten = torch.ops.aten


@dataclass(frozen=True)
class End:
    """Where the result is a map again: [B, *spatial, C], through `linear` if there is one, reshaped and permuted."""

    node: fx.Node
    linear: fx.Node | None
    shape: tuple[int, ...]
    order: tuple[int, ...]


def end_of(node: fx.Node, numbering: Numbering, place: torch.Tensor, sizes: tuple[int, ...]) -> End | None:
    """Follows an attention's result down to where its elements lie in the map's order.

    place: number of each element [d0, d1, n, width] in [B, *spatial, H, width], `sizes`, from 0.
    """
    value = (place + 1).double()
    current, channels = node, math.prod(sizes[-2:])
    linear: fx.Node | None = None
    found: End | None = None
    while True:
        layout = _layout(value.long())
        if layout is not None:
            found = End(current, linear, *layout)
        user = next(iter(current.users)) if len(current.users) == 1 else None
        if user is None or not user.args or user.args[0] is not current:
            return found
        if moves(user):
            following = numbering.run(user, {current: value})
            if following is None or following.numel() != value.numel():
                return found
            value = following
        elif user.target is aten.linear.default and found is None and linear is None:
            rows = value.long().reshape(-1, value.shape[-1]) - 1
            shape = numbering.shape(user)
            whole = rows.shape[1] == channels and torch.equal(rows, rows[:, :1] + torch.arange(rows.shape[1]))
            if not whole or bool((rows[:, 0] % channels).any()) or shape is None:
                return None
            linear = user
            start = rows[:, :1] // channels * shape[-1] + torch.arange(shape[-1]) + 1
            value = start.view(shape).double()
        else:
            return found
        current = user


def _layout(value: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(shape, order): 1, 2, 3, ... reshaped and permuted so is `value`; -1 in the shape is the part with the batch."""
    first = value[(0,) * value.dim()]
    strides = []
    for dim, size in enumerate(value.shape):
        at = [0] * value.dim()
        at[dim] = 1
        strides.append(int(value[tuple(at)] - first) if size > 1 else 0)
    outer = sorted(range(value.dim()), key=lambda d: -strides[d])
    shape = [value.shape[d] for d in outer]
    order = tuple(outer.index(d) for d in range(value.dim()))
    if math.prod(shape) != value.numel() or not torch.equal(numbered(*shape).long().permute(order), value):
        return None
    return (-1, *shape[1:]), order


@dataclass
class Builder:
    """Writes values in the map's order in front of the insertion point; what q, k and v share is written once.

    rolls: how far the map is rolled along each axis; () for not at all.
    """

    edit: Edit
    like: fx.Node
    numbering: Numbering
    rolls: tuple[int, ...] = ()
    _made: dict[Any, fx.Node] = field(default_factory=dict)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.edit.call(target, args, kwargs, like=self.like)

    def on_map(self, tokens: Tokens, spatial: Sequence[int]) -> fx.Node:
        """The tokens' channels as [B, *spatial, heads, width]."""
        heads, width = tokens.channels.shape
        x = self._channels(tokens)
        batch = self._batch(x)
        total = math.prod(n for n in x.meta["val"].shape[1 + len(tokens.spatial) :])
        first = int(tokens.channels[0, 0])
        ordered = torch.equal(tokens.channels.flatten(), first + torch.arange(heads * width))
        if not (ordered and heads * width == total):
            x = self.call(aten.reshape.default, x, [batch, *tokens.spatial, total])
            last = x.meta["val"].dim() - 1
            if ordered:
                x = self.call(aten.slice.Tensor, x, last, first, first + heads * width)
            else:
                index = self.edit.constant(f"{self.like.name}_channels", tokens.channels.flatten())
                x = self.call(aten.index_select.default, x, last, index)
        x = self.call(aten.reshape.default, x, [batch, *spatial, heads, width])
        return self._inside(tokens, x) if tokens.steps else x

    def _channels(self, tokens: Tokens) -> fx.Node:
        """The root with its dimensions in order, and the linear on it."""
        key = (tokens.root, tokens.linear, tokens.order)
        if key not in self._made:
            x = self.edit.node_of[tokens.root]
            if tokens.order != tuple(range(len(tokens.order))):
                x = self.call(aten.permute.default, x, list(tokens.order))
            x = self.rolled(x, self.rolls)
            if tokens.linear is not None:
                old = self.edit.node_of[tokens.linear]
                x = self.edit.call(old.target, (x, *old.args[1:]), dict(old.kwargs), like=old)
            self._made[key] = x
        return self._made[key]

    def rolled(self, x: fx.Node, by: Sequence[int]) -> fx.Node:
        """[B, *spatial, ...] rolled along the spatial axes."""
        if not any(by):
            return x
        return self.call(aten.roll.default, x, list(by), list(range(1, 1 + len(by))))

    def _batch(self, x: fx.Node) -> Any:
        size = x.meta["val"].shape[0]
        if isinstance(size, int):
            return size
        if ("batch", x) not in self._made:
            self._made["batch", x] = self.call(aten.sym_size.int, x, 0)
        return self._made["batch", x]

    def _inside(self, tokens: Tokens, x: fx.Node) -> fx.Node:
        """What the program computes inside heads, on the map."""
        made: dict[fx.Node, Any] = {tokens.split: x}
        for step in tokens.steps:
            made[step] = self._step(step, made, tokens)
        result: fx.Node = made[tokens.steps[-1]]
        return result

    def _step(self, step: fx.Node, made: dict[fx.Node, Any], tokens: Tokens) -> fx.Node:
        if step.target is aten.expand.default:
            source: fx.Node = made[step.args[0]]  # type: ignore[index]
            return source

        def value(node: fx.Node) -> Any:
            return made[node] if node in made else self.per_head(node, step, tokens)

        args, kwargs = fx.node.map_arg((step.args, dict(step.kwargs)), value)
        if step.target in REDUCTIONS:
            args = tuple([-1] if i == REDUCTIONS[step.target] else a for i, a in enumerate(args))
        return self.call(step.target, *args, **kwargs)

    def per_head(self, node: fx.Node, step: fx.Node, tokens: Tokens) -> fx.Node:
        """A constant operand of an op inside heads as [heads, width or 1]."""
        found = head_values(node, step, tokens, self.numbering)
        if found is None:
            raise ValueError(f"{node.name} differs between tokens")  # the match asked before
        return self.edit.constant(f"{node.name}_of_heads", found, made_from=self.numbering.made_from(node))

    def logits(self, parts: Sequence[AxisLogits], spatial: Sequence[int]) -> fx.Node:
        """[B, *spatial, H, the sum of the axes' distances]."""
        made = []
        for part in parts:
            q = self.on_map(part.logits.tokens, spatial)
            table = self.edit.node_of[part.logits.table]
            if part.logits.flipped:
                table = self.call(aten.transpose.int, table, 0, 1)
            rows = self.edit.constant(f"{self.like.name}_distances", part.rows.clamp(min=0))
            chosen = self.call(aten.index_select.default, table, 0, rows)  # [R, width]
            made.append(self.call(aten.linear.default, q, chosen))
        return made[0] if len(made) == 1 else self.call(aten.cat.default, made, -1)


def head_values(node: fx.Node, step: fx.Node, tokens: Tokens, numbering: Numbering) -> torch.Tensor | None:
    """A constant operand inside heads as [heads, width or 1]; None where it differs between tokens of a head."""
    value, shape = numbering.constant(node), numbering.shape(step)
    if value is None or shape is None:
        return None
    if value.dim() == 0:
        return value
    width = shape[-1] if value.shape[-1] != 1 else 1
    spread = value.expand(*shape[:-1], width).reshape(-1, shape[2], width)  # [groups, n, width]
    heads = torch.zeros(len(tokens.channels), width, dtype=value.dtype)
    heads[tokens.head] = spread[:, 0]
    return heads if torch.equal(heads[tokens.head].unsqueeze(1).expand_as(spread), spread) else None
