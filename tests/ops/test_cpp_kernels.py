"""Every C++ kernel, for every instruction set that runs here, against float64 arithmetic on drawn calls."""

from __future__ import annotations

import dataclasses

import cpp_library
import pytest
import torch
from hypothesis import example, given
from strategies import AttentionSpec, SelectSpec, attention_specs, laid_out, select_specs

from compiled_attn.ops.attention import probabilities
from compiled_attn.ops.tokens import places

# Relative to the largest value: rounding of float32 sums, and of bfloat16 probabilities and results (8 bits).
TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 1.5e-2}

variants = pytest.mark.parametrize("variant", cpp_library.VARIANTS, ids=lambda v: v.name)


@pytest.fixture(autouse=True)
def skip_what_does_not_run_here(request):
    variant = request.node.callspec.params.get("variant")
    if variant is not None and not cpp_library.runnable(variant):
        pytest.skip(f"this CPU lacks {sorted(variant.needs)}")


@variants
def test_a_variant_is_compiled_for_what_it_names(variant):
    library = cpp_library.library(variant)
    assert library.lanes() == variant.lanes
    assert bool(library.multiplies_bf16()) == variant.bf16


@variants
@given(spec=attention_specs())
@example(spec=AttentionSpec(queries=1, keys=1, width=1, value_width=1))
@example(spec=AttentionSpec(queries=197, keys=197, width=64, value_width=64, heads=3))
@example(spec=AttentionSpec(queries=197, keys=197, width=64, value_width=64, dtype=torch.bfloat16))
@example(spec=AttentionSpec(queries=3, keys=300, width=33, value_width=7, bias="blind", dtype=torch.bfloat16))
@example(spec=AttentionSpec(queries=70, keys=300, causal=True, bias="full"))
@example(spec=AttentionSpec(queries=300, keys=20, causal=True, dtype=torch.bfloat16))
@example(spec=AttentionSpec(queries=70, keys=300, bias="masked", scale=1.0, softcap=0.5))
def test_attention_equals_float64_and_writes_nothing_beside(variant, spec):
    q, k, v, bias = spec.tensors()
    room = torch.full((spec.batch, spec.queries, spec.heads, spec.value_width + 2), torch.nan, dtype=spec.dtype)
    out = room[..., 1:-1].transpose(1, 2)
    cpp_library.attention(variant, q, k, v, bias, out, scale=spec.scale, causal=spec.causal, softcap=spec.softcap)
    wide = (q.double(), k.double(), _double(bias))
    wanted = probabilities(*wide, spec.scale, spec.causal, spec.softcap) @ v.double()
    assert room[..., 0].isnan().all() and room[..., -1].isnan().all()
    _close(out, wanted, v, spec.dtype, max(1.0, _logit(spec, q, k)))


@variants
@given(spec=attention_specs())
@example(spec=AttentionSpec(bias="blind", queries=1))
@example(spec=AttentionSpec(keys=1, width=1))
def test_the_class_row_equals_float64(variant, spec):
    q, k, _, bias = spec.tensors()
    row = torch.full((spec.batch, spec.keys), torch.nan)
    at = spec.seed % spec.queries
    cpp_library.class_row(variant, q, k, bias, row, scale=spec.scale, at=at)
    wanted = probabilities(q.double(), k.double(), _double(bias), spec.scale, causal=False)[:, :, at].mean(1)
    assert (row - wanted).abs().max() <= 6e-6 + 1e-6 * _logit(spec, q, k)


