"""The Triton ragged attention: its law under the interpreter, what it accepts, and how its launch exports."""

import pytest
import torch
from cross.child import interpret

from compiled_attn.ir import targets
from compiled_attn.ops.templates import triton_ragged_attention as template

pytest.importorskip("triton")


def arguments(width=64, dtype=torch.bfloat16):
    q = torch.empty(300, 6, width, dtype=dtype, device="meta")
    begins = torch.empty(4, dtype=torch.int64, device="meta")
    return q, q, q, begins, begins


def test_the_interpreted_kernel_equals_the_equation():
    interpret("ragged_attention")


@pytest.mark.deep
def test_the_interpreted_kernel_equals_the_equation_on_many_cases():
    interpret("ragged_attention", profile="deep")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", ["a100", "a10", "l4", "rtx4090", "h100", "h200"])
def test_every_head_width_up_to_256_is_covered(dtype, target):
    for width in (1, 16, 24, 64, 80, 128, 192, 256):
        for causal in (False, True):
            given = arguments(width, dtype)
            assert template.accepts(given, {"causal": causal}, targets.load(target)) is None


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"target": "zen5"}, "target zen5 has no Triton"),
        ({"target": "t4"}, "target t4 is sm_75, Triton's tensor-core products start at sm_80"),
        ({"dtype": torch.float64}, "its elements are torch.float64, the kernel reads float32, float16 and bfloat16"),
        ({"width": 257}, "its head width is 257, the kernel holds 1 to 256 in registers"),
    ],
)
def test_a_call_that_is_not_covered_is_declined_with_its_reason(change, because):
    given = {"width": 64, "dtype": torch.bfloat16, "target": "a100"} | change
    target = targets.load(given.pop("target"))
    assert template.accepts(arguments(**given), {}, target) == because


def test_the_launch_exports_as_one_operator_with_symbolic_rows_and_sequences():
    from triton_traces import exported_targets

    from compiled_attn.runtime import launch

    attend = launch.stand_in("ragged_attention", targets.load("a100"))
    q, begins = torch.randn(300, 6, 64, dtype=torch.bfloat16), torch.tensor([0, 100, 250, 300])
    rows, ends = {0: torch.export.Dim("rows", min=1, max=9999)}, {0: torch.export.Dim("ends", min=2, max=99)}
    found = exported_targets(
        lambda q, begins: attend(q, q, q, begins, begins, scale=0.125, longest=197),
        (q, begins),
        {"inputs": (rows, ends)},
    )
    assert found == ["compiled_attn_triton.ragged_attention.default"]
