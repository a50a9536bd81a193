"""The Triton decode attention: its law under the interpreter, what it accepts, and how its launch exports."""

import pytest
import torch
from cross.child import interpret

from compiled_attn.ir import targets
from compiled_attn.ops.templates import triton_cached_attention as template

pytest.importorskip("triton")


def arguments(width=64, dtype=torch.bfloat16, heads=8, groups=2, queries=1):
    q = torch.empty(2, heads, queries, width, dtype=dtype, device="meta")
    k = torch.empty(2, groups, 513, width, dtype=dtype, device="meta")
    positions = torch.empty(2, groups, 513, dtype=torch.int64, device="meta")
    return q, k, k, positions, torch.empty(2, queries, dtype=torch.int64, device="meta")


def test_the_interpreted_kernels_equal_the_equation():
    interpret("cached_attention")


@pytest.mark.deep
def test_the_interpreted_kernels_equal_the_equation_on_many_cases():
    interpret("cached_attention", profile="deep")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", ["a100", "a10", "l4", "rtx4090", "h100", "h200"])
def test_every_head_width_up_to_256_is_covered(dtype, target):
    for width in (1, 16, 24, 64, 80, 128, 192, 256):
        assert template.accepts(arguments(width, dtype), {"scale": 0.1}, targets.load(target)) is None


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"target": "zen5"}, "target zen5 has no Triton"),
        ({"target": "t4"}, "target t4 is sm_75, Triton's tensor-core products start at sm_80"),
        ({"dtype": torch.float64}, "its elements are torch.float64, the kernel reads float32, float16 and bfloat16"),
        ({"width": 257}, "its head width is 257, the kernel holds 1 to 256 in registers"),
        ({"queries": 3}, "it has 3 queries a head, which a product of matrices serves better"),
        ({"heads": 34}, "17 query heads share a key head, the kernel takes up to 16"),
    ],
)
def test_a_call_that_is_not_covered_is_declined_with_its_reason(change, because):
    given = {"target": "a100"} | change
    target = targets.load(given.pop("target"))
    assert template.accepts(arguments(**given), {"scale": 0.1}, target) == because


def test_the_slots_are_divided_into_sixteen_parts_at_most():
    config = template.split_configs(torch.bfloat16, 64)[0]
    for slots in (1, 64, 65, 513, 1024, 1025, 20000):
        part = template.part(config, slots)
        assert part % 64 == 0 and (slots + part - 1) // part <= template.SPLITS


def test_the_launch_exports_as_one_operator_with_a_symbolic_batch():
    from triton_traces import exported_targets

    from compiled_attn.runtime import launch

    attend = launch.stand_in("cached_attention", targets.load("a100"))
    given = tuple(t.new_empty(t.shape, device="cpu").zero_() for t in arguments())
    batch = ({0: torch.export.Dim("batch", min=1, max=99)},) * 5
    found = exported_targets(lambda *args: attend(*args, scale=0.125), given, {"inputs": batch})
    assert [name for name in found if "getitem" not in name] == ["compiled_attn_triton.cached_attention.default"]
