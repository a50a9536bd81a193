"""Cache ops: the laws' cases drawn at random, what must hold of evictions, and rows that go to one slot."""

from __future__ import annotations

import laws
import pytest
import torch
from cache_strategies import CacheSpec, cache_specs
from hypothesis import given, settings
from strategies import Inputs
from torch.utils import _pytree as pytree

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
