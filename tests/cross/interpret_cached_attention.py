"""Law, run under TRITON_INTERPRET=1: the Triton decode attention equals the equation, outputs NaN-filled first."""

import pytest
import torch
from cache_strategies import CacheSpec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compiled_attn.ops.cache import cached_attention
from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime import launch_cached

torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
# absolute, on values of about unit variance; the 16-bit types round probabilities and the output once each
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
EXAMPLES = settings().max_examples // 4  # a program costs about 5 ms here

SPECS = st.builds(
    CacheSpec,
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    share=st.sampled_from((1, 3, 4)),
    slots=st.sampled_from((1, 15, 16, 40, 70)),
    live=st.just(0),
    past=st.just(90),
    new=st.just(1),
    width=st.sampled_from((1, 7, 16, 24, 64)),
    value_width=st.sampled_from((1, 16, 24, 33)),
    padded=st.integers(0, 1),
    options=st.fixed_dictionaries({"scale": st.sampled_from((0.1, 0.5)), "window": st.sampled_from((0, 30))}),
    seed=st.integers(0, 99),
)


def run(spec, share_of_slots, dtype, block=16):
    """(found, equation in float64) of a spec with that share of its slots taken."""
    spec = CacheSpec(**{**vars(spec), "live": int(spec.slots * share_of_slots)})
    q, k, v, positions, queries = spec.attention(dtype)
    split = Config((("BLOCK_H", 16), ("BLOCK_S", block), ("PRECISION", "ieee")), 4, 2)
    combine = Config((("BLOCK_S", 32),), 4, 1)
    found = launch_cached.cached_attention(q, k, v, positions, queries, **spec.options, split=split, combine=combine)
    return found, cached_attention.reference(q.double(), k.double(), v.double(), positions, queries, **spec.options)


def holds(found, expected, dtype):
    out, mass = found
    assert out.dtype == dtype and mass.dtype == torch.float32 and out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out.double(), expected[0], rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(mass.double(), expected[1], rtol=0, atol=TOLERANCE[dtype])


@settings(max_examples=EXAMPLES)
@given(SPECS, st.sampled_from((0.0, 0.3, 1.0)), st.sampled_from(tuple(TOLERANCE)))
@example(CacheSpec(new=1, slots=70, past=90), 1.0, torch.bfloat16)
@example(CacheSpec(new=1, slots=40, past=90, padded=1), 0.3, torch.float32)
@example(CacheSpec(new=1, slots=16, past=90), 0.0, torch.float16)
def test_the_kernels_equal_the_equation(spec, taken, dtype):
    holds(*run(spec, taken, dtype), dtype)


@pytest.mark.parametrize("width", [100, 256])
def test_any_head_width_up_to_256_is_padded(width):
    spec = CacheSpec(batch=1, groups=1, new=1, slots=33, past=90, width=width, value_width=width)
    holds(*run(spec, 1.0, torch.float32), torch.float32)


def test_more_slots_than_sixteen_blocks_are_walked_through_by_each_part():
    spec = CacheSpec(batch=1, groups=1, share=2, new=1, slots=600, past=700, width=16, value_width=16)
    holds(*run(spec, 0.9, torch.float32), torch.float32)
