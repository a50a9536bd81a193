"""Which pattern of local attention the groups of an attention follow, found from the places of their tokens.

Candidates are read off the places and the mask; one is taken only if the op, asked through local_geometry, lets every
query see exactly the keys that it sees in the program.

Letters: W groups (windows) of a picture, n queries and m keys of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compiled_attn.ops.local_geometry import Axis, axes_of, slots

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Groups:
    """queries [W, n], keys [W, m]: places in a picture, -1 for zeros.  visible [W, n, m]: what no mask hides."""

    queries: torch.Tensor
    keys: torch.Tensor
    visible: torch.Tensor

    @property
    def whole(self) -> bool:
        """Whether one group holds every query and every key of a picture."""
        return len(self.queries) == 1 and torch.equal(self.queries.sort().values, self.keys.sort().values)


@dataclass(frozen=True)
class Pattern:
    """The op's options, the sizes of the map, and each pair's place in the bias table, [W, n, m]; -1 where unseen.

    axes: the same of every axis by itself.
    """

    options: dict[str, Any]
    queries: Sizes
    keys: Sizes
    code: torch.Tensor
    axes: tuple[torch.Tensor, ...]


def grids(length: int, rank_hints: Sequence[Sizes]) -> list[Sizes]:
    """Ways to see `length` places as a map: as the program does, as a sequence, as any rectangle."""
    found = [h for h in rank_hints if math.prod(h) == length]
    found.append((length,))
    found += [(n, length // n) for n in range(2, length) if length % n == 0]
    return list(dict.fromkeys(found))


def patterns(groups: Groups, queries: Sizes, keys: Sizes, *, lenient: bool = False) -> Iterator[Pattern]:
    """The patterns of the op that these groups follow on maps of these sizes.

    lenient: those too that see less than the groups, which say what a mask might have left undone.
    """
    for options in _candidates(groups, queries, keys):
        found = _verified(options, groups, queries, keys, lenient)
        if found is not None:
            yield found


def rolled(groups: Groups, sizes: Sizes) -> tuple[Groups, Sizes] | None:
    """The groups on a map that was rolled, and how far along each axis, where a mask cuts the last windows in two.

    Models that roll a map and then pad it leave the parts of a window at the far ends of the padded map.
    """
    if groups.whole or not torch.equal(groups.queries, groups.keys):
        return None
    last = int(groups.queries.amax(1).argmax())
    at = places(groups.queries[last], sizes)
    seen = groups.visible[last, 0]
    shift = tuple(len(x.unique()) - len(x[seen].unique()) for x in at)
    if not any(shift):
        return None
    spot = torch.zeros_like(groups.queries)
    for x, by, n in zip(places(groups.queries, sizes), shift, sizes, strict=True):
        spot = spot * n + (x + by) % n
    return Groups(spot, spot, groups.visible), shift


def places(spot: torch.Tensor, sizes: Sizes) -> list[torch.Tensor]:
    """Coordinates of places, axis by axis."""
    return [spot // math.prod(sizes[i + 1 :]) % n for i, n in enumerate(sizes)]


def _candidates(groups: Groups, queries: Sizes, keys: Sizes) -> Iterator[dict[str, Any]]:
    if groups.whole:
        yield from _of_mask(groups.visible[0], queries)
        return
    blocks = _rectangle(groups.queries, queries)
    if blocks is None:
        return
    at = places(groups.queries, queries)
    same = torch.equal(groups.queries, groups.keys)
    for window, step, origin in _key_rectangles(groups.keys, keys):
        rows = []
        for i, (block, spread) in enumerate(blocks):
            ratio = keys[i] / queries[i]
            stride = round(block * ratio)
            first = at[i].amin(1)
            if same and spread > 1 and spread * block == queries[i]:
                rows.append((window[i], 1, 1, spread, 0))  # tokens that lie apart: classes of a dilated neighborhood
            elif same:
                rows.append((window[i], block, block, 1, int(first[origin]) % block if spread == 1 else 0))
            else:
                rows.append((window[i], stride, block, step[i] if block == 1 else 1, 0))
        w, s, b, d, o = (list(x) for x in zip(*rows, strict=True))
        borders = ("zero",) if bool((groups.keys < 0).any()) and bool(groups.visible.all()) else ("mask", "clamp")
        options = {"window": w, "stride": s, "dilation": d, "shift": o, "block": b}
        for border in borders:
            yield {**options, "border": border}
        if len(queries) == 1 and not bool(groups.visible.all()) and b == s:
            yield {**options, "border": "mask", "causal": [True]}


def _rectangle(spot: torch.Tensor, sizes: Sizes) -> list[tuple[int, int]] | None:
    """(length, step) along each axis of the rectangles that groups of queries are; None where one is none."""
    best: list[tuple[int, int]] | None = None
    at = places(spot, sizes)
    for g in range(len(spot)):
        axes = [x[g].unique() for x in at]
        if math.prod(len(a) for a in axes) != spot.shape[1]:
            return None
        steps = [int(a[1] - a[0]) if len(a) > 1 else 1 for a in axes]
        if any(int(a[-1] - a[0]) != (len(a) - 1) * s for a, s in zip(axes, steps, strict=True)):
            continue  # a roll brought its parts together
        if best is None or steps <= [s for _, s in best]:
            best = [(len(a), s) for a, s in zip(axes, steps, strict=True)]
    return best


def _key_rectangles(spot: torch.Tensor, sizes: Sizes) -> Iterator[tuple[Sizes, Sizes, int]]:
    """(lengths, steps, a group) of the rectangles that groups of keys may be: of whole ones, or by the keys' order."""
    at = places(spot, sizes)
    whole = (spot >= 0).all(1)
    tried = set()
    for g in range(len(spot)):
        if not whole[g]:
            continue
        axes = [x[g].unique() for x in at]
        steps = tuple(int(a[1] - a[0]) if len(a) > 1 else 1 for a in axes)
        if any(int(a[-1] - a[0]) != (len(a) - 1) * s for a, s in zip(axes, steps, strict=True)):
            continue
        lengths = tuple(len(a) for a in axes)
        if math.prod(lengths) == spot.shape[1] and (lengths, steps) not in tried:
            tried.add((lengths, steps))
            yield lengths, steps, g
    if not tried:
        for lengths in factors(spot.shape[1], len(sizes)):
            yield lengths, ordered_steps(spot, at, lengths), 0


