"""The C++ kernels of local attention, for every instruction set that runs here, against the equation in float64."""

from __future__ import annotations

import cpp_library
import pytest
import torch
from hypothesis import example, given
from laws import near
from local_strategies import CASES, LocalSpec, local_specs

from compiled_attn.ops import local_attention

# Relative to the largest value: rounding of float32 sums, and of bfloat16 probabilities and results (8 bits).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

variants = pytest.mark.parametrize("variant", cpp_library.VARIANTS, ids=lambda v: v.name)


@variants
@given(spec=local_specs())
@example(spec=CASES["sliding and causal, with sinks"])
@example(spec=CASES["sliding and capped"])
@example(spec=CASES["three dimensions, causal in time"])
@example(spec=CASES["halo, strided queries"])
@example(spec=LocalSpec(queries=(56, 56), window=(7, 7), width=32, value_width=32, bias=True, layout="fused"))
@example(spec=LocalSpec(queries=(30, 61), window=(7, 7), dilation=(4, 8), width=32, bias=True, dtype=torch.bfloat16))
@example(spec=LocalSpec(queries=(21, 28), window=(7, 7), stride=(7, 7), shift=(3, 3), border="mask", bias=True))
def test_it_equals_the_equation_and_writes_nothing_beside(variant, spec):
    if not cpp_library.runnable(variant):
        pytest.skip(f"this CPU lacks {sorted(variant.needs)}")
    q, k, v, bias, relative = spec.tensors()
    room = torch.full((*q.shape[:-1], spec.value_width + 2), torch.nan, dtype=spec.dtype)
    cpp_library.local_attention(variant, q, k, v, bias, relative, room[..., 1:-1], spec.axes, spec.scale, spec.softcap)
    wide = [None if t is None else t.double() for t in (q, k, v, bias, relative)]
    wanted = local_attention.reference(*wide, **spec.options)
    assert room[..., 0].isnan().all() and room[..., -1].isnan().all()
    near(room[..., 1:-1], wanted, TOLERANCE[spec.dtype] * max(1.0, spec.scale * spec.width**0.5))
