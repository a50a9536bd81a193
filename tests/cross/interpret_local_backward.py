"""Law, run under TRITON_INTERPRET=1: the Triton gradients of local attention equal the equation's, NaN-filled first."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from local_strategies import CASES, LocalSpec, local_specs

from compiled_attn.ir import targets
from compiled_attn.ops import local_attention
from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime import launch, launch_local_backward

torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh tensors with NaN
# times the largest gradient of each tensor; the 16-bit types round probabilities, their gradients and the result
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
EXAMPLES = max(1, settings().max_examples // 8)
MOST = 600  # rows of q: a program costs about 60 ms here
BLOCKS = ((16, 16), (16, 32), (32, 32))


def agree(spec, blocks=(32, 32)):
    """The kernels' gradients of the spec's tensors, as they lie in memory, against the reference's in float64."""
    config = Config((("BLOCK_N", blocks[0]), ("BLOCK_M", blocks[1]), ("PRECISION", "ieee")), 4, 1)
    tensors = spec.tensors()
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    out = local_attention.reference(*wide, **spec.options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(spec.dtype)
    given_ = [t for t in wide if t is not None]
    wanted = iter(torch.autograd.grad(out, given_, grad.double(), allow_unused=True))
    found = launch_local_backward.local_attention_backward(
        grad, *tensors, axes=spec.axes, scale=spec.scale, rows_config=config, columns_config=config
    )
    for tensor, have in zip(tensors, found, strict=True):
        if tensor is None:
            assert have is None
            continue
        want = next(wanted)
        want = torch.zeros_like(tensor).double() if want is None else want
        assert have.dtype == tensor.dtype and have.shape == tensor.shape
        most = TOLERANCE[spec.dtype] * max(1.0, float(want.abs().max()) if want.numel() else 0.0)
        torch.testing.assert_close(have.double(), want, rtol=0, atol=most)


@settings(max_examples=EXAMPLES)
@given(local_specs(), st.sampled_from(tuple(TOLERANCE)), st.sampled_from(BLOCKS))
@example(LocalSpec(queries=(2,), window=(7,), dilation=(3,), border="zero", bias=True), torch.float32, (16, 16))
@example(LocalSpec(queries=(40,), window=(4,), bias=True), torch.float32, (16, 16))
@example(LocalSpec(queries=(5, 3), window=(3, 3), dilation=(7, 2), bias=True), torch.float32, (16, 16))
def test_the_gradients_equal_the_equations(spec, dtype, blocks):
    assume(math.prod(spec.queries) * spec.batch * spec.heads <= MOST)
    agree(replace(spec, dtype=dtype, softcap=0.0), blocks)


@pytest.mark.parametrize("name", [name for name, spec in CASES.items() if not spec.softcap])
def test_every_fixed_pattern(name):
    agree(replace(CASES[name], dtype=torch.float32, batch=1))


@pytest.mark.parametrize(
    "spec",
    [
        LocalSpec(bias=True),
        LocalSpec(),
        LocalSpec(relative=True),
        LocalSpec(relative=True, bias=True, width=72, heads=1),
    ],
    ids=["bias", "no bias", "logits of the query", "both, a wide head"],
)
def test_the_operator_is_differentiated_by_the_kernels_or_by_the_ops_own_rule(spec):
    attend = launch.stand_in("local_attention", targets.load("a100"))
    tensors = [None if t is None else t.detach().requires_grad_() for t in spec.tensors()]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    out, wanted = attend(*tensors, **spec.options), local_attention.reference(*wide, **spec.options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad)
    wanted.backward(grad.double())
    for have, want in zip(tensors, wide, strict=True):
        if have is not None:
            most = 1e-5 * max(1.0, float(want.grad.abs().max()))
            torch.testing.assert_close(have.grad.double(), want.grad, rtol=0, atol=most)
