"""How windows are cut out of a map, found from the places of their tokens, and which pairs of tokens they join."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compiled_attn.ops.local_geometry import axes_of, slots


@dataclass(frozen=True)
class Windows:
    """The pattern's options for the op, and each window's place in a picture, [windows, tokens]."""

    options: dict[str, Any]
    place: torch.Tensor


def windows_of(place: torch.Tensor, batch: int, rows: int, columns: int) -> Windows | str:
    """The windows' pattern from the tokens' places in a picture."""
    cut = place.shape[0] // batch
    one = place[:cut]
    offset = torch.arange(batch).view(-1, 1, 1) * (rows * columns)
    if not torch.equal(place, (one.unsqueeze(0) + offset).flatten(0, 1)):
        return "its windows of one picture do not follow each other"
    if one.numel() != rows * columns or not torch.equal(one.flatten().sort().values, torch.arange(rows * columns)):
        return f"its {cut} windows of {one.shape[1]} tokens do not cover the map of {rows} x {columns} once"
    y, x = one // columns, one % columns
    for first in range(cut):  # a window that no border cuts shows the sizes
        dy, dx = y[first] - y[first, 0], x[first] - x[first, 0]
        size = (len(dy.unique()), len(dx.unique()))
        step = (int(dy.max()) // max(1, size[0] - 1) or 1, int(dx.max()) // max(1, size[1] - 1) or 1)
        grid = (torch.arange(size[0]) * step[0]).view(-1, 1), (torch.arange(size[1]) * step[1]).view(1, -1)
        if size[0] * size[1] != one.shape[1]:
            continue
        if torch.equal(dy, grid[0].expand(size).flatten()) and torch.equal(dx, grid[1].expand(size).flatten()):
            return Windows(options_of(size, step, (int(y[first, 0]), int(x[first, 0])), (rows, columns)), one)
    return "its windows are no rectangles of the map"


def options_of(
    size: tuple[int, int], step: tuple[int, int], corner: tuple[int, int], map_size: tuple[int, int]
) -> dict[str, Any]:
    """Windows, or where tokens lie apart the classes of a dilated neighborhood that is as wide as they are."""
    apart = [s > 1 and s * n == length for s, n, length in zip(step, size, map_size, strict=True)]
    return {
        "window": list(size),
        "stride": [1 if a else n for a, n in zip(apart, size, strict=True)],
        "dilation": [s if a else 1 for a, s in zip(apart, step, strict=True)],
        "shift": [0 if a else c % n for a, c, n in zip(apart, corner, size, strict=True)],
        "border": "clamp" if any(apart) else "mask",
    }


def distances(windows: Windows, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether token m of a window is seen by token n, and its place in a table of distances; both [cut, n, m]."""
    y, x = windows.place // columns, windows.place % columns
    axes = axes_of(2, **windows.options)
    seen, at = torch.ones(()).bool(), torch.zeros((), dtype=torch.long)
    for axis, length, place in zip(axes, (rows, columns), (y, x), strict=True):
        found = slots(axis, length, length, place.device, single=True)
        table = torch.full((length, length), -1)
        counted = found.seen[:, 0]
        query = torch.arange(length).view(-1, 1).expand_as(counted)
        table[query[counted], found.index[counted]] = found.offset[:, 0][counted]
        code = table[place.unsqueeze(2), place.unsqueeze(1)]
        seen = seen & (code >= 0)
        at = at * axis.offsets + code.clamp(min=0)
    return seen, at
