"""The Triton token selection: its law under the interpreter, what it accepts, and how Inductor sees its launch."""

import pytest
import torch
from cross.child import interpret

from compiled_attn.ir import targets
from compiled_attn.ops.templates import triton_select_tokens as template

pytest.importorskip("triton")

A100 = targets.load("a100")


def tensors(tokens=196, dtype=torch.bfloat16, score=torch.float32):
    x = torch.empty(2, tokens + 1, 384, dtype=dtype, device="meta")
    return x, torch.empty(2, tokens, dtype=score, device="meta"), 138


def test_the_interpreted_kernel_equals_sort_gather_and_sum():
    interpret("select_tokens")


@pytest.mark.deep
def test_the_interpreted_kernel_equals_sort_gather_and_sum_on_many_cases():
    interpret("select_tokens", profile="deep")


@pytest.mark.parametrize("target", ["a100", "a10", "l4", "rtx4090", "h100", "h200"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fuse", [False, True])
def test_every_element_type_is_covered(dtype, target, fuse):
    assert template.accepts(tensors(dtype=dtype), {"fuse": fuse}, targets.load(target)) is None


@pytest.mark.parametrize(
    ("change", "target", "because"),
    [
        ({}, "cpu", "has no Triton"),
        ({}, "t4", "target t4 is sm_75, Triton's tensor-core products start at sm_80"),
        (
            {"dtype": torch.float64},
            "a100",
            "its tokens are torch.float64, the kernel reads float32, float16 and bfloat16",
        ),
        (
            {"score": torch.float64},
            "a100",
            "its scores are torch.float64, the kernel reads float32, float16 and bfloat16",
        ),
        ({"tokens": 5000}, "a100", "it ranks 5000 tokens, counting comparisons pays up to 4096"),
    ],
)
def test_a_call_that_is_not_covered_is_declined_with_its_reason(change, target, because):
    assert template.accepts(tensors(**change), {}, targets.load(target)).endswith(because)


def test_inductor_sees_one_launch_for_rank_gather_and_sum():
    from triton_traces import launches

    from compiled_attn.runtime import launch

    config = template.chosen(tensors(), {"fuse": True}, A100)[0]

    def block(x, score):
        return launch.select_tokens(x, score, 138, prefix=1, fuse=True, config=config)

    ((name, seen, arguments),) = launches(block, torch.randn(2, 197, 384), torch.randn(2, 196))
    assert name == "select_tokens"
    assert (seen.num_warps, arguments["BLOCK_M"], arguments["FUSE"]) == (
        config.warps,
        config.constants["BLOCK_M"],
        True,
    )


def test_the_launch_exports_as_one_operator_with_a_symbolic_batch():
    from triton_traces import exported_targets

    from compiled_attn.runtime import launch

    select = launch.stand_in("select_tokens", A100)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    inputs = (torch.randn(2, 197, 384), torch.randn(2, 196))
    found = exported_targets(lambda x, s: select(x, s, 138, fuse=True)[0], inputs, {"inputs": (batch, batch)})
    assert found[0] == "compiled_attn_triton.select_tokens.default"
