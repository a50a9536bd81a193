"""Law, run under TRITON_INTERPRET=1: the Triton local attention equals the equation, outputs NaN-filled first."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from local_strategies import CASES, LocalSpec, local_specs

from compiled_attn.ops import local_attention
from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime import launch_local

torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
# absolute, on values of about unit variance; the 16-bit types round probabilities and the output once each
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
EXAMPLES = settings().max_examples // 4
MOST = 2000  # rows of q: a program costs about 20 ms here
BLOCKS = ((16, 16), (16, 32), (32, 32), (64, 32))


def agree(spec, blocks=(32, 32)):
    """The kernel on the spec's tensors, as they lie in memory, against the reference in float64."""
    config = Config((("BLOCK_N", blocks[0]), ("BLOCK_M", blocks[1]), ("PRECISION", "ieee")), 4, 2)
    tensors = spec.tensors()
    found = launch_local.local_attention(*tensors, axes=spec.axes, scale=spec.scale, config=config)
    wide = [None if t is None else t.double() for t in tensors]
    wanted = local_attention.reference(*wide, **spec.options)
    assert found.dtype == spec.dtype and found.is_contiguous()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[spec.dtype])


@settings(max_examples=EXAMPLES)
@given(local_specs(), st.sampled_from(tuple(TOLERANCE)), st.sampled_from(BLOCKS))
@example(LocalSpec(queries=(2,), window=(7,), dilation=(3,), border="zero", bias=True), torch.float32, (16, 16))
@example(
    LocalSpec(queries=(9,), window=(4,), stride=(4,), shift=(3,), border="mask", relative=True), torch.float32, (16, 16)
)
@example(LocalSpec(queries=(5, 3), window=(3, 3), dilation=(7, 2), bias=True), torch.float32, (16, 16))
def test_the_kernel_equals_the_equation(spec, dtype, blocks):
    assume(math.prod(spec.queries) * spec.batch * spec.heads <= MOST)
    agree(replace(spec, dtype=dtype, softcap=0.0), blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, spec in CASES.items() if not spec.softcap])
def test_every_fixed_pattern(name, dtype):
    agree(replace(CASES[name], dtype=dtype, batch=1))


@pytest.mark.parametrize("width", [100, 256])
def test_any_head_width_up_to_256_is_padded(width):
    agree(LocalSpec(width=width, value_width=width, batch=1, heads=1, bias=True))


def test_no_picture_gives_no_row():
    agree(LocalSpec(batch=0))
