"""Which keys a query of local attention sees: every pattern is a product of patterns along one axis.

Along an axis keys fall into `dilation` classes (position modulo dilation) and a query sees its own class only; all that
follows counts inside the class, where query and key t stand at the same place. Queries form blocks of `block`, which
begin at `shift`; a block sees `window` consecutive keys, and from one block to the next the window moves by `stride`:

    block number g = floor((t - shift) / block), its origin o = g * stride + shift
    the window begins at o - (window - stride + 1) // 2, or, where the axis is causal, at o - (window - stride)

    neighborhood        stride 1                 the query's nearest keys; border "clamp" moves the window inside
    dilated             stride 1, dilation d     the same in each class; MaxViT's grid is dilation = size / window
    windows             stride = window          Swin's roll and mask: shift, border "mask" cuts windows
    halo                window = stride + 2 halo HaloNet: border "zero"; strided queries: block < stride
    sliding, causal     stride 1, causal         keys t - window + 1 to t

Border: "clamp" moves the window inside; "mask" drops keys beyond the ends; "zero" counts them as keys and values of
zeros. A clamped window wider than its class sees the whole class; causal axes drop instead of clamping.

Letters: L queries along the axis, w keys in a window, G blocks, b queries in a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
BORDERS = ("clamp", "mask", "zero")


@dataclass(frozen=True)
class Axis:
    """The pattern along one axis; `sinks` first keys are seen by every query besides."""

    window: int
    stride: int = 1
    block: int = 1
    dilation: int = 1
    shift: int = 0
    border: str = "clamp"
    causal: bool = False
    sinks: int = 0

    @property
    def before(self) -> int:
        """Keys of the window in front of the block's origin."""
        return self.window - self.stride if self.causal else (self.window - self.stride + 1) // 2

    @property
    def clamps(self) -> bool:
        return self.border == "clamp" and not self.causal

    @property
    def offsets(self) -> int:
        """How many distances a bias table holds: key - query from -(window - 1) to window - 1."""
        return 2 * self.window - 1

    @property
    def together(self) -> int:
        """Queries that share one window and can be computed as a block."""
        return self.block if self.dilation == 1 else 1

    def blocks(self, queries: Any) -> Any:
        """Blocks of `together` queries that cover an axis of `queries`."""
        if self.together == 1:
            return queries
        return (queries - self.shift + self.block - 1) // self.block + int(self.shift > 0)

    @property
    def lead(self) -> int:
        """Places of the first block in front of query 0."""
        return self.block - self.shift if self.together > 1 and self.shift > 0 else 0

    def keys(self, queries: Any) -> Any:
        """Keys that go with `queries`: the same number, or `stride` for each block where blocks are smaller."""
        return queries if self.block == self.stride else queries // self.block * self.stride


def axes_of(
    rank: int,
    window: Sequence[int],
    stride: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    shift: Sequence[int] | None = None,
    block: Sequence[int] | None = None,
    border: str = "clamp",
    causal: Sequence[bool] | None = None,
    sinks: int = 0,
) -> tuple[Axis, ...]:
    """The pattern's axes; what is None is 1, 0 or False, and blocks are as long as strides."""
    stride = stride or [1] * rank
    rows = zip(
        window,
        stride,
        block or stride,
        dilation or [1] * rank,
        shift or [0] * rank,
        causal or [False] * rank,
        strict=True,
    )
    return tuple(Axis(w, s, b, d, o, border, c, sinks) for w, s, b, d, o, c in rows)


@dataclass(frozen=True)
class Slots:
    """What the slots of windows hold. With sinks, the first `sinks` slots are theirs.

    index [G, w]: position of the key (some position where there is none).  real [G, w]: whether there is a key.
    seen [G, b, w]: whether the query counts it.  offset [G, b, w]: key - query + window - 1, inside the class.
    tabled [w]: whether a bias belongs to the slot (sinks take none).
    """

    index: Tensor
    real: Tensor
    seen: Tensor
    offset: Tensor
    tabled: Tensor


def slots(axis: Axis, queries: Any, keys: Any, device: torch.device, *, single: bool = False) -> Slots:
    """The slots of every block along an axis of `queries` and `keys`; with `single`, of every query (b = 1)."""
    w, d = axis.window, axis.dilation
    together = 1 if single else axis.together
    if together == 1:
        query = torch.arange(queries, device=device).view(-1, 1)  # [L, 1]
        residue, place = query % d, query // d
        block = torch.div(place - axis.shift, axis.block, rounding_mode="floor")
    else:
        count = axis.blocks(queries)
        block = torch.arange(count, device=device).view(-1, 1) - int(axis.shift > 0)
        inside = torch.arange(axis.block, device=device).view(1, -1)
        place = block * axis.block + axis.shift + inside  # [G, b]
        residue = torch.zeros_like(block)
    size = (keys - residue + d - 1) // d  # [G, 1], keys in the class
    origin = block * axis.stride + axis.shift
    start = origin - axis.before
    if axis.clamps:
        start = torch.minimum(start, size - w).clamp(min=0)
    slot = torch.arange(-axis.sinks, w, device=device).view(1, -1)  # the sinks' are below 0
    at = start + slot  # [G, w]
    real = (at >= 0) & (at < size)
    counted = torch.ones_like(real) if axis.border == "zero" else real
    stand = origin + place - axis.shift - block * axis.block  # [G, b]: the query among the keys
    seen = counted.unsqueeze(1).expand(-1, place.shape[1], -1)
    if axis.causal:
        seen = seen & (at.unsqueeze(1) <= stand.unsqueeze(2))
    offset = at.unsqueeze(1) - stand.unsqueeze(2) + (w - 1)
    index = (residue + at * d).clamp(min=0).clamp(max=keys - 1)
    found = Slots(index, real, seen, offset.clamp(0, 2 * w - 2), (slot >= 0).view(-1))
    return _with_sinks(axis, found, keys, stand, start, slot + axis.sinks) if axis.sinks else found


def _with_sinks(axis: Axis, found: Slots, keys: Any, stand: Tensor, start: Tensor, sink: Tensor) -> Slots:
    """The first keys, in the slots before the window's; what the window sees is no sink. sink [1, w]: a slot's key."""
    real = (sink < keys) & ((sink < start) | (sink >= start + axis.window))
    seen = real.unsqueeze(1).expand_as(found.seen)
    if axis.causal:
        seen = seen & (sink.unsqueeze(1) <= stand.unsqueeze(2))
    window = found.tabled
    return Slots(
        torch.where(window, found.index, sink.clamp(max=keys - 1)),
        torch.where(window, found.real, real),
        torch.where(window, found.seen, seen),
        torch.where(window, found.offset, 0),
        window,
    )
