"""Which keys a query of local attention sees, as a picture in text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from compiled_attn.ir.errors import OpError
from compiled_attn.ops.local import check_pattern
from compiled_attn.ops.local_geometry import axes_of, slots

QUERY, SEEN, OTHER = "Q", "#", "·"
OP = "local_attention"


def pattern_picture(sizes: Sequence[int], query: Sequence[int] | None = None, **options: Any) -> str:
    """A map of keys, one character each: `#` is seen by the query, `Q` is the query's own place and seen.

    sizes: of the queries' map, one number for a sequence, two for a map.  query: its place; None is the middle.
    options: the op's, window included. A sequence is drawn for every query, one line each, unless `query` is given.
    Raises OpError where the options clash or the query lies beyond the map.
    """
    rank = len(sizes)
    if rank > 2:
        raise OpError(
            f"{OP}: a picture has one or two axes", facts=f"sizes are {list(sizes)}", do="give one or two sizes"
        )
    if min(sizes) < 1:
        raise OpError(f"{OP}: there is no such map", facts=f"sizes are {list(sizes)}", do="give sizes from 1")
    names = ("window", "stride", "dilation", "shift", "block", "border", "causal", "sinks")
    given = {"border": "clamp", "sinks": 0, **options}
    check_pattern(OP, rank, tuple(given.get(name) for name in names))
    if query is not None and (len(query) != rank or any(not 0 <= q < n for q, n in zip(query, sizes, strict=True))):
        raise OpError(
            f"{OP}: query {list(query)} is no place of the map",
            facts=f"the map is {' x '.join(str(n) for n in sizes)}",
            do="give one number from 0 for each axis",
        )
    if rank == 1 and query is None:
        return "\n".join(_one(sizes, (i,), given)[0] for i in range(sizes[0]))
    place = tuple(n // 2 for n in sizes) if query is None else tuple(query)
    picture, count, zeros = _one(sizes, place, given)
    beyond = f", and {zeros} of zeros beyond the border" if zeros else ""
    return f"{picture}\n\nquery {' '.join(str(q) for q in place)} sees {count} keys{beyond}"


def _one(sizes: Sequence[int], query: Sequence[int], options: dict[str, Any]) -> tuple[str, int, int]:
    """The picture of one query, keys seen, and zeros counted beside them."""
    axes = axes_of(len(sizes), **options)
    lines, counted, stands = [], [], []
    for axis, size, place in zip(axes, sizes, query, strict=True):
        keys = axis.keys(size)
        found = slots(axis, size, keys, torch.device("cpu"), single=True)
        seen = found.seen[place, 0]
        line = torch.zeros(keys, dtype=torch.bool)
        line[found.index[place][seen & found.real[place]]] = True
        lines.append(line)
        counted.append(int(seen.sum()))
        stands.append(place if axis.block == axis.stride else place // axis.block * axis.stride + place % axis.block)
    table = lines[0][:, None] & lines[1][None] if len(lines) == 2 else lines[0][None]
    at = stands if len(stands) == 2 else [0, stands[0]]
    rows = []
    for y, row in enumerate(table.tolist()):
        marks = [SEEN if seen else OTHER for seen in row]
        if y == at[0] and table[at[0], at[1]]:
            marks[at[1]] = QUERY
        rows.append(" ".join(marks))
    seen_keys = int(table.sum())
    return "\n".join(rows), seen_keys, math.prod(counted) - seen_keys
