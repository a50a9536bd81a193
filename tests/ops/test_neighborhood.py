"""neighborhood_apply beside other ways to say the same."""

from __future__ import annotations

import laws
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from neighborhood_strategies import CASES, NeighborhoodSpec, neighborhood_specs

from compiled_attn import ops

few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


@few
@given(neighborhood_specs())
def test_the_decomposition_equals_the_equation_for_any_pattern(spec: NeighborhoodSpec) -> None:
    weights, v = spec.make(torch.float32)
    found = ops.neighborhood_apply.decomposition(weights, v, **spec.options)
    laws.near(found, ops.neighborhood_apply.reference(weights, v, **spec.options), 5e-6)


@few
@given(neighborhood_specs())
def test_with_the_probabilities_of_local_attention_it_gives_local_attention(spec: NeighborhoodSpec) -> None:
    """Queries and keys of zeros: every seen slot weighs the same, and keys beyond a zero border count."""
    local = spec.local
    v = spec.make(torch.float64)[1]
    q = torch.zeros(local.batch, *local.queries, local.heads, 4, dtype=torch.float64)
    k = torch.zeros(*v.shape[:-1], 4, dtype=torch.float64)
    wanted = ops.local_attention.reference(q, k, v, **local.options)
    ones = torch.ones(local.batch, *local.queries, local.heads, 1, spec.make(torch.float64)[0].shape[-1])
    sums = ops.neighborhood_apply.reference(ones.double(), v, **spec.options)
    counts = ops.neighborhood_apply.reference(ones.double(), torch.ones_like(v), **spec.options)
    seen = ones.shape[-1] if local.border == "zero" else counts.clamp(min=1)
    laws.near((sums / seen).squeeze(-2), wanted, 1e-12)


def test_one_window_around_every_second_pixel_is_what_unfold_cuts_out() -> None:
    torch.manual_seed(0)
    weights, v = torch.randn(2, 3, 4, 2, 9, 9), torch.randn(2, 6, 8, 2, 5)
    cut = F.unfold(v.flatten(3).permute(0, 3, 1, 2), 3, padding=1, stride=2)  # [B, C * 9, y * x]
    cut = cut.view(2, 2, 5, 9, 3, 4).permute(0, 4, 5, 1, 3, 2)  # [B, y, x, H, 9, D]
    found = ops.neighborhood_apply(weights, v, window=[3, 3], stride=[2, 2], block=[1, 1], border="zero")
    laws.near(found, weights @ cut, 5e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    spec = CASES[name]
    args = tuple(a.detach().contiguous().requires_grad_() for a in spec.make(torch.float64))
    assert torch.autograd.gradcheck(lambda *a: ops.neighborhood_apply(*a, **spec.options), args, fast_mode=True)
