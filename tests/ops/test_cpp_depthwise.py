"""The C++ kernel of depthwise blocks, for every instruction set that runs here, against the equation in float64."""

from __future__ import annotations

from dataclasses import replace

import cpp_library
import pytest
import torch
from depthwise_strategies import DepthwiseSpec, depthwise_specs
from hypothesis import example, given
from laws import near

from compiled_attn.ops import depthwise_block
from compiled_attn.ops.depthwise import ACTIVATIONS, activated

# Relative to the largest value: rounding of float32 sums, and of bfloat16 results (8 bits).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

variants = pytest.mark.parametrize("variant", cpp_library.VARIANTS, ids=lambda v: v.name)


@variants
@given(spec=depthwise_specs())
@example(spec=DepthwiseSpec(channels=33, size=(1, 1), kernel=(7, 7), padding=(3, 3), norm="affine"))
@example(spec=DepthwiseSpec(channels=17, size=(14, 14), kernel=(31, 31), padding=(15, 15)))
@example(spec=DepthwiseSpec(channels=24, size=(56, 57), kernel=(7, 7), padding=(9, 9), dilation=(3, 3), gate=True))
@example(spec=DepthwiseSpec(channels=96, size=(60, 56), kernel=(7, 7), padding=(3, 3), norm="affine", batch=1))
@example(spec=DepthwiseSpec(channels=16, size=(12, 300), kernel=(5, 5), padding=(2, 2), residual=True))
def test_it_equals_the_equation_and_writes_nothing_beside(variant, spec):
    if not cpp_library.runnable(variant):
        pytest.skip(f"this CPU lacks {sorted(variant.needs)}")
    layout = "gapped" if spec.layout == "gapped" else "channels last"  # what the lowering hands to the kernel
    activation = "none" if spec.activation == "none" else "silu"
    spec = replace(spec, layout=layout, activation=activation)
    tensors = spec.tensors()
    rows, columns = spec.out
    room = torch.full((spec.batch, rows, columns + 1, spec.channels + 2), torch.nan, dtype=spec.dtype)
    out = room[:, :, :-1, 1:-1].permute(0, 3, 1, 2)
    cpp_library.depthwise(variant, tensors, out, spec.options)
    wanted = depthwise_block.reference(*[None if t is None else t.double() for t in tensors], **spec.options)
    assert room[..., 0].isnan().all() and room[..., -1].isnan().all() and room[:, :, -1].isnan().all()
    near(out, wanted, TOLERANCE[spec.dtype] * norm_gain(spec))


def norm_gain(spec):
    """By how much a norm over few, nearly equal channels magnifies rounding."""
    if spec.norm == "none":
        return 1.0
    plain = replace(spec, norm="none", activation="none", gate=False, residual=False)
    before = depthwise_block.reference(*[None if t is None else t.double() for t in plain.tensors()], **plain.options)
    spread = before.std(1, correction=0).clamp_min(1e-5**0.5).min().item()
    return max(1.0, before.abs().max().item() / spread)


@variants
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_torch(variant, name):
    if not cpp_library.runnable(variant):
        pytest.skip(f"this CPU lacks {sorted(variant.needs)}")
    x = torch.cat(
        [torch.linspace(-12, 12, 1003), torch.tensor([0.0, -0.0, torch.nan, -3e38, -100.0, -88.5, 100.0, 3e38])]
    )
    found, wanted = cpp_library.activation(variant, name, x), activated(x.double(), name)
    assert torch.equal(found.isnan(), wanted.isnan())
    error = (found.double() - wanted).abs().nan_to_num()
    assert bool((error <= 1e-6 * (1 + wanted.abs().nan_to_num())).all())
