"""Law, run under TRITON_INTERPRET=1: the Triton neighborhood_apply equals the equation, outputs NaN-filled first."""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from local_strategies import LocalSpec
from neighborhood_strategies import CASES, NeighborhoodSpec, neighborhood_specs

from compiled_attn.ir import targets
from compiled_attn.ops import neighborhood_apply
from compiled_attn.ops.templates import triton_neighborhood as template
from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime import launch, launch_neighborhood

torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
# times the largest result; the 16-bit types round the result once
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EXAMPLES = settings().max_examples // 4
MOST = 1500  # rows of weights


def agree(spec, dtype, queries=16):
    """The kernel on the spec's tensors, as they lie in memory, against the reference in float64."""
    weights, v = spec.make(dtype)
    mixes, width = template.blocks(spec.mixes, v.shape[-1])
    config = Config((("BLOCK_N", queries), ("BLOCK_MIX", mixes), ("BLOCK_D", width)), 4, 2)
    found = launch_neighborhood.neighborhood_apply(weights, v, axes=spec.local.axes, config=config)
    wanted = neighborhood_apply.reference(weights.double(), v.double(), **spec.options)
    assert found.dtype == dtype and found.is_contiguous()
    most = TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=most)


@settings(max_examples=EXAMPLES)
@given(neighborhood_specs(), st.sampled_from(tuple(TOLERANCE)), st.sampled_from((1, 16, 64)))
@example(NeighborhoodSpec(LocalSpec(queries=(2,), window=(7,), dilation=(3,), border="zero")), torch.float32, 16)
@example(NeighborhoodSpec(LocalSpec(queries=(9,), window=(4,), stride=(4,), shift=(3,)), 9), torch.float32, 16)
def test_the_kernel_equals_the_equation(spec, dtype, queries):
    assume(math.prod(spec.local.queries) * spec.local.batch * spec.local.heads * math.prod(spec.local.window) <= MOST)
    agree(spec, dtype, queries)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_every_fixed_pattern(name, dtype):
    agree(CASES[name], dtype)


def test_wide_values_are_cut_and_no_picture_gives_no_row():
    agree(NeighborhoodSpec(LocalSpec(value_width=100), 2), torch.float32)
    agree(NeighborhoodSpec(LocalSpec(batch=0)), torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_the_launch_has_the_gradient_of_the_equation(name):
    spec = CASES[name]
    mix = launch.stand_in("neighborhood_apply", targets.load("a100"))
    leaves = [x.detach().requires_grad_() for x in spec.make(torch.float32)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    out, wanted = mix(*leaves, **spec.options), neighborhood_apply.reference(*wide, **spec.options)
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    torch.use_deterministic_algorithms(False)  # for the sums into v's gradient
    found = torch.autograd.grad(out, leaves, toward)
    torch.use_deterministic_algorithms(True)
    for have, want in zip(found, torch.autograd.grad(wanted, wide, toward.double()), strict=True):
        torch.testing.assert_close(have.double(), want, rtol=0, atol=1e-5)
