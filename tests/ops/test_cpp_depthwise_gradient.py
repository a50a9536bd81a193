"""The gradients of depthwise blocks in C++: their kernels against the equation in float64, and compiled training."""

from __future__ import annotations

from dataclasses import replace

import cpp_library
import pytest
import torch
from depthwise_strategies import DepthwiseSpec, depthwise_specs
from hypothesis import example, given
from laws import near

from compiled_attn.ir import targets
from compiled_attn.ops import depthwise_input_gradient, depthwise_weight_gradient
from compiled_attn.ops.templates import cpp_depthwise_gradient, cpp_depthwise_input_gradient

# Of the sum of all terms' magnitudes: rounding of float32 sums, and of bfloat16 results (8 bits).
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}

variants = pytest.mark.parametrize("variant", cpp_library.VARIANTS, ids=lambda v: v.name)


@variants
@given(spec=depthwise_specs())
@example(spec=DepthwiseSpec(channels=33, size=(1, 1), kernel=(7, 7), padding=(3, 3)))
@example(spec=DepthwiseSpec(channels=17, size=(14, 14), kernel=(31, 31), padding=(15, 15)))
@example(spec=DepthwiseSpec(channels=24, size=(5, 6), kernel=(2, 9), padding=(9, 9), stride=(3, 2), batch=3))
def test_it_equals_the_equation_and_writes_nothing_beside(variant, spec):
    if not cpp_library.runnable(variant):
        pytest.skip(f"this CPU lacks {sorted(variant.needs)}")
    spec = replace(spec, layout="gapped" if spec.layout == "gapped" else "channels last")
    x, grad = spec.gradient_tensors()
    room = torch.full((spec.kernel[0] + 1, *spec.kernel[1:], spec.channels), torch.nan, dtype=spec.dtype)
    cpp_library.depthwise_gradient(variant, x, grad, room[:-1], spec.gradient_options)
    wanted = depthwise_weight_gradient.reference(x.double(), grad.double(), **spec.gradient_options)
    most = depthwise_weight_gradient.reference(x.double().abs(), grad.double().abs(), **spec.gradient_options)
    assert room[-1].isnan().all()
    assert ((room[:-1].double() - wanted).abs() <= TOLERANCE[spec.dtype] * most).all()


@variants
@given(spec=depthwise_specs())
@example(spec=DepthwiseSpec(channels=33, size=(1, 1), kernel=(7, 7), padding=(3, 3), stride=(2, 2)))
@example(spec=DepthwiseSpec(channels=17, size=(28, 29), kernel=(7, 7), padding=(3, 3), stride=(2, 2)))
@example(spec=DepthwiseSpec(channels=24, size=(12, 9), kernel=(2, 3), padding=(0, 4), stride=(3, 2), dilation=(1, 4)))
def test_the_inputs_gradient_equals_the_equation_and_writes_nothing_beside(variant, spec):
    if not cpp_library.runnable(variant):
        pytest.skip(f"this CPU lacks {sorted(variant.needs)}")
    spec = replace(spec, layout="gapped" if spec.layout == "gapped" else "channels last")
    grad, weight = spec.make_input_gradient(spec.dtype)
    rows, columns = spec.size
    room = torch.full((spec.batch, rows, columns + 1, spec.channels + 2), torch.nan, dtype=spec.dtype)
    out = room[:, :, :-1, 1:-1].permute(0, 3, 1, 2)
    cpp_library.depthwise_input_gradient(variant, grad, weight, out, spec.input_gradient_options)
    given = [t.double() for t in (grad, weight)]
    wanted = depthwise_input_gradient.reference(*given, **spec.input_gradient_options)
    most = depthwise_input_gradient.reference(*(t.abs() for t in given), **spec.input_gradient_options)
    assert room[..., 0].isnan().all() and room[..., -1].isnan().all() and room[:, :, -1].isnan().all()
    assert ((out.double() - wanted).abs() <= TOLERANCE[spec.dtype] * most).all()


@pytest.mark.parametrize(
    ("dtype", "kernel", "target", "because"),
    [
        (torch.float16, [3, 3], "cpu", "its elements are torch.float16, the kernel takes float32 and bfloat16"),
        (torch.float32, [1, 129], "cpu", "its kernel is 1 x 129, beyond 127 its ring of rows leaves the caches"),
        (torch.float32, [3, 3], "a100", "target a100 runs no C++"),
    ],
)
def test_accepts_says_what_it_does_not_cover(dtype, kernel, target, because):
    x = torch.zeros(1, 2, 200, 200, dtype=dtype)
    assert cpp_depthwise_gradient.accepts((x, x), {"kernel": kernel}, targets.load(target)) == because


def test_the_inputs_gradient_is_declined_as_the_convolution_is():
    grad = torch.zeros(1, 2, 9, 9)
    for target, because in (("cpu", None), ("a100", "target a100 runs no C++")):
        args = (grad, torch.zeros(3, 3, 2))
        assert cpp_depthwise_input_gradient.accepts(args, {"size": [9, 9]}, targets.load(target)) == because
    half = (grad.half(), torch.zeros(3, 3, 2).half())
    assert cpp_depthwise_input_gradient.accepts(half, {}, targets.load("cpu")).startswith("its elements are")


class Blocks(torch.nn.Module):
    """A block with all that the op computes behind a strided one; the weights belong to the user."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.randn(k, k, 21) / k for k in (3, 5)])
        self.bias, self.scale = (torch.nn.Parameter(torch.randn(21)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        op = torch.ops.compiled_attn.depthwise_block
        first, second = self.weights
        y = op(x.sin(), first, self.bias, stride=[2, 2], padding=[0, 1, 1, 0])
        return op(y, second, None, y, y, self.scale, padding=[2, 2], activation="silu", norm_eps=1e-5)


def test_compiled_training_calls_the_templates_forward_and_backward_and_gives_eagers_gradients():
    from torch._inductor.utils import run_fw_bw_and_get_code

    from compiled_attn.ops.templates.base import templates_in
    from compiled_attn.runtime import lower

    lower.register()
    model, plain = Blocks(), Blocks()
    plain.load_state_dict(model.state_dict())
    compiled = torch.compile(model)
    x = torch.randn(2, 21, 14, 12, requires_grad=True)
    _, code = run_fw_bw_and_get_code(lambda: compiled(x))
    forward, backward = code
    assert templates_in(forward) == {"cpp_depthwise"}
    assert templates_in(backward) == {"cpp_depthwise", "cpp_depthwise_gradient", "cpp_depthwise_input_gradient"}
    assert backward.count("depthwise_weight_gradient<float>") >= 2
    assert backward.count("depthwise_input_gradient<float>") >= 2
    model.zero_grad()
    x.grad, y = None, x.detach().requires_grad_()
    compiled(x).square().sum().backward()
    plain(y).square().sum().backward()
    for found, wanted in zip((x, *model.parameters()), (y, *plain.parameters()), strict=True):
        near(found.grad, wanted.grad, 2e-5)
