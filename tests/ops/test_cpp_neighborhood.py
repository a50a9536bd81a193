"""The C++ kernel of neighborhood_apply, for every instruction set that runs here, against the equation in float64."""

from __future__ import annotations

from dataclasses import replace

import cpp_library
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from laws import near
from local_strategies import LocalSpec
from neighborhood_strategies import CASES, NeighborhoodSpec, neighborhood_specs

from compiled_attn.ops import neighborhood_apply

# Relative to the largest value: rounding of float32 sums, and of bfloat16 results (8 bits).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
OUTLOOK = {"stride": (2, 2), "block": (1, 1), "border": "zero"}
ORDERS = ("dense", "places last", "batch last")  # of a tensor in memory: which of its dimensions is dense

variants = pytest.mark.parametrize("variant", cpp_library.VARIANTS, ids=lambda v: v.name)


def stored(x: torch.Tensor, order: str, spatial: int) -> torch.Tensor:
    """The same tensor with another dimension dense in memory; `spatial`: that of its last spatial axis."""
    last = {"dense": -1, "places last": spatial, "batch last": 0}[order]
    return x if last == -1 else x.transpose(last, -1).contiguous().transpose(last, -1)


@variants
@given(
    spec=neighborhood_specs(),
    mixes=st.sampled_from([1, 2, 3, 5, 9, 11]),
    weights_order=st.sampled_from(ORDERS),
    v_order=st.sampled_from(ORDERS),
)
@example(CASES["outlook attention"], 9, "dense", "dense")
@example(NeighborhoodSpec(LocalSpec((14, 14), (3, 3), heads=3, value_width=32, **OUTLOOK)), 9, "dense", "dense")
@example(NeighborhoodSpec(LocalSpec((9, 19), (7, 5), value_width=33)), 1, "places last", "places last")
@example(NeighborhoodSpec(LocalSpec((2, 3), (5, 7), value_width=16)), 1, "dense", "places last")
@example(NeighborhoodSpec(LocalSpec((30, 40), (5, 5), dilation=(3, 4), value_width=80)), 2, "dense", "dense")
@example(NeighborhoodSpec(LocalSpec((6, 7, 8), (3, 3, 3), value_width=20, dtype=torch.bfloat16)), 1, "dense", "dense")
def test_it_equals_the_equation_and_writes_nothing_beside(variant, spec, mixes, weights_order, v_order):
    if not cpp_library.runnable(variant):
        pytest.skip(f"this CPU lacks {sorted(variant.needs)}")
    weights, v = replace(spec, mixes=mixes).make(spec.local.dtype)
    weights, v = stored(weights, weights_order, -4), stored(v, v_order, -3)
    room = torch.full((*weights.shape[:-1], v.shape[-1] + 2), torch.nan, dtype=v.dtype)
    cpp_library.neighborhood_apply(variant, weights, v, room[..., 1:-1], spec.local.axes)
    wanted = neighborhood_apply.reference(weights.double(), v.double(), **spec.options)
    assert room[..., 0].isnan().all() and room[..., -1].isnan().all()
    near(room[..., 1:-1], wanted, TOLERANCE[v.dtype])