def ordered_steps(spot: torch.Tensor, at: list[torch.Tensor], lengths: Sizes) -> Sizes:
    """How far neighbors lie apart along each axis, if keys come in the order of the rectangle."""
    steps = []
    for i, n in enumerate(lengths):
        inner = math.prod(lengths[i + 1 :])
        table, real = (x.view(len(spot), -1, n, inner) for x in (at[i], spot >= 0))
        both = real[:, :, 1:] & real[:, :, :-1]
        jumps = (table[:, :, 1:] - table[:, :, :-1])[both]
        steps.append(max(1, int(jumps[0])) if len(jumps) else 1)
    return tuple(steps)


def factors(total: int, rank: int) -> Iterator[Sizes]:
    """Ways to write a number as a product of `rank` factors, nearly equal ones first."""
    if rank == 1:
        yield (total,)
        return
    for n in sorted((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n**rank - total)):
        for rest in factors(total // n, rank - 1):
            yield (n, *rest)


def _of_mask(visible: torch.Tensor, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Patterns that a mask over whole pictures, [n, m], may follow."""
    length = visible.shape[0]
    if visible.shape[0] != visible.shape[1]:
        return
    if len(sizes) == 1:
        yield from _of_sequence(visible)
    middle = 0
    for n in sizes:
        middle = middle * n + n // 2
    seen = visible[middle].nonzero().flatten()
    axes = [x.unique() for x in places(seen, sizes)]
    steps = [int(a[1] - a[0]) if len(a) > 1 else 1 for a in axes]
    window = [len(a) for a in axes]
    if math.prod(window) != len(seen) or len(seen) in (0, length):
        return
    for border in ("clamp", "mask"):
        yield {"window": window, "stride": [1] * len(sizes), "dilation": steps, "border": border}
    first = visible[0].nonzero().flatten()
    if not len(first):
        return
    corner = [x.unique()[-1] + 1 for x in places(first, sizes)]
    shift = [int(c) % w for c, w in zip(corner, window, strict=True)]
    yield {"window": window, "stride": window, "shift": shift, "border": "mask"}


def _of_sequence(visible: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Causal windows with or without sinks."""
    length = len(visible)
    if bool(visible.triu(1).any()):
        return
    last = visible[-1].nonzero().flatten()
    gaps = (last[1:] - last[:-1] > 1).nonzero().flatten()
    sinks = int(gaps[0]) + 1 if len(gaps) == 1 and int(last[int(gaps[0])]) == int(gaps[0]) else 0
    window = len(last) - sinks
    if window < length:
        yield {"window": [window], "stride": [1], "border": "mask", "causal": [True], "sinks": sinks}
        for stride in (window, window // 2):
            if stride > 1:
                yield {"window": [window], "stride": [stride], "border": "mask", "causal": [True], "sinks": sinks}


def _verified(options: dict[str, Any], groups: Groups, queries: Sizes, keys: Sizes, lenient: bool) -> Pattern | None:
    """The pattern, if with these options the op sees what the groups see, no more and no less."""
    axes = axes_of(len(queries), **options)
    if any(a.window < a.stride or a.stride % a.block for a in axes):
        return None
    at_q, at_k = places(groups.queries, queries), _extended(groups.keys, keys, axes)
    if at_k is None:
        return None
    codes, seen, most = [], torch.ones(()).bool(), torch.ones((), dtype=torch.long)
    for axis, n, m, q, k in zip(axes, queries, keys, at_q, at_k, strict=True):
        table, margin = _codes(axis, n, m)
        count = (table >= 0).sum(1)
        inside = (k + margin).clamp(0, table.shape[1] - 1)
        code = table[q.unsqueeze(2), inside.unsqueeze(1)]  # [W, n, m]
        codes.append(code)
        seen = seen & (code >= 0)
        most = most * count[q]  # [W, n]
    nothing = (groups.keys < 0).unsqueeze(1)
    if axes[0].border != "zero":
        seen = seen & ~nothing
    fits = not bool((seen & ~groups.visible).any()) if lenient else torch.equal(seen, groups.visible)
    if not fits or not torch.equal(seen.sum(2), most) or not _distinct(groups.keys):
        return None
    code = torch.zeros_like(codes[0])
    for axis, c in zip(axes, codes, strict=True):
        code = code * axis.offsets + c.clamp(min=0)
    return Pattern(options, queries, keys, torch.where(seen, code, -1), tuple(torch.where(seen, c, -1) for c in codes))


def _distinct(spot: torch.Tensor) -> bool:
    """Whether no group holds a key twice."""
    ordered = spot.sort(1).values
    return not bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any())


def _codes(axis: Axis, queries: int, keys: int) -> tuple[torch.Tensor, int]:
    """The distance's number for each query and key of an axis, -1 where unseen; keys go `margin` beyond both ends."""
    found = slots(axis, queries, keys, torch.device("cpu"), single=True)
    margin = axis.window * axis.dilation if axis.border == "zero" else 0
    table = torch.full((queries, keys + 2 * margin), -1)
    index, real, seen, offset = found.index, found.real, found.seen[:, 0], found.offset[:, 0]
    if axis.border == "zero":  # slots beyond the ends lie in line with the real ones
        first = real.long().argmax(1, keepdim=True)
        index = index.gather(1, first) + (torch.arange(index.shape[1]) - first) * axis.dilation
    row = torch.arange(queries).view(-1, 1).expand_as(seen)
    inside = seen & (index + margin >= 0) & (index + margin < table.shape[1])
    table[row[inside], (index + margin)[inside]] = offset[inside]
    return table, margin


def _extended(spot: torch.Tensor, sizes: Sizes, axes: Sequence[Axis]) -> list[torch.Tensor] | None:
    """Coordinates of keys; those of zeros lie beyond the map, in line with the real ones of their window."""
    at = places(spot.clamp(min=0), sizes)
    real = spot >= 0
    if bool(real.all()) or axes[0].border != "zero":
        return at
    lengths = [a.window for a in axes]
    if math.prod(lengths) != spot.shape[1]:
        return None
    first = real.long().argmax(1, keepdim=True)
    found, inside = [], torch.ones_like(real)
    for i, axis in enumerate(axes):
        slot = torch.arange(spot.shape[1]) // math.prod(lengths[i + 1 :]) % lengths[i]
        line = at[i].gather(1, first) + (slot - slot[first]) * axis.dilation
        if not bool((line == at[i])[real].all()):
            return None
        inside &= (line >= 0) & (line < sizes[i])
        found.append(line)
    return found if torch.equal(inside, real) else None
