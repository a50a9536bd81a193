"""The Triton decay_attention: its law under the interpreter, what it accepts, how its launch exports, its gradient."""

import pytest
import torch
from cross.child import interpret

from compiled_attn.ir import targets
from compiled_attn.ops.templates import triton_decay_attention as template

pytest.importorskip("triton")


def tensors(width=32, dtype=torch.bfloat16):
    q = torch.empty(2, 14, 14, 6, width, dtype=dtype, device="meta")
    return q, q, q, torch.empty(6, device="meta")


def test_the_interpreted_kernel_equals_the_equation():
    interpret("decay_attention")


@pytest.mark.deep
def test_the_interpreted_kernel_equals_the_equation_on_many_cases():
    interpret("decay_attention", profile="deep")


@pytest.mark.parametrize("target", ["a100", "a10", "orin", "l4", "rtx4090", "h100", "h200"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_heads_up_to_128_are_covered_along_any_axes_with_and_without_softmax(dtype, target):
    for width in (1, 16, 24, 32, 64, 128):
        for along in ([0], [1], [0, 1], None):
            for softmax in (True, False):
                options = {"along": along, "softmax": softmax, "scale": 1.0}
                assert template.accepts(tensors(width, dtype), options, targets.load(target)) is None


@pytest.mark.parametrize(
    ("change", "target", "because"),
    [
        ({}, "zen5", "target zen5 has no Triton"),
        ({}, "t4", "target t4 is sm_75, Triton's tensor-core products start at sm_80"),
        (
            {"dtype": torch.float64},
            "a100",
            "its elements are torch.float64, the kernel reads float32, float16 and bfloat16",
        ),
        ({"width": 129}, "a100", "its head width is 129, the kernel holds 1 to 128 in registers"),
    ],
)
def test_a_call_that_is_not_covered_is_declined_with_its_reason(change, target, because):
    assert template.accepts(tensors(**change), {"scale": 1.0}, targets.load(target)) == because


def test_the_launch_exports_as_one_operator_with_a_symbolic_batch_and_map():
    from triton_traces import exported_targets

    from compiled_attn.runtime import launch

    attend = launch.stand_in("decay_attention", targets.load("a100"))
    batch, rows = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("rows", min=2, max=64)
    x, decay = torch.randn(2, 14, 7, 3, 4, 32), -torch.rand(4)
    found = exported_targets(
        lambda x, decay: attend(*x.unbind(3), decay, scale=0.2, along=[0]),
        (x, decay),
        {"inputs": ({0: batch, 1: rows}, None)},
    )
    assert found.count("compiled_attn_triton.decay_attention.default") == 1
