"""Specs of ragged batches, and the fixed inputs of the ops on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

Cases = dict[str, Any]


@dataclass(frozen=True)
class RaggedSpec:
    """Sequences of `queries` and `keys` tokens each (the same where keys is None), `heads` of `width`."""

    queries: tuple[int, ...] = (3, 1, 5)
    keys: tuple[int, ...] | None = None
    heads: int = 2
    width: int = 8
    value_width: int = 8
    options: dict[str, Any] = field(default_factory=lambda: {"scale": 0.3})
    seed: int = 0

    def make(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """q [T, H, D], k [S, H, D], v [S, H, Dv] in the memory of one map, and both offsets."""
        random = torch.Generator().manual_seed(self.seed)
        keys = self.queries if self.keys is None else self.keys

        def rows(lengths: tuple[int, ...], width: int) -> torch.Tensor:
            wide = torch.full((sum(lengths), 3, self.heads, width), torch.nan, dtype=dtype)
            return wide[:, 1].copy_(torch.randn(sum(lengths), self.heads, width, generator=random))

        q, k, v = rows(self.queries, self.width), rows(keys, self.width), rows(keys, self.value_width)
        return q, k, v, offsets(self.queries), offsets(keys)

    @property
    def longest(self) -> int:
        return max((*self.queries, *(self.keys or ())))


def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@dataclass(frozen=True)
class PackSpec:
    """Sequences padded to `count` tokens, of which `share` is kept."""

    batch: int = 3
    count: int = 6
    channels: int = 5
    share: float = 0.5
    seed: int = 0

    def tensors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, N, C], which is no contiguous memory, and keep [B, N]."""
        random = torch.Generator().manual_seed(self.seed)
        wide = torch.full((self.count, self.batch, self.channels + 2), torch.nan, dtype=dtype)
        x = wide[:, :, 1:-1].transpose(0, 1).copy_(torch.randn(self.batch, self.count, self.channels, generator=random))
        return x, torch.rand(self.batch, self.count, generator=random) < self.share

    def packed(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packed tokens [T, C], their places [T], and a canvas [B, N, C]."""
        x, keep = self.tensors(dtype)
        return x[keep] + 1, keep.flatten().nonzero().squeeze(1), x


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)


@st.composite
def ragged_specs(draw: st.DrawFn) -> RaggedSpec:
    queries = draw(LENGTHS)
    others = st.lists(st.integers(0, 9), min_size=len(queries), max_size=len(queries)).map(tuple)
    return RaggedSpec(
        queries=queries,
        keys=draw(st.one_of(st.none(), others)),
        heads=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 20)),
        value_width=draw(st.integers(1, 20)),
        options={"scale": draw(st.sampled_from([0.1, 1.0])), "causal": draw(st.booleans())},
        seed=draw(st.integers(0, 99)),
    )


ATTENTION = {
    "three sequences": RaggedSpec(),
    "causal, one empty": RaggedSpec((4, 0, 2), options={"scale": 0.5, "causal": True}),
    "other keys, none for one": RaggedSpec((2, 3, 1), (5, 0, 4), value_width=3),
    "padded to a bound": RaggedSpec((2, 0, 4), (5, 1, 0), value_width=3, options={"scale": 0.4, "longest": 6}),
    "padded and causal": RaggedSpec((2, 0, 4), options={"scale": 0.4, "causal": True, "longest": 4}),
}
PACK = {"half": PackSpec(), "few": PackSpec(batch=2, share=0.2, seed=3), "all": PackSpec(share=1.0)}


def _bad_ragged(**changed: Any) -> dict[str, Any]:
    q, k, v, q_offsets, k_offsets = RaggedSpec().make(torch.float32)
    return {"q": q, "k": k, "v": v, "q_offsets": q_offsets, "k_offsets": k_offsets, "scale": 1.0, **changed}


def _bad_pack(**changed: Any) -> dict[str, Any]:
    x, keep = PackSpec().tensors(torch.float32)
    return {"x": x, "keep": keep, **changed}


def _bad_unpack(**changed: Any) -> dict[str, Any]:
    tokens, place, canvas = PackSpec().packed(torch.float32)
    return {"tokens": tokens, "place": place, "canvas": canvas, **changed}


BAD = {
    "ragged_attention": [
        (_bad_ragged(q=torch.zeros(9, 16)), "q has 2 dimensions"),
        (_bad_ragged(k=torch.zeros(9, 2, 4)), "q and k disagree on the head width"),
        (_bad_ragged(v=torch.zeros(8, 2, 8)), "k and v disagree on the number of keys"),
        (_bad_ragged(v=torch.zeros(9, 3, 8)), "q and v disagree on the number of heads"),
        (_bad_ragged(k=torch.zeros(9, 2, 8).bfloat16()), "q and k disagree on the element type"),
        (_bad_ragged(k_offsets=torch.tensor([0, 9])), "q_offsets and k_offsets disagree on the number of sequences"),
        (_bad_ragged(q_offsets=torch.tensor([0, 3, 4, 9]).int()), "q_offsets holds torch.int32"),
    ],
    "pack_tokens": [
        (_bad_pack(x=torch.zeros(3, 6)), "x has 2 dimensions"),
        (_bad_pack(keep=torch.zeros(3, 5, dtype=torch.bool)), "x and keep disagree on the number of tokens"),
        (_bad_pack(keep=torch.zeros(2, 6, dtype=torch.bool)), "x and keep disagree on the batch size"),
        (_bad_pack(keep=torch.zeros(3, 6)), "keep holds torch.float32"),
        (_bad_pack(x=torch.zeros(3, 6, 5).long()), "x holds torch.int64"),
    ],
    "unpack_tokens": [
        (_bad_unpack(tokens=torch.zeros(1, 2, 5)), "tokens has 3 dimensions"),
        (_bad_unpack(place=torch.zeros(99).long()), "tokens and place disagree on the number of packed tokens"),
        (_bad_unpack(canvas=torch.zeros(3, 6, 4)), "tokens and canvas disagree on the number of channels"),
        (_bad_unpack(canvas=torch.zeros(3, 6, 5).double()), "tokens and canvas disagree on the element type"),
        (_bad_unpack(place=_bad_unpack()["place"].int()), "place holds torch.int32"),
    ],
}
