"""Law, run under TRITON_INTERPRET=1: the Triton decay_attention equals the equation, outputs NaN-filled first."""

from dataclasses import replace

import pytest
import torch
from decay_strategies import CASES, DecaySpec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compiled_attn.ir import targets
from compiled_attn.ops import decay_attention
from compiled_attn.ops.decay import along_of
from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime import launch, launch_decay

torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
# times the largest result; the 16-bit types round probabilities and the result once each
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
EXAMPLES = settings().max_examples // 4
BLOCKS = ((16, 16), (32, 16), (16, 32), (64, 32))


@st.composite
def decay_specs(draw: st.DrawFn) -> DecaySpec:
    """Maps of one to three axes and any of them, of at most 150 places a picture."""
    rank = draw(st.integers(1, 3))
    sizes = tuple(draw(st.integers(1, (70, 12, 5)[rank - 1])) for _ in range(rank))
    axes = [list(range(rank)), *([a] for a in range(rank)), *([0, a] for a in range(1, rank))]
    along = tuple(draw(st.sampled_from(axes)))
    return DecaySpec(
        sizes=sizes,
        along=draw(st.sampled_from([along, None] if len(along) == rank else [along])),
        softmax=draw(st.booleans()),
        causal=len(along) == 1 and draw(st.booleans()),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        width=draw(st.sampled_from([1, 8, 16, 24, 64])),
        value_width=draw(st.sampled_from([1, 8, 16, 40])),
        seed=draw(st.integers(0, 2**16)),
    )


def agree(spec: DecaySpec, dtype: torch.dtype, blocks: tuple[int, int] = (16, 16)) -> None:
    """The kernel on the spec's tensors, as they lie in memory, against the reference in float64."""
    config = Config((("BLOCK_N", blocks[0]), ("BLOCK_M", blocks[1]), ("PRECISION", "ieee")), 4, 2)
    tensors, options = spec.make(dtype), dict(spec.options)
    along = along_of(tensors[0], options.pop("along"))
    found = launch_decay.decay_attention(*tensors, along=along, config=config, **options)
    wanted = decay_attention.reference(*(x.double() for x in tensors), **spec.options)
    assert found.dtype == dtype and found.is_contiguous()
    most = TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=most)


@settings(max_examples=EXAMPLES)
@given(decay_specs(), st.sampled_from(tuple(TOLERANCE)), st.sampled_from(BLOCKS))
@example(DecaySpec(sizes=(70,), softmax=False, causal=True), torch.float32, (32, 16))
@example(DecaySpec(sizes=(7, 9), along=(0,), width=32), torch.bfloat16, (16, 16))
def test_the_kernel_equals_the_equation(spec, dtype, blocks):
    agree(spec, dtype, blocks)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_every_fixed_call(name, dtype):
    agree(replace(CASES[name], batch=1), dtype)


def test_no_picture_gives_no_row():
    agree(DecaySpec(batch=0), torch.float32)


def test_the_launch_has_the_gradient_of_the_equation():
    spec = CASES["along columns"]
    attend = launch.stand_in("decay_attention", targets.load("a100"))
    leaves = [x.detach().requires_grad_() for x in spec.make(torch.float32)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    torch.use_deterministic_algorithms(False)
    toward = torch.randn(2, 4, 5, 3, 8)
    found = torch.autograd.grad(attend(*leaves, **spec.options), leaves, toward)
    wanted = torch.autograd.grad(decay_attention.reference(*wide, **spec.options), wide, toward.double())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)