@variants
@given(spec=select_specs())
@example(spec=SelectSpec(keep=0, prefix=0))
@example(spec=SelectSpec(keep=9, fuse=True))
@example(spec=SelectSpec(batch=1, scored=196, channels=384, keep=138, fuse=True))
@example(spec=SelectSpec(scored=30, keep=20, scores="odd", fuse=True, dtype=torch.bfloat16))
def test_selection_is_exact_in_order_ties_and_nan_and_fuses_in_float32(variant, spec):
    x, score = spec.tensors()
    count = spec.prefix + spec.keep + int(spec.fuse)
    tokens = torch.full((spec.batch, count, spec.channels), 77.0, dtype=spec.dtype)
    index = torch.full((spec.batch, spec.keep), -1)
    cpp_library.select_tokens(variant, x, score, tokens, index, keep=spec.keep, prefix=spec.prefix, fuse=spec.fuse)
    place = places(score)
    order = torch.argsort(place, dim=1)
    assert torch.equal(index, order[:, : spec.keep])
    rest = x[:, spec.prefix :]
    kept = rest.gather(1, index.unsqueeze(2).expand(-1, -1, spec.channels))
    assert torch.equal(tokens[:, : spec.prefix + spec.keep], torch.cat([x[:, : spec.prefix], kept], 1))
    if not spec.fuse:
        return
    out = place >= spec.keep
    terms = torch.where(out.unsqueeze(2), score.double().unsqueeze(2) * rest.double(), 0.0)
    wanted, size = terms.sum(1), terms.abs().nan_to_num(posinf=0).sum(1)
    error = (tokens[:, -1].double() - wanted).abs()
    fine = error <= 1e-6 * size + (2**-8 if spec.dtype == torch.bfloat16 else 1e-6) * wanted.abs()
    assert (fine | (tokens[:, -1].double() == wanted) | (tokens[:, -1].isnan() & wanted.isnan())).all()


@variants
def test_an_output_that_nobody_wants_may_be_left_out(variant):
    x, score = SelectSpec().tensors()
    both = torch.empty(2, 6, 8), torch.empty(2, 4, dtype=torch.int64)
    options = {"keep": 4, "prefix": 1, "fuse": True}
    cpp_library.select_tokens(variant, x, score, *both, **options)
    alone = torch.empty(2, 6, 8), torch.empty(2, 4, dtype=torch.int64)
    cpp_library.select_tokens(variant, x, score, alone[0], None, **options)
    cpp_library.select_tokens(variant, x, score, None, alone[1], **options)
    assert torch.equal(alone[0], both[0]) and torch.equal(alone[1], both[1])


@variants
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_spoils_its_own_rows_only(variant, bad):
    spec = AttentionSpec(queries=40, keys=40)
    q, k, v, _ = spec.tensors()
    q[0, 0, 3, 5] = bad
    v[0, 1, 4, 2] = bad
    out = torch.empty(1, 40, 2, 16).transpose(1, 2)
    cpp_library.attention(variant, q, k, v, None, out, scale=0.25, causal=False)
    spoiled = ~out.isfinite()
    assert spoiled[0, 0, 3].all() and spoiled[0, 1, :, 2].all()
    assert spoiled.sum() == 16 + 40


@variants
@pytest.mark.deep
def test_a_long_sequence_keeps_its_numbers(variant):
    spec = dataclasses.replace(AttentionSpec(heads=1, width=64, value_width=64), queries=1370, keys=1370)
    for dtype in TOLERANCE:
        random = torch.Generator().manual_seed(1)
        q, k, v = (laid_out((1, 1, 1370, 64), "fused", dtype, random) for _ in range(3))
        out = torch.empty(1, 1370, 1, 64, dtype=dtype).transpose(1, 2)
        cpp_library.attention(variant, q, k, v, None, out, scale=spec.scale, causal=False)
        wanted = probabilities(q.double(), k.double(), None, spec.scale, False) @ v.double()
        _close(out, wanted, v, dtype, 1.0)


def _close(out, wanted, v, dtype, logit):
    error = (out.double() - wanted).abs()
    assert not error.isnan().any()
    assert error.max() <= (TOLERANCE[dtype] + 1e-6 * logit) * max(1.0, v.abs().max().item())


def _double(bias):
    return None if bias is None else bias.double()


def _logit(spec, q, k):
    """The greatest scaled score: its rounding is what a softmax magnifies."""
    return spec.scale * (q.double() @ k.double().transpose(-2, -1)).abs().max().item()
