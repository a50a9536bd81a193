"""Law, run under TRITON_INTERPRET=1: the kernel of a depthwise input's gradient equals the equation in float64."""

from dataclasses import replace

import torch
from depthwise_strategies import DepthwiseSpec, depthwise_specs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compiled_attn.ops import depthwise_input_gradient
from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime import launch_depthwise

torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
EXAMPLES = settings().max_examples // 5  # a program costs some milliseconds here
# Of the sum of all terms' magnitudes: rounding of float32 sums, and of 16-bit results.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}


@settings(max_examples=EXAMPLES)
@given(depthwise_specs(), st.sampled_from(tuple(TOLERANCE)), st.sampled_from(((4, 16), (16, 32))))
@example(DepthwiseSpec(size=(9, 11), stride=(2, 3), dilation=(2, 1), padding=(2, 1)), torch.bfloat16, (4, 16))
@example(DepthwiseSpec(channels=33, size=(8, 8), stride=(2, 2), padding=(0, 1, 0, 1)), torch.float16, (16, 32))
def test_the_kernel_equals_the_equation(spec, dtype, blocks):
    kernel = tuple(min(k, 5) for k in spec.kernel)  # few programs
    size = tuple(max(1, min(n, 9) + d * (k - 1)) for n, k, d in zip(spec.size, kernel, spec.dilation, strict=True))
    spec = replace(spec, kernel=kernel, size=size, channels=min(spec.channels, 40), batch=min(spec.batch, 2))
    config = Config(tuple(zip(("BLOCK_X", "BLOCK_C"), blocks, strict=True)), 4, 2)
    tensors, options = spec.make_input_gradient(dtype), spec.input_gradient_options
    found = launch_depthwise.depthwise_input_gradient(*tensors, **options, config=config)
    wanted = depthwise_input_gradient.reference(*(t.double() for t in tensors), **options)
    most = depthwise_input_gradient.reference(*(t.double().abs() for t in tensors), **options)
    assert found.permute(0, 2, 3, 1).is_contiguous() and found.dtype == dtype
    assert ((found.double() - wanted).abs() <= TOLERANCE[dtype] * most).all()
