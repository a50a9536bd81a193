"""Law, run under TRITON_INTERPRET=1: the kernel of a depthwise weight's gradient equals the equation in float64."""

from dataclasses import replace

import torch
from depthwise_strategies import CASES, DepthwiseSpec, depthwise_specs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compiled_attn.ops import depthwise_block, depthwise_weight_gradient
from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime import launch, launch_depthwise

torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
EXAMPLES = settings().max_examples // 5  # a program costs some milliseconds here
# Of the sum of all terms' magnitudes: rounding of float32 sums, and of 16-bit results.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}


@settings(max_examples=EXAMPLES)
@given(depthwise_specs(), st.sampled_from(tuple(TOLERANCE)), st.sampled_from(((4, 16, 3), (16, 32, 1))))
@example(DepthwiseSpec(size=(9, 11), stride=(2, 3), dilation=(2, 1), padding=(2, 1)), torch.bfloat16, (4, 16, 3))
@example(DepthwiseSpec(channels=33, size=(1, 1), kernel=(3, 3)), torch.float16, (16, 32, 1))
def test_the_kernel_equals_the_equation(spec, dtype, blocks):
    kernel = tuple(min(k, 5) for k in spec.kernel)  # few programs
    size = tuple(max(1, min(n, 9) + d * (k - 1)) for n, k, d in zip(spec.size, kernel, spec.dilation, strict=True))
    spec = replace(spec, kernel=kernel, size=size, dtype=dtype, channels=min(spec.channels, 40))
    config = Config(tuple(zip(("BLOCK_X", "BLOCK_C", "SHARES"), blocks, strict=True)), 4, 2)
    x, grad = spec.gradient_tensors()
    found = launch_depthwise.depthwise_weight_gradient(x, grad, **spec.gradient_options, config=config)
    wanted = depthwise_weight_gradient.reference(x.double(), grad.double(), **spec.gradient_options)
    most = depthwise_weight_gradient.reference(x.double().abs(), grad.double().abs(), **spec.gradient_options)
    assert found.is_contiguous() and found.dtype == dtype
    assert ((found.double() - wanted).abs() <= TOLERANCE[dtype] * most).all()


def test_the_launch_of_a_block_has_the_gradients_of_the_equation():
    from compiled_attn.ir import targets

    block = launch.stand_in("depthwise_block", targets.load("a100"))
    for spec in CASES.values():
        tensors = [None if t is None else t.requires_grad_() for t in spec.make(torch.float32)]
        leaves = [t for t in tensors if t is not None]
        wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
        out = block(*tensors, **spec.options)
        toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        found = torch.autograd.grad(out, leaves, toward)
        want = depthwise_block.reference(*wide, **spec.options)
        wanted = torch.autograd.grad(want, [t for t in wide if t is not None], toward.to(want.dtype))
        for a, b in zip(found, wanted, strict=True):
            assert (a.double() - b).abs().max() <= 2e-5 * max(1.0, b.abs().max().item())
