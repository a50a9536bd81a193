"""The Triton local attention: its law under the interpreter, what it accepts, its tiles, and how its launch exports."""

import pytest
import torch
from cross.child import interpret

from compiled_attn.ir import targets
from compiled_attn.ops.local_geometry import axes_of
from compiled_attn.ops.templates import triton_local_attention as template
from compiled_attn.ops.templates.triton_config import Config

pytest.importorskip("triton")

TARGETS = ["a100", "a10", "orin", "l4", "rtx4090", "h100", "h200"]
SMALL = Config((("BLOCK_N", 64), ("BLOCK_M", 32), ("PRECISION", "tf32")), 4, 2)


def arguments(width=64, dtype=torch.bfloat16, relative=False, rank=2):
    q = torch.empty(2, *(14,) * rank, 6, width, dtype=dtype, device="meta")
    return q, q, q, None, torch.empty(2, *(14,) * rank, 6, 13 * rank, device="meta") if relative else None


def test_the_interpreted_kernel_equals_the_equation():
    interpret("local_attention")


@pytest.mark.deep
def test_the_interpreted_kernel_equals_the_equation_on_many_cases():
    interpret("local_attention", profile="deep")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_every_head_width_up_to_256_is_covered_and_up_to_128_beside_relative_logits(dtype, target):
    for width in (1, 16, 24, 64, 80, 128, 192, 256):
        for rank in (1, 2, 3):
            for relative in (False, True)[: 2 if width <= 128 else 1]:
                given = arguments(width, dtype, relative, rank)
                assert template.accepts(given, {"window": [7] * rank, "scale": 1.0}, targets.load(target)) is None


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"target": "zen5"}, "target zen5 has no Triton"),
        ({"target": "t4"}, "target t4 is sm_75, Triton's tensor-core products start at sm_80"),
        ({"dtype": torch.float64}, "its elements are torch.float64, the kernel reads float32, float16 and bfloat16"),
        ({"width": 257}, "its head width is 257, the kernel holds 1 to 256 in registers"),
        (
            {"width": 200, "relative": True},
            "its head width is 200, the kernel holds 1 to 128 in registers beside relative logits",
        ),
        ({"scale": 0.0, "relative": True}, "its scale is 0, by which the kernel divides what is added to the scores"),
        ({"window": [7, 2**15]}, "its window is 32768 long, the kernel's tables hold distances up to 16384"),
    ],
)
def test_a_call_that_is_not_covered_is_declined_with_its_reason(change, because):
    given = {"width": 64, "dtype": torch.bfloat16, "target": "a100", "window": [7, 7], "scale": 1.0} | change
    target, options = targets.load(given.pop("target")), {name: given.pop(name) for name in ("window", "scale")}
    assert template.accepts(arguments(**given), options, target) == because


@pytest.mark.parametrize(
    ("sizes", "pattern", "tile"),
    [
        ((56, 56), {"window": [7, 7], "stride": [7, 7]}, (7, 7)),  # one window, no pair wasted
        ((56, 56), {"window": [7, 7]}, (8, 7)),
        ((None, None), {"window": [7, 7]}, (10, 6)),
        ((4096,), {"window": [512], "causal": [True]}, (64,)),
        ((56, 56), {"window": [7, 7], "dilation": [8, 8]}, (7, 7)),  # a class has 7 x 7 places
        ((3, 200), {"window": [3, 3]}, (3, 19)),
        ((32, 32), {"window": [14, 14], "stride": [8, 8], "border": "zero"}, (8, 8)),
    ],
)
def test_tiles_hold_whole_windows_and_few_pairs_that_do_not_count(sizes, pattern, tile):
    assert template.plan(axes_of(len(sizes), **pattern), sizes, sizes, SMALL)[0] == tile


def test_the_launch_exports_as_one_operator_with_a_symbolic_batch_and_map():
    from triton_traces import exported_targets

    from compiled_attn.runtime import launch

    attend = launch.stand_in("local_attention", targets.load("a100"))
    x, bias = torch.randn(2, 21, 14, 3, 4, 32), torch.randn(4, 13, 13)
    batch, rows = torch.export.Dim("batch", min=1, max=64), 7 * torch.export.Dim("rows", min=1, max=64)
    found = exported_targets(
        lambda x, bias: attend(
            *x.unbind(3), bias, window=[7, 7], stride=[7, 7], shift=[3, 3], border="mask", scale=0.2
        ),
        (x, bias),
        {"inputs": ({0: batch, 1: rows}, None)},
    )
    assert found.count("compiled_attn_triton.local_attention.default") == 1
