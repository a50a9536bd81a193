"""Products of given weights with windows of a map: which factor is windows, which windows they are, and in what order.

out[p, m, d] = sum over slots k of weights[p, m, k] values[p, k, d], where values moves elements of a map and p counts
pictures, heads and windows in any order. The map's sizes, the windows' and their steps are read off element numbers and
asked of local_geometry, which must give every slot of every window the same place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from compiled_attn.ops.local_geometry import axes_of, slots
from compiled_attn.passes.match import values
from compiled_attn.passes.match.axes import is_one, shape
from compiled_attn.passes.match.positions import Numbering, moved, moves
from compiled_attn.passes.match.products import Product, product
from compiled_attn.passes.match.tokens import Tokens, origin_of, tokens_of
from compiled_attn.passes.match.windows import Sizes, factors, ordered_steps, places

aten = torch.ops.aten
COPIES = {aten.cat.default, aten.im2col.default, aten.index.Tensor, aten.index_select.default, aten.unfold.default}
PARTS = ("batch", "head", "place")


@dataclass(frozen=True)
class Mixing:
    """A product by its labels: shared by weights, values and result; mixes of the weights; slots; widths of values."""

    product: Product
    weights: fx.Node
    weights_labels: tuple[str | None, ...]
    values: fx.Node
    values_labels: tuple[str, ...]
    shared: tuple[str, ...]
    mixes: tuple[str, ...]
    slots: tuple[str, ...]
    widths: tuple[str, ...]


@dataclass(frozen=True)
class Windows:
    """The values as windows. order: of PARTS in the shared dimensions.  options: of neighborhood_apply.

    queries, keys: sizes of the maps of windows and of values; keys counts the zeros that the op wants behind an end.
    """

    tokens: Tokens
    order: tuple[str, ...]
    options: dict[str, Any]
    queries: Sizes
    keys: Sizes


def mixings(node: fx.Node) -> Iterator[Mixing]:
    """The ways to see a node as a product of weights with values that are copied from a map more than once."""
    found = product(node) or _summed(node)
    if found is None or found.addend is not None or found.alpha != 1.0:
        return
    sides = ((found.left, found.left_labels), (found.right, found.right_labels))
    for (weights, w), (valued, v) in (sides, sides[::-1]):
        labels = tuple(label for label in v if label)
        if len(labels) != len(v) or not _copied(valued):
            continue
        shared = tuple(x for x in labels if x in w and x in found.out_labels)
        mixes = tuple(x for x in w if x and x not in labels)
        summed = tuple(x for x in labels if x in w and x not in found.out_labels)
        widths = tuple(x for x in labels if x not in w)
        if summed and all(x in found.out_labels for x in (*mixes, *widths)):
            yield Mixing(found, weights, w, valued, labels, shared, mixes, summed, widths)


def windows_of(mixing: Mixing, numbering: Numbering) -> Windows | str | None:
    """The windows that values are; a sentence where they overlap but fit no pattern; None where they are none."""
    origin = origin_of(mixing.values, numbering)
    if isinstance(origin, str) or origin.steps:
        return None
    at = [mixing.values_labels.index(x) for x in (*mixing.shared, *mixing.slots, *mixing.widths)]
    sizes = [math.prod(_sizes(mixing, labels, numbering)) for labels in (mixing.slots, mixing.widths)]
    numbers = origin.numbers.permute(at).reshape(-1, 1, *sizes)
    seen = numbers[numbers > 0]
    if seen.unique().numel() == seen.numel():
        return None
    tokens = tokens_of(replace(origin, numbers=numbers))
    if isinstance(tokens, str):
        return None
    order = _order(tokens)
    if order is None:
        return "its windows are not those of every picture and head in the same order"
    arrangement, spot = order
    found = _pattern(spot, tokens.spatial)
    if found is None:
        sizes_text = " x ".join(str(n) for n in tokens.spatial)
        return f"its {len(spot)} windows of {spot.shape[1]} values of a map of {sizes_text} follow no pattern"
    return Windows(tokens, arrangement, *found)


def expected(queries: Sizes, keys: Sizes, real: Sizes, options: dict[str, Any]) -> torch.Tensor:
    """The place of every slot of every window, [N, K], on a map of `real` sizes filled up to `keys`; -1 for none."""
    rank, device = len(queries), torch.device("cpu")
    spot, there = torch.zeros((), dtype=torch.long), torch.ones((), dtype=torch.bool)
    for i, axis in enumerate(axes_of(rank, **options)):
        found = slots(axis, queries[i], keys[i], device, single=True)
        spread = [1] * (2 * rank)
        spread[i], spread[rank + i] = found.index.shape
        spot = spot * real[i] + found.index.view(spread)
        there = there & (found.real & (found.index < real[i])).view(spread)
    return torch.where(there, spot, -1).reshape(math.prod(queries), -1)


def _sizes(mixing: Mixing, labels: tuple[str, ...], numbering: Numbering) -> list[int]:
    sizes = numbering.shape(mixing.values) or ()
    return [sizes[mixing.values_labels.index(x)] for x in labels]


def _copied(node: fx.Node) -> bool:
    """Whether a value is made by moving elements with an op that may copy one to several places."""
    pending, met = [node], {node}
    while pending:
        current = pending.pop()
        if moves(current):
            if current.target in COPIES:
                return True
            fresh = [n for n in moved(current) if n not in met]
            met.update(fresh)
            pending += fresh
    return False


def _summed(node: fx.Node) -> Product | None:
    """sum(a * b, dims) as a product."""
    times, dims = (*node.args, None, None)[:2] if node.target is aten.sum.dim_IntList else (None, None)
    if not isinstance(times, fx.Node) or times.target is not aten.mul.Tensor or len(times.users) != 1:
        return None
    left, right = times.args[:2]
    if not values.is_tensor(left) or not values.is_tensor(right) or not isinstance(dims, (list, tuple)):
        return None
    a, b = shape(left), shape(right)
    if len(a) != len(b) or values.argument(node, 2, "keepdim", False) or node.kwargs.get("dtype") is not None:
        return None
    spread = [(is_one(n) and not is_one(m), is_one(m) and not is_one(n)) for n, m in zip(a, b, strict=True)]
    labels = [tuple(None if pair[side] else f"d{i}" for i, pair in enumerate(spread)) for side in (0, 1)]
    gone = {values.normal_dim(d, len(a)) for d in dims}
    out = tuple(f"d{i}" for i in range(len(a)) if i not in gone)
    return Product(node, left, right, labels[0], labels[1], out)


def _order(tokens: Tokens) -> tuple[tuple[str, ...], torch.Tensor] | None:
    """The order of pictures, heads and windows in the groups, and each window's places [N, K], the same in all."""
    sizes = {"batch": int(tokens.batch.max()) + 1, "head": len(tokens.channels)}
    count, rest = divmod(len(tokens.batch), math.prod(sizes.values()))
    sizes["place"] = count
    if rest:
        return None
    for order in itertools.permutations(PARTS):
        spread = [sizes[part] for part in order]
        at = {part: torch.arange(sizes[part]).view([-1 if p == part else 1 for p in order]) for part in order}
        if all(
            torch.equal(known.view(spread), at[part].expand(spread))
            for part, known in (("batch", tokens.batch), ("head", tokens.head))
        ):
            spot = tokens.spot.view(*spread, -1).permute(*(order.index(part) for part in PARTS), 3)
            return (order, spot[0, 0]) if bool((spot == spot[:1, :1]).all()) else None
    return None


def _pattern(spot: torch.Tensor, keys: Sizes) -> tuple[dict[str, Any], Sizes, Sizes] | None:
    """(options, sizes of the windows' map, sizes of the values' map with the zeros behind it)."""
    rank, at = len(keys), places(spot, keys)
    for queries in factors(len(spot), rank):
        stride = [-(-m // n) for n, m in zip(queries, keys, strict=True)]
        filled = tuple(n * s for n, s in zip(queries, stride, strict=True))
        if any(full - m >= s for full, m, s in zip(filled, keys, stride, strict=True)):
            continue
        for window in factors(spot.shape[1], rank):
            options = {"window": list(window), "stride": stride, "dilation": list(ordered_steps(spot, at, window))}
            options["block"] = [1] * rank
            for border in ("zero", "clamp") if filled == keys else ("zero",):
                given = {**options, "border": border}
                if all(d == 1 or s == 1 for d, s in zip(options["dilation"], stride, strict=True)) and torch.equal(
                    expected(queries, filled, keys, given), spot
                ):
                    return given, queries, filled
    return None
