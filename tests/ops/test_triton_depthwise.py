"""The Triton kernel of depthwise blocks: its law under the interpreter, what it accepts, and what Inductor sees."""

import pytest
import torch
from cross.child import interpret

from compiled_attn.ir import targets
from compiled_attn.ops.templates import triton_depthwise as template
from compiled_attn.ops.templates import triton_depthwise_gradient as gradient
from compiled_attn.ops.templates import triton_depthwise_input_gradient as input_gradient

pytest.importorskip("triton")


def tensors(channels=96, dtype=torch.bfloat16):
    x = torch.empty(2, channels, 56, 56, dtype=dtype, device="meta")
    return x, torch.empty(7, 7, channels, dtype=dtype, device="meta")


def test_the_interpreted_kernel_equals_the_equation():
    interpret("depthwise")


@pytest.mark.deep
def test_the_interpreted_kernel_equals_the_equation_on_many_cases():
    interpret("depthwise", profile="deep")


@pytest.mark.parametrize("target", ["a100", "a10", "l4", "rtx4090", "h100", "h200"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [5, 96, 1000])
def test_every_element_type_and_width_is_covered(channels, dtype, target):
    for eps in (None, 1e-6):
        assert template.accepts(tensors(channels, dtype), {"norm_eps": eps}, targets.load(target)) is None


@pytest.mark.parametrize(
    ("change", "norm_eps", "target", "because"),
    [
        ({}, None, "cpu", "has no Triton"),
        ({}, None, "t4", "target t4 is sm_75, Triton's tensor-core products start at sm_80"),
        ({"dtype": torch.float64}, None, "a100", "the kernel takes float32, float16 and bfloat16"),
        ({"channels": 1025}, 1e-6, "a100", "its norm is over 1025 channels, a program holds 1024"),
    ],
)
def test_a_call_that_is_not_covered_is_declined_with_its_reason(change, norm_eps, target, because):
    assert template.accepts(tensors(**change), {"norm_eps": norm_eps}, targets.load(target)).endswith(because)


def test_the_launch_exports_as_one_operator_with_a_symbolic_batch():
    from triton_traces import exported_targets

    from compiled_attn.runtime import launch

    block = launch.stand_in("depthwise_block", targets.load("a100"))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    inputs = (torch.randn(2, 24, 14, 14), torch.randn(3, 3, 24))
    found = exported_targets(
        lambda x, w: block(x, w, padding=[1, 1], activation="silu"), inputs, {"inputs": (batch, None)}
    )
    assert found[0] == "compiled_attn_triton.depthwise_block.default"


def test_the_interpreted_kernel_of_the_weights_gradient_equals_the_equation_and_the_launch_has_gradients():
    interpret("depthwise_gradient")


@pytest.mark.deep
def test_the_interpreted_kernel_of_the_weights_gradient_equals_the_equation_on_many_cases():
    interpret("depthwise_gradient", profile="deep")


@pytest.mark.parametrize("target", ["a100", "a10", "l4", "rtx4090", "h100", "h200"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_weights_gradient_of_every_element_type_is_covered(dtype, target):
    x, _ = tensors(96, dtype)
    assert gradient.accepts((x, x), {"kernel": [7, 7]}, targets.load(target)) is None
    assert gradient.accepts((x.double(), x), {"kernel": [7, 7]}, targets.load(target)).startswith("its elements are")
    assert "sm_75" in gradient.accepts((x, x), {"kernel": [7, 7]}, targets.load("t4"))


def test_the_interpreted_kernel_of_the_inputs_gradient_equals_the_equation():
    interpret("depthwise_input_gradient")


@pytest.mark.deep
def test_the_interpreted_kernel_of_the_inputs_gradient_equals_the_equation_on_many_cases():
    interpret("depthwise_input_gradient", profile="deep")


@pytest.mark.parametrize("target", ["a100", "a10", "l4", "rtx4090", "h100", "h200"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_inputs_gradient_of_every_element_type_is_covered(dtype, target):
    grad, weight = tensors(96, dtype)
    options = {"size": [112, 112], "stride": [2, 2]}
    assert input_gradient.accepts((grad, weight), options, targets.load(target)) is None
    assert input_gradient.accepts((grad.double(), weight), options, targets.load(target)).startswith("its elements are")
    assert "sm_75" in input_gradient.accepts((grad, weight), options, targets.load("t4"))
