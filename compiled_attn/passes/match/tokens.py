"""Which tokens and channels of a map q, k or v of an attention hold, and how the same is made in the map's own order.

r = roll(x); t = partition(r)                      root    x, a map [B, Y, X, C]
y = linear(t, W, b)                                linear  may stand on the map as well: it mixes channels only
s = heads(y)                                       spot    the place in the map of each group's tokens
q = s / norm(s) * scale                            steps   what happens inside each head afterwards
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compiled_attn.passes.match.positions import Numbering, moves, numbered

aten = torch.ops.aten
POINTWISE = {
    aten._to_copy.default,
    aten.add.Tensor,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.div.Tensor,
    aten.maximum.default,
    aten.mul.Tensor,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.reciprocal.default,
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.sub.Tensor,
}
OVER_CHANNELS = "it attends over channels"
REDUCTIONS = {aten.linalg_vector_norm.default: 2, aten.mean.dim: 1, aten.sum.dim_IntList: 1}  # where `dim` stands


@dataclass(frozen=True)
class Tokens:
    """q, k or v [d0, d1, tokens, width] as tokens of a map; a group is a pair of d0 and d1.

    root, linear: where the channels come from.  order: the root's dimensions as batch, spatial ones, channels.
    spatial: sizes of the spatial ones.  split: the value that only moves elements of the linear or the root.
    steps: what is computed inside the heads between `split` and the value.  spot [groups, tokens]: place in a picture,
    -1 for zeros.  batch, head [groups].  channels [heads, width].  kinds: of the dimensions that numbers count.
    """

    root: fx.Node
    linear: fx.Node | None
    kinds: tuple[str, ...]
    order: tuple[int, ...]
    spatial: tuple[int, ...]
    split: fx.Node
    steps: tuple[fx.Node, ...]
    spot: torch.Tensor
    batch: torch.Tensor
    head: torch.Tensor
    channels: torch.Tensor


@dataclass(frozen=True)
class Origin:
    """The element numbers of a value among those of tokens [*sizes] of `root`, with `linear` on them.

    channels: the root's dimension that the linear mixes and that comes last in `sizes`; None where there is no linear.
    """

    root: fx.Node
    linear: fx.Node | None
    channels: int | None
    sizes: tuple[int, ...]
    split: fx.Node
    steps: tuple[fx.Node, ...]
    numbers: torch.Tensor  # as the value, from 1; 0 for zeros

    @property
    def tokens(self) -> int | None:
        """Tokens of a picture, where dimensions are known to be of tokens."""
        if (self.linear or self.root).target is aten.linear.default:
            return math.prod(self.sizes[1:-1])
        return self.sizes[2] if self.split is self.root and len(self.sizes) == 4 else None


def inside_heads(node: fx.Node, numbering: Numbering) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The value above that moves elements only, and the ops inside heads between; (node, ()) where there are none."""
    steps: list[fx.Node] = []
    place = {n: i for i, n in enumerate(node.graph.nodes)}
    frontier = {node}
    while len(frontier) != 1 or not moves(next(iter(frontier))):
        current = max(frontier, key=place.__getitem__)
        if not _inside(current, node):
            return node, ()
        frontier.remove(current)
        steps.append(current)
        frontier |= {n for n in current.all_input_nodes if _tensor(n) and numbering.constant(n) is None}
        if not frontier:
            return node, ()
    return next(iter(frontier)), tuple(reversed(steps))


def _tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _inside(node: fx.Node, whole: fx.Node) -> bool:
    """Whether an op computes each token's numbers inside each head from the same token's and head's."""
    if not _tensor(node) or node.meta["val"].dim() != whole.meta["val"].dim():
        return False
    if node.target in REDUCTIONS:
        at = REDUCTIONS[node.target]
        dims: Any = node.args[at] if len(node.args) > at else None
        keep = node.args[at + 1] if len(node.args) > at + 1 else node.kwargs.get("keepdim", False)
        return bool(keep) and dims in ([-1], [node.meta["val"].dim() - 1])
    return node.target in POINTWISE or node.target is aten.expand.default


def origin_of(node: fx.Node, numbering: Numbering) -> Origin | str:
    """Follows a value up to a map, through ops inside heads and one linear layer."""
    split, steps = inside_heads(node, numbering)
    first = numbering.root(split) or node
    if first is node:
        split, steps = node, ()
    if not _tensor(first):
        return f"{split.name} moves no tensor"
    linear = None
    root = first
    if first.target is aten.linear.default and first is not split:
        source: Any = first.args[0]
        above = numbering.root(source, through_pads=False) if moves(source) else None
        if above is not None and _tensor(above):
            linear, root = first, above
    sizes, shape = numbering.shape(root), numbering.shape(first)
    if sizes is None or shape is None:
        return f"a size of {root.name} is symbolic beside the batch"
    start, channels = numbered(*sizes), None
    if linear is not None:
        at = numbering.run(linear.args[0], {root: start}, alone=True)  # type: ignore[arg-type]
        if at is None:
            return f"the tokens of {linear.name} do not follow from {root.name} by moving elements"
        tokens = _rows(at, sizes)
        if isinstance(tokens, str):
            return f"{linear.name} {tokens}"
        token, channels = tokens
        width = shape[-1]
        start = (token.view(*shape[:-1], 1) * width + torch.arange(width) + 1).double()
        sizes = (*sizes[:channels], *sizes[channels + 1 :], width)
    numbers = numbering.run(split, {first: start}, alone=True)
    if numbers is None:
        return f"{split.name} does not follow from {first.name} by moving elements"
    return Origin(root, linear, channels, sizes, split, steps, numbers.long())


