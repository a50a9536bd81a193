"""Specs of slot caches, and the fixed inputs of the ops on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st


@dataclass(frozen=True)
class CacheSpec:
    """A cache of `slots`, `live` of them taken by tokens of the first `past` positions, and `new` tokens behind.

    heads: of queries, `share` to a key head. padded: that many tokens in front of the new ones are none (position -1).
    """

    batch: int = 2
    groups: int = 2
    share: int = 2
    slots: int = 7
    live: int = 5
    past: int = 11
    new: int = 3
    width: int = 8
    value_width: int = 8
    padded: int = 0
    options: dict[str, Any] = field(default_factory=lambda: {"scale": 0.3})
    seed: int = 0

    def positions(self) -> torch.Tensor:
        """[B, G, S]: distinct positions below `past`, in no order, -1 in free slots."""
        random = torch.Generator().manual_seed(self.seed)
        found = torch.full((self.batch, self.groups, self.slots), -1)
        for row in found.flatten(0, 1):
            places = torch.randperm(self.slots, generator=random)[: self.live]
            row[places] = torch.randperm(self.past, generator=random)[: self.live]
        return found

    def queries(self) -> torch.Tensor:
        """[B, T]: positions from `past`; in the first row, `padded` of them are -1."""
        found = (torch.arange(self.new) + self.past).expand(self.batch, -1).clone()
        found[0, : self.padded] = -1
        return found

    def attention(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """q, k, v, positions and queries; free slots and memory beside the tensors hold large numbers, not NaN."""
        random = torch.Generator().manual_seed(self.seed)
        heads = self.groups * self.share

        def laid(first: int, count: int, width: int) -> torch.Tensor:
            wide = torch.full((self.batch, count, first, width + 2), 99.0, dtype=dtype)
            wide[..., 1:-1] = torch.randn(self.batch, count, first, width, generator=random)
            return wide[..., 1:-1].transpose(1, 2)

        return (
            laid(heads, self.new, self.width),
            laid(self.groups, self.slots, self.width),
            laid(self.groups, self.slots, self.value_width),
            self.positions(),
            self.queries(),
        )

    def appending(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """slots [B, G, S, D], rows [B, G, T, D] and where they go [B, G, T], every third row to none."""
        random = torch.Generator().manual_seed(self.seed)
        slots = torch.randn(self.slots, self.batch, self.groups, self.width, generator=random).permute(1, 2, 0, 3)
        rows = torch.randn(self.batch, self.groups, self.new, self.width, generator=random)
        at = torch.full((self.batch, self.groups, self.new), -1)
        for row in at.flatten(0, 1):
            count = min(self.new, self.slots)
            row[:count] = torch.randperm(self.slots, generator=random)[:count]
        at[..., 2::3] = -1
        return slots.to(dtype), rows.to(dtype), at

    def evicting(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
        """positions, priorities from few values with NaN and infinities among them, and a budget of `new` slots."""
        random = torch.Generator().manual_seed(self.seed)
        priority = (torch.rand(self.batch, self.groups, self.slots, generator=random) * 4).round() / 4
        for value in (torch.nan, torch.inf, -torch.inf):
            priority[torch.rand(priority.shape, generator=random) < 0.1] = value
        return self.positions(), priority.to(dtype), self.new


@st.composite
def cache_specs(draw: st.DrawFn, widest: int = 20) -> CacheSpec:
    slots = draw(st.integers(1, 20))
    live = draw(st.integers(0, slots))
    new = draw(st.one_of(st.just(1), st.integers(1, 9)))
    return CacheSpec(
        batch=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 3)),
        share=draw(st.integers(1, 3)),
        slots=slots,
        live=live,
        past=draw(st.integers(max(live, 1), 40)),
        new=new,
        width=draw(st.integers(1, widest)),
        value_width=draw(st.integers(1, widest)),
        padded=draw(st.integers(0, new)),
        options={
            "scale": draw(st.sampled_from([0.1, 1.0])),
            "window": draw(st.sampled_from([0, 0, 3, 12])),
            "tail": draw(st.sampled_from([0, 1, 2])),
        },
        seed=draw(st.integers(0, 99)),
    )


ATTENTION = {
    "chunk": CacheSpec(),
    "one query, one slot free": CacheSpec(new=1, live=6, share=1, value_width=3),
    "padded, window and tail": CacheSpec(padded=2, options={"scale": 0.5, "window": 6, "tail": 2}),
    "empty": CacheSpec(live=0),
}
APPEND = {"one row": CacheSpec(new=1), "several": CacheSpec(new=5), "more than there is room": CacheSpec(new=9)}
EVICT = {
    "one goes": CacheSpec(slots=6, live=6, new=5),
    "half": CacheSpec(slots=12, live=9, past=20, new=4, seed=3),
    "all stay": CacheSpec(slots=6, live=4, new=5, seed=1),
}


def _bad_attention(**changed: Any) -> dict[str, Any]:
    names = ("q", "k", "v", "positions", "queries")
    return {**dict(zip(names, CacheSpec().attention(torch.float32), strict=True)), "scale": 1.0, **changed}


def _bad_append(**changed: Any) -> dict[str, Any]:
    return {**dict(zip(("slots", "rows", "at"), CacheSpec().appending(torch.float32), strict=True)), **changed}


def _bad_evict(**changed: Any) -> dict[str, Any]:
    names = ("positions", "priority", "budget")
    return {**dict(zip(names, CacheSpec().evicting(torch.float32), strict=True)), **changed}


BAD = {
    "cached_attention": [
        (_bad_attention(q=torch.zeros(2, 4, 8)), "q has 3 dimensions"),
        (_bad_attention(q=torch.zeros(2, 3, 3, 8)), "2 key heads can not be shared by 3 query heads"),
        (_bad_attention(k=torch.zeros(2, 2, 7, 4)), "q and k disagree on the head width"),
        (_bad_attention(v=torch.zeros(2, 2, 6, 8)), "k and v disagree on the number of slots"),
        (_bad_attention(k=torch.zeros(2, 2, 7, 8).bfloat16()), "q and k disagree on the element type"),
        (_bad_attention(positions=torch.zeros(2, 1, 7).long()), "k and positions disagree on the number of key heads"),
        (_bad_attention(positions=torch.zeros(2, 2, 7)), "positions holds torch.float32"),
        (_bad_attention(queries=torch.zeros(2, 4).long()), "q and queries disagree on the number of queries"),
        (_bad_attention(window=-1), "a window or tail below zero"),
    ],
    "cache_append": [
        (_bad_append(slots=torch.zeros(2, 2)), "slots has 2 dimensions"),
        (_bad_append(rows=torch.zeros(2, 2, 3)), "rows has 3 dimensions"),
        (_bad_append(rows=torch.zeros(2, 2, 3, 4)), "slots and rows disagree on the head width"),
        (_bad_append(rows=torch.zeros(2, 2, 4, 8)), "rows and at disagree on the number of new tokens"),
        (_bad_append(rows=torch.zeros(2, 2, 3, 8).double()), "slots and rows disagree on the element type"),
        (_bad_append(at=torch.zeros(2, 2, 3)), "at holds torch.float32"),
    ],
    "cache_evict": [
        (_bad_evict(budget=0), "a budget of 0"),
        (_bad_evict(priority=torch.zeros(2, 2, 7).long()), "priority holds torch.int64"),
        (_bad_evict(priority=torch.zeros(2, 2, 6)), "positions and priority disagree on the number of slots"),
        (_bad_evict(positions=torch.zeros(2, 2, 7)), "positions holds torch.float32"),
    ],
}
