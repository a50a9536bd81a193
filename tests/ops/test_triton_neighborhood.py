"""The Triton neighborhood_apply: its law under the interpreter, what it accepts, and how its launch exports."""

import pytest
import torch
from cross.child import interpret

from compiled_attn.ir import targets
from compiled_attn.ops.templates import triton_neighborhood as template

pytest.importorskip("triton")


def tensors(mixes=9, width=32, dtype=torch.bfloat16):
    weights = torch.empty(2, 14, 14, 6, mixes, 9, dtype=dtype, device="meta")
    return weights, torch.empty(2, 28, 28, 6, width, dtype=dtype, device="meta")


def test_the_interpreted_kernel_equals_the_equation():
    interpret("neighborhood")


@pytest.mark.deep
def test_the_interpreted_kernel_equals_the_equation_on_many_cases():
    interpret("neighborhood", profile="deep")


@pytest.mark.parametrize("target", ["a100", "a10", "orin", "l4", "rtx4090", "h100", "h200"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_up_to_16_mixes_of_any_width_are_covered(dtype, target):
    for mixes in (1, 2, 9, 16):
        for width in (1, 24, 32, 64, 200):
            assert template.accepts(tensors(mixes, width, dtype), {}, targets.load(target)) is None


@pytest.mark.parametrize(
    ("change", "target", "because"),
    [
        ({}, "zen5", "target zen5 has no Triton"),
        ({}, "t4", "target t4 is sm_75, Triton's tensor-core products start at sm_80"),
        (
            {"dtype": torch.float64},
            "a100",
            "its elements are torch.float64, the kernel takes float32, float16 and bfloat16",
        ),
        ({"mixes": 17}, "a100", "it mixes each window 17 times, a program holds at most 16"),
    ],
)
def test_a_call_that_is_not_covered_is_declined_with_its_reason(change, target, because):
    assert template.accepts(tensors(**change), {}, targets.load(target)) == because


def test_the_launch_exports_as_one_operator_with_a_symbolic_batch():
    from triton_traces import exported_targets

    from compiled_attn.runtime import launch

    mix = launch.stand_in("neighborhood_apply", targets.load("a100"))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    inputs = (torch.randn(2, 7, 7, 3, 9, 9), torch.randn(2, 14, 14, 3, 32))
    found = exported_targets(
        lambda w, v: mix(w, v, window=[3, 3], stride=[2, 2], block=[1, 1], border="zero"),
        inputs,
        {"inputs": (batch, batch)},
    )
    assert found == ["compiled_attn_triton.neighborhood_apply.default"]
