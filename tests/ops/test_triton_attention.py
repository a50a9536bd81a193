"""The Triton attention: its law under the interpreter, what it accepts, and how Inductor sees its launch."""

import pytest
import torch
from cross.child import interpret

from compiled_attn.ir import targets
from compiled_attn.ir.errors import TargetError
from compiled_attn.ops.templates import triton_attention as template

pytest.importorskip("triton")

A100 = targets.load("a100")


def tensors(width=64, width_v=None, dtype=torch.bfloat16):
    q = torch.empty(2, 6, 197, width, dtype=dtype, device="meta")
    return q, q, q[..., :1].expand(2, 6, 197, width_v or width)


def test_the_interpreted_kernel_equals_the_equation():
    interpret("attention")


@pytest.mark.deep
def test_the_interpreted_kernel_equals_the_equation_on_many_cases():
    interpret("attention", profile="deep")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", ["a100", "a10", "l4", "rtx4090", "h100", "h200"])
def test_every_head_width_up_to_256_is_covered(dtype, target):
    for width in (1, 16, 24, 64, 80, 128, 192, 256):
        for bias in (None, torch.empty(197, 197, device="meta")):
            assert template.accepts((*tensors(width, dtype=dtype), bias), {}, targets.load(target)) is None


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"target": "zen5"}, "target zen5 has no Triton"),
        ({"target": "t4"}, "target t4 is sm_75, Triton's tensor-core products start at sm_80"),
        ({"dtype": torch.float64}, "its elements are torch.float64, the kernel reads float32, float16 and bfloat16"),
        ({"width": 257}, "its head width is 257, the kernel holds 1 to 256 in registers"),
        ({"width_v": 300}, "its value width is 300, the kernel holds 1 to 256 in registers"),
    ],
)
def test_a_call_that_is_not_covered_is_declined_with_its_reason(change, because):
    given = {"width": 64, "width_v": None, "dtype": torch.bfloat16, "target": "a100"} | change
    target = targets.load(given.pop("target"))
    assert template.accepts(tensors(**given), {}, target) == because


def test_capped_scores_are_declined():
    assert template.accepts(tensors(), {"softcap": 50.0}, A100) == "its scores are capped at 50, the kernel bends none"


def test_a_bias_of_integers_is_declined():
    bias = torch.empty(197, 197, dtype=torch.bool, device="meta")
    assert (
        template.accepts((*tensors(), bias), {}, A100)
        == "its bias is torch.bool, the kernel adds a floating-point bias"
    )


def test_inductor_sees_one_launch_with_the_chosen_configuration_and_the_strides_of_the_packed_tensor():
    from triton_traces import launches

    from compiled_attn.runtime import launch

    def block(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        config = template.chosen((q, k, v, None), {}, A100)[0]
        return launch.attention(q, k, v, None, scale=0.125, causal=False, config=config)

    ((name, config, arguments),) = launches(block, torch.randn(2, 197, 3, 6, 64, dtype=torch.bfloat16))
    expected = template.chosen(tensors(), {}, A100)[0]
    assert name == "attention"
    assert (config.num_warps, config.num_stages) == (expected.warps, expected.stages)
    assert {key: arguments[key] for key in expected.constants} == expected.constants
    assert (arguments["D"], arguments["BLOCK_D"], arguments["stride_qd"]) == (64, 64, 1)


def test_the_launch_exports_as_one_operator_with_a_symbolic_batch():
    from triton_traces import exported_targets

    from compiled_attn.runtime import launch

    attend = launch.stand_in("attention", A100)
    q = torch.randn(2, 6, 197, 64, dtype=torch.bfloat16)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    found = exported_targets(lambda q, k, v: attend(q, k, v, scale=0.125), (q, q, q), {"inputs": (batch, batch, batch)})
    assert found == ["compiled_attn_triton.attention.default"]


def test_an_op_without_a_kernel_is_refused_with_the_list_of_those_that_have_one():
    from compiled_attn.runtime import launch

    kernels = (
        "attention, attention_with_class_row, cached_attention, decay_attention, depthwise_block, "
        "depthwise_input_gradient, depthwise_weight_gradient, local_attention, neighborhood_apply, "
        "ragged_attention, select_tokens"
    )
    with pytest.raises(TargetError, match=kernels):
        launch.stand_in("packed_linear", A100)


def test_without_triton_the_error_says_how_to_get_it(monkeypatch):
    from compiled_attn.runtime import launch

    monkeypatch.setattr(launch, "find_spec", lambda _: None)
    with pytest.raises(TargetError, match=r"pip install 'compiled-attn\[triton\]'"):
        launch.stand_in("attention", A100)
