"""Law, run under TRITON_INTERPRET=1: the depthwise kernel equals the equation in float64."""

from dataclasses import replace

import torch
from depthwise_strategies import DepthwiseSpec, depthwise_specs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from laws import near

from compiled_attn.ops import depthwise_block
from compiled_attn.ops.depthwise import both_ends
from compiled_attn.ops.templates.triton_config import Config, block_of
from compiled_attn.runtime import launch_depthwise

torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
EXAMPLES = settings().max_examples // 4  # a program costs some milliseconds here
# Relative to the largest value: rounding of float32 sums, and of 16-bit results.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@settings(max_examples=EXAMPLES)
@given(depthwise_specs(), st.sampled_from(tuple(TOLERANCE)), st.sampled_from(((4, 16), (16, 32))))
@example(DepthwiseSpec(norm="affine", gate=True, residual=True, activation="gelu"), torch.float32, (4, 16))
@example(DepthwiseSpec(channels=33, size=(1, 1), kernel=(7, 7), padding=(3, 3)), torch.float16, (16, 32))
@example(DepthwiseSpec(size=(9, 11), stride=(2, 3), dilation=(2, 1), padding=(2, 1)), torch.bfloat16, (4, 16))
def test_the_kernel_equals_the_equation(spec, dtype, blocks):
    size = tuple(min(n, 9 + max(0, d * (k - 1) - sum(ends))) for n, k, d, ends in sides(spec))  # few programs
    spec = replace(spec, dtype=dtype, size=size, batch=min(spec.batch, 2), channels=min(spec.channels, 40))
    columns, channels = blocks
    channels = channels if spec.norm == "none" else block_of(spec.channels)
    config = Config((("BLOCK_X", columns), ("BLOCK_C", channels)), 4, 2)
    tensors = spec.tensors()
    found = launch_depthwise.depthwise_block(*tensors, **spec.options, config=config)
    wide = [None if t is None else t.double() for t in tensors]
    near(found, depthwise_block.reference(*wide, **spec.options), TOLERANCE[dtype] * gain(spec))
    assert found.permute(0, 2, 3, 1).is_contiguous()


def sides(spec):
    return zip(spec.size, spec.kernel, spec.dilation, both_ends(spec.padding), strict=True)


def gain(spec):
    """By how much a norm over few, nearly equal channels magnifies rounding."""
    if spec.norm == "none":
        return 1.0
    plain = replace(spec, norm="none", activation="none", gate=False, residual=False)
    before = depthwise_block.reference(*[None if t is None else t.double() for t in plain.tensors()], **plain.options)
    return max(1.0, before.abs().max().item() / before.std(1, correction=0).clamp_min(1e-5**0.5).min().item())