def _rows(at: torch.Tensor, sizes: tuple[int, ...]) -> tuple[torch.Tensor, int] | str:
    """Numbers of the tokens whose channels are a value's last dimension in order, and the root's channel dimension."""
    rows = at.long().reshape(-1, at.shape[-1]) - 1
    for dim in reversed(range(len(sizes))):
        stride = math.prod(sizes[dim + 1 :])
        if sizes[dim] != rows.shape[1]:
            continue
        first = rows[:, :1]
        if bool((rows == first + torch.arange(rows.shape[1]) * stride).all()) and not bool(
            (first // stride % sizes[dim]).any()
        ):
            token = first[:, 0] // (stride * sizes[dim]) * stride + first[:, 0] % stride
            return token, dim
    return "does not take whole tokens of the map"


def tokens_of(origin: Origin, like: Tokens | None = None) -> Tokens | str:
    """Splits an origin's numbers into places, heads and channels.

    like: another factor of the same attention, which tells apart dimensions that one token a group leaves open.
    """
    sizes, numbers = origin.sizes, origin.numbers
    if numbers.dim() != 4:
        return f"{origin.split.name} has {numbers.dim()} dimensions"
    groups = numbers.reshape(-1, *numbers.shape[2:])
    real = groups > 0
    if not bool((real == real[..., :1]).all()):
        return f"{origin.split.name} puts zeros between the channels of a head"
    element = groups - 1
    known = like is not None and (like.root, like.linear) == (origin.root, origin.linear)
    kinds = like.kinds if known else _kinds(element, real, sizes, like)  # type: ignore[union-attr]
    if isinstance(kinds, str):
        return f"{origin.split.name} {kinds}"
    if kinds[-1] == "spatial" and (origin.linear or origin.root).target is aten.linear.default:
        return f"{origin.split.name} holds a channel for each token: {OVER_CHANNELS}"
    place, channel, batch = (torch.zeros_like(element) for _ in range(3))
    for dim, kind in enumerate(kinds):
        at = element // math.prod(sizes[dim + 1 :]) % sizes[dim]
        if kind == "batch":
            batch = at
        elif kind == "spatial":
            place = place * sizes[dim] + at
        else:
            channel = channel * sizes[dim] + at
    seen = real[..., 0]
    if not bool(seen.any(1).all()):
        return f"{origin.split.name} holds a group of zeros alone"
    first = seen.long().argmax(1)
    rows = torch.arange(len(groups))
    heads = channel[rows, first]  # [groups, width]
    owner = batch[rows, first, 0]
    if not bool(((channel == heads.unsqueeze(1)) | ~real).all()):
        return f"{origin.split.name} takes other channels for other tokens"
    if not bool(((batch == owner.view(-1, 1, 1)) | ~real).all()):
        return f"{origin.split.name} joins tokens of several pictures in a group"
    if not bool(((place == place[..., :1]) | ~real).all()):
        return f"{origin.split.name} mixes tokens inside a head"
    channels, head = heads.unique(dim=0, return_inverse=True)
    spot = torch.where(seen, place[..., 0], -1)
    spatial = tuple(sizes[d] for d, kind in enumerate(kinds) if kind == "spatial")
    order = _root_order(origin, kinds)
    return Tokens(
        origin.root, origin.linear, kinds, order, spatial, origin.split, origin.steps, spot, owner, head, channels
    )


def _root_order(origin: Origin, kinds: Sequence[str]) -> tuple[int, ...]:
    """The root's dimensions as batch, spatial ones, channels."""
    if origin.channels is None:
        dims = dict(enumerate(kinds))
    else:
        rest = [d for d in range(len(kinds)) if d != origin.channels]
        dims = dict(zip(rest, kinds, strict=False)) | {origin.channels: "channel"}
    return tuple(d for kind in ("batch", "spatial", "channel") for d in sorted(dims) if dims[d] == kind)


def _kinds(
    element: torch.Tensor, real: torch.Tensor, sizes: tuple[int, ...], like: Tokens | None
) -> tuple[str, ...] | str:
    """Whether each dimension of the root is batch, spatial or of channels: along tokens or inside a head it changes."""
    kinds = []
    wanted = list(like.spatial) if like is not None else []
    first = real[..., 0].long().argmax(1).view(-1, 1, 1).expand(-1, 1, element.shape[2])
    for dim, size in enumerate(sizes):
        at = element // math.prod(sizes[dim + 1 :]) % size
        token = bool(((at != at.gather(1, first)) & real).any())
        channel = bool(((at != at[..., :1]) & real).any())
        if dim == 0:
            if token or channel:
                return "joins tokens of several pictures in a group"
            kinds.append("batch")
        elif token and channel:
            return "mixes tokens with channels"
        elif token or channel:
            kinds.append("spatial" if token else "channel")
        elif size in wanted and len(sizes) - dim > 1:
            wanted.remove(size)
            kinds.append("spatial")
        else:
            kinds.append("channel")
    return tuple(kinds)
