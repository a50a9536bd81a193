"""The Triton gradients of local attention: their law under the interpreter, what is covered, how the launch exports."""

import pytest
import torch
from cross.child import interpret

from compiled_attn.ir import targets
from compiled_attn.ops.templates import triton_local_backward as template

pytest.importorskip("triton")
OPTIONS = {"window": [7, 7], "scale": 0.2}


def tensors(width=32, dtype=torch.bfloat16, relative=False):
    q = torch.empty(2, 14, 14, 6, width, dtype=dtype, device="meta")
    logits = torch.empty(2, 14, 14, 6, 26, dtype=dtype, device="meta") if relative else None
    return q, q, q, torch.empty(6, 13, 13, device="meta"), logits


def test_the_interpreted_gradients_equal_the_equations():
    interpret("local_backward")


@pytest.mark.deep
def test_the_interpreted_gradients_equal_the_equations_on_many_cases():
    interpret("local_backward", profile="deep")


@pytest.mark.parametrize("target", ["a100", "a10", "orin", "l4", "rtx4090", "h100", "h200"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_head_of_the_forward_is_covered(dtype, target):
    for width in (8, 24, 32, 64, 100, 128, 256):
        for relative in (False, True)[: 2 if width <= 128 else 1]:
            assert template.accepts(tensors(width, dtype, relative), OPTIONS, targets.load(target)) is None


@pytest.mark.parametrize(
    ("change", "target", "because"),
    [
        ({}, "zen5", "target zen5 has no Triton"),
        ({"width": 257}, "a100", "its head width is 257, the kernel holds 1 to 256 in registers"),
        ({"width": 200, "relative": True}, "a100", "the kernel holds 1 to 128 in registers beside relative logits"),
        ({"dtype": torch.float64}, "a100", "its elements are torch.float64, the kernel reads float32"),
    ],
)
def test_a_call_that_is_not_covered_is_declined_with_its_reason(change, target, because):
    assert because in template.accepts(tensors(**change), OPTIONS, targets.load(target))
