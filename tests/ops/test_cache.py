"""Cache ops: the laws' cases drawn at random, what must hold of evictions, and rows that go to one slot."""

from __future__ import annotations

from dataclasses import replace

import cpp_library
import laws
import pytest
import torch
from cache_strategies import CacheSpec, cache_specs
from hypothesis import given, settings
from strategies import Inputs
from torch.utils import _pytree as pytree

import compiled_attn as ca
from compiled_attn.ir.errors import OpError
from compiled_attn.ops.cache import cache_append, cache_evict, cached_attention


@settings(max_examples=40, deadline=None)
@given(cache_specs())
def test_drawn_caches_decompose_to_their_reference(spec: CacheSpec) -> None:
    for op, make, options in (
        (cache_append, spec.appending, {}),
        (cache_evict, spec.evicting, {}),
        (cached_attention, spec.attention, spec.options),
    ):
        args = make(torch.float64)
        found, wanted = op.decomposition(*args, **options), op.reference(*args, **options)
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
            laws.near(a, b, 1e-12)


@settings(max_examples=15, deadline=None)
@given(cache_specs())
def test_the_gradient_of_a_drawn_cache_is_that_of_the_equation(spec: CacheSpec) -> None:
    laws.gradient_equals_autograd_of_the_reference(cached_attention, Inputs("drawn", spec.attention, spec.options))


@settings(max_examples=40, deadline=None)
@given(cache_specs())
def test_an_eviction_keeps_the_budget_and_no_freed_slot_outranks_a_kept_one(spec: CacheSpec) -> None:
    positions, priority, budget = spec.evicting(torch.float32)
    kept = cache_evict(positions, priority, budget)
    assert ((kept == positions) | (kept == -1)).all()
    assert torch.equal((kept >= 0).sum(2), (positions >= 0).sum(2).clamp(max=budget))
    known = priority.masked_fill(priority.isnan(), float("-inf"))
    lowest = known.masked_fill(kept < 0, torch.inf).amin(2)
    gone = known.masked_fill((positions < 0) | (kept >= 0), -torch.inf).amax(2)
    assert (gone <= lowest).all()


def test_attention_over_slots_in_any_order_is_causal_attention_over_the_text() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 9, 4, dtype=torch.float64) for h in (4, 2, 2))
    order = torch.randperm(9)
    out, mass = cached_attention(
        q, k[:, :, order], v[:, :, order], order.expand(1, 2, 9), torch.arange(9)[None], scale=0.5
    )
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    laws.near(out, whole, 1e-12)
    laws.near(mass.sum(2), torch.full((1, 2), 18.0, dtype=torch.float64), 1e-12)


def test_two_rows_for_one_slot_are_refused() -> None:
    slots, rows, at = CacheSpec(new=2).appending(torch.float32)
    with pytest.raises(OpError, match="two rows go to one slot"):
        cache_append(slots, rows, torch.zeros_like(at))
    with pytest.raises(OpError, match="one to none there is"):
        cache_append(slots, rows, at + 99)


@pytest.mark.parametrize("variant", cpp_library.VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpp_kernel_equals_the_reference_on_drawn_caches(variant: cpp_library.Variant, dtype: torch.dtype) -> None:
    if not cpp_library.runnable(variant):
        pytest.skip(f"this machine does not run {variant.name}")

    @settings(max_examples=60, deadline=None)
    @given(cache_specs(widest=90))
    def check(spec: CacheSpec) -> None:
        kernel_equals_reference(variant, spec, dtype)

    check()


@pytest.mark.parametrize("variant", cpp_library.VARIANTS, ids=lambda v: v.name)
def test_many_slots_of_few_heads_are_shared_out_among_the_threads(variant: cpp_library.Variant) -> None:
    if not cpp_library.runnable(variant):
        pytest.skip(f"this machine does not run {variant.name}")
    few = CacheSpec(batch=1, groups=1, share=3, slots=1300, past=1400, new=1, width=24, value_width=33)
    for live in (0, 1, 500, 1300):
        kernel_equals_reference(variant, replace(few, live=live), torch.float32)
    kernel_equals_reference(variant, replace(few, live=700, batch=2, padded=1), torch.float32)
    kernel_equals_reference(variant, replace(few, live=700, groups=2, share=1), torch.bfloat16)
    windowed = {"scale": 1.0, "window": 300, "tail": 1}
    kernel_equals_reference(variant, replace(few, live=800, options=windowed), torch.float32)


def kernel_equals_reference(variant: cpp_library.Variant, spec: CacheSpec, dtype: torch.dtype) -> None:
    args = spec.attention(dtype)
    wanted, mass_wanted = cached_attention.reference(*args, **spec.options)
    out, mass = torch.full_like(wanted, torch.nan), torch.full_like(mass_wanted, torch.nan)
    cpp_library.cached_attention(variant, *args, out, mass, **spec.options)
    laws.near(out, wanted, laws.ROUNDING[dtype])
    laws.near(mass, mass_wanted, 1e-5)


class Decode(torch.nn.Module):
    """A decode step over a cache that it writes into, with pointwise work on both sides of the attention."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, queries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ops = torch.ops.compiled_attn
        at = positions.argmin(2, keepdim=True)
        k.copy_(ops.cache_append(k, q[:, : k.shape[1]] + 1, at))
        positions.copy_(ops.cache_append(positions, queries.unsqueeze(1).expand(-1, k.shape[1], -1), at))
        out, mass = ops.cached_attention(torch.tanh(q), k, v, positions, queries, scale=0.3)
        positions.copy_(ops.cache_evict(positions, mass, positions.shape[2] - 1))
        return torch.relu(out), mass * 2


def test_a_decode_step_is_compiled_into_the_template_and_writes_its_state() -> None:
    spec = CacheSpec(batch=2, groups=2, share=3, slots=21, live=20, past=40, new=1, width=24, value_width=40)
    net = Decode()
    args = tuple(t.contiguous() for t in spec.attention(torch.float32))
    fast = ca.compile(net, "cpu", example_inputs=args, dynamic_shapes=tuple({0: "batch"} for _ in args))
    assert "cpp_cached_attention" in fast.builds[0].templates
    for batch in (1, 4):
        mine, theirs = (
            tuple(t.contiguous() for t in replace(spec, batch=batch).attention(torch.float32)) for _ in range(2)
        )
        for found, wanted in zip(fast(*mine), net(*theirs), strict=True):
            laws.near(found, wanted, 1e-5)
        for found, wanted in zip(mine, theirs, strict=True):
            laws.near(found, wanted, 1e-6)
        assert bool(((mine[3] >= 0).sum(2) == 20).all())
