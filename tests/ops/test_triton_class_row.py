"""The Triton class row: its law under the interpreter, what it accepts, and how Inductor sees its launches."""

import pytest
import torch
from cross.child import interpret

from compiled_attn.ir import targets
from compiled_attn.ops.templates import triton_class_row as template

pytest.importorskip("triton")

A100 = targets.load("a100")


def tensors(width=64, dtype=torch.bfloat16):
    q = torch.empty(2, 6, 197, width, dtype=dtype, device="meta")
    return q, q, q


def test_the_interpreted_kernels_equal_the_equation():
    interpret("class_row")


@pytest.mark.deep
def test_the_interpreted_kernels_equal_the_equation_on_many_cases():
    interpret("class_row", profile="deep")


@pytest.mark.parametrize("target", ["a100", "a10", "l4", "rtx4090", "h100", "h200"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_head_width_up_to_256_is_covered(dtype, target):
    for width in (1, 16, 64, 80, 256):
        assert template.accepts(tensors(width, dtype), {"row": 0}, targets.load(target)) is None


def test_what_the_attention_declines_is_declined():
    assert template.accepts(tensors(), {}, targets.load("zen5")) == "target zen5 has no Triton"
    assert template.accepts(tensors(), {"row": -1}, A100) == "its row is -1, the kernel counts rows from 0"


def test_inductor_sees_the_attention_and_two_small_launches():
    from triton_traces import launches

    from compiled_attn.runtime import launch

    q = torch.randn(2, 6, 197, 64, dtype=torch.bfloat16)
    both = launch._CALLS["attention_with_class_row"]

    def block(q, k, v):
        return both(launch._attention_with_class_row, "a100", q, k, v, scale=0.125)

    found = launches(block, q, q + 1, q + 2)
    assert [name for name, _, _ in found] == ["attention", "class_row_logits", "class_row_mean"]
    logits, mean = (offered[0] for offered in template.chosen(tensors(), {}, A100))
    assert [config.num_warps for _, config, _ in found[1:]] == [logits.warps, mean.warps]
    assert found[1][2]["BLOCK_M"] == logits.constants["BLOCK_M"]


def test_the_launch_exports_as_one_operator_with_two_outputs():
    from triton_traces import exported_targets

    from compiled_attn.runtime import launch

    attend = launch.stand_in("attention_with_class_row", A100)
    q = torch.randn(2, 6, 197, 64, dtype=torch.bfloat16)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    found = exported_targets(lambda *qkv: attend(*qkv, scale=0.125), (q, q, q), {"inputs": (batch, batch, batch)})
    assert found.count("compiled_attn_triton.attention_with_class_row.default") == 1
    assert set(found[1:]) == {"<built-in function getitem>"}
