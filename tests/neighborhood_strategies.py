"""Calls of neighborhood_apply as specs that shrink and print, and the fixed ones that every law asks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from local_strategies import LocalSpec, local_specs


@dataclass(frozen=True)
class NeighborhoodSpec:
    """One call: a pattern of local attention without causal axes and sinks, and how often each window is mixed."""

    local: LocalSpec
    mixes: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """The op's keyword arguments."""
        return {k: v for k, v in self.local.options.items() if k not in ("causal", "sinks", "scale", "softcap")}

    def make(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """weights, v."""
        spec = self.local
        random = torch.Generator().manual_seed(spec.seed + 1)
        shape = (spec.batch, *spec.queries, spec.heads, self.mixes, math.prod(spec.window))
        weights = torch.full((*shape[:-1], shape[-1] + 2), torch.nan)[..., 1:-1]
        weights.copy_(torch.rand(shape, generator=random))
        return weights.to(dtype), spec.make(dtype)[2]


CASES: dict[str, NeighborhoodSpec] = {
    "outlook attention": NeighborhoodSpec(
        LocalSpec(queries=(3, 4), window=(3, 3), stride=(2, 2), block=(1, 1), border="zero"), mixes=9
    ),
    "dynamic kernel": NeighborhoodSpec(LocalSpec(window=(5, 5), layout="fused")),
    "dilated": NeighborhoodSpec(LocalSpec(queries=(8, 11), dilation=(2, 3), layout="heads outside"), mixes=2),
    "a sequence": NeighborhoodSpec(LocalSpec(queries=(11,), window=(4,), border="mask")),
    "three dimensions": NeighborhoodSpec(LocalSpec(queries=(3, 4, 5), window=(2, 3, 3), value_width=4), mixes=2),
}


def _bad(**changed: Any) -> dict[str, Any]:
    spec = NeighborhoodSpec(LocalSpec())
    weights, v = spec.make(torch.float32)
    return {"weights": weights, "v": v, **spec.options, **changed}


BAD: list[tuple[dict[str, Any], str]] = [
    (_bad(v=torch.zeros(2, 9, 8)), "v has 3 dimensions"),
    (_bad(weights=torch.zeros(2, 9, 7, 2, 9)), "disagree on the number of dimensions"),
    (_bad(weights=torch.zeros(2, 9, 7, 2, 1, 8)), "disagree on the slots of a window"),
    (_bad(v=torch.zeros(2, 9, 7, 3, 8)), "disagree on the number of heads"),
    (_bad(v=torch.zeros(2, 9, 6, 2, 8)), "disagree on the size of spatial axis 1"),
    (_bad(v=torch.zeros(2, 9, 7, 2, 8).bfloat16()), "disagree on the element type"),
    (_bad(border="wrap"), "there is no border 'wrap'"),
]


@st.composite
def neighborhood_specs(draw: st.DrawFn) -> NeighborhoodSpec:
    spec = draw(local_specs().filter(lambda s: not s.sinks and not any(s.causal or ())))
    return NeighborhoodSpec(spec, draw(st.sampled_from([1, 2, 9])))
