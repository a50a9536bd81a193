"""Calls of decay_attention as specs that shrink and print, and the fixed ones that every law asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DecaySpec:
    """One call. sizes: of the spatial axes."""

    sizes: tuple[int, ...] = (4, 5)
    along: tuple[int, ...] | None = None
    softmax: bool = True
    causal: bool = False
    batch: int = 2
    heads: int = 3
    width: int = 8
    value_width: int = 6
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The op's keyword arguments."""
        along = None if self.along is None else list(self.along)
        return {"scale": 0.3, "along": along, "softmax": self.softmax, "causal": self.causal}

    def make(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v, decay."""
        random = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, *self.sizes, 2, self.heads, self.width)
        q, k = torch.randn(shape, generator=random).to(dtype).unbind(-3)
        v = torch.randn(*shape[:-3], self.heads, self.value_width, generator=random).to(dtype)
        return q, k, v, -torch.rand(self.heads, generator=random).to(dtype)


CASES: dict[str, DecaySpec] = {
    "over all pairs": DecaySpec(),
    "along rows": DecaySpec(along=(1,)),
    "along columns": DecaySpec(along=(0,), value_width=8),
    "retention, causal": DecaySpec(sizes=(9,), softmax=False, causal=True),
    "softmax, causal": DecaySpec(sizes=(9,), causal=True),
    "two of three axes, retention": DecaySpec(sizes=(2, 3, 4), along=(0, 2), softmax=False),
}


def _bad(**changed: Any) -> dict[str, Any]:
    q, k, v, decay = DecaySpec().make(torch.float32)
    return {"q": q, "k": k, "v": v, "decay": decay, **DecaySpec().options, **changed}


BAD: list[tuple[dict[str, Any], str]] = [
    (_bad(q=torch.zeros(2, 9, 8)), "q has 3 dimensions"),
    (_bad(k=torch.zeros(2, 4, 5, 3, 7)), "q and k disagree on the head width"),
    (_bad(v=torch.zeros(2, 4, 6, 3, 6)), "q and v disagree on the size of dimension 2"),
    (_bad(decay=torch.zeros(4)), "decay has the shape"),
    (_bad(along=[2]), "along is"),
    (_bad(causal=True), "it is causal along 2 axes"),
]
