"""What is told of a GPU that is not here: choices, machine code and the roof, and what compile answers."""

import re

import pytest
import torch
from cross_models import Tiny

import compiled_attn as ca
from compiled_attn.ir import targets
from compiled_attn.ir.errors import TargetError
from compiled_attn.ops.templates import registry, triton_needs
from compiled_attn.runtime import foresight

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def told():
    model, x = Tiny().eval(), torch.randn(4, 10, 64)
    return {
        name: str(foresight.explain(model, (x,), target=name, precision="fp16", dynamic_shapes={"x": {0: "batch"}}))
        for name in ("h100", "t4")
    }


def test_each_kernel_of_ours_is_told_with_its_configuration_registers_spills_and_shared_memory(told):
    for kernel in ("attention", "class_row_logits", "class_row_mean", "select_tokens"):
        assert re.search(
            rf"^ +{kernel} +\S+ w\d s\d +\d+ registers, 0 B spilled, [\d.]+ KiB shared$", told["h100"], re.M
        )


def test_attention_left_to_torch_names_the_operator(told):
    assert re.search(r"attention +flash, an operator of torch", told["h100"])


def test_the_whole_has_work_bytes_and_a_roof(told):
    found = re.search(r"whole +roof +([\d.]+) Gflop, ([\d.]+) MB moved.* ([\d.]+) us at least \((\w+)\)", told["h100"])
    assert found
    moved, roof = float(found[2]), float(found[3])
    least = moved * 1e6 / targets.load("h100").bytes_per_second * 1e6
    assert found[4] == "memory" and roof == pytest.approx(least, rel=0.2)


def test_a_gpu_before_triton_is_told_its_decompositions_and_why(told):
    assert "decomposition" in told["t4"]
    assert "not triton_class_row" in told["t4"] and "because target t4 is sm_75" in told["t4"]


def test_it_says_that_nothing_has_run(told):
    assert all("it has not run on a device" in text for text in told.values())


def test_every_triton_template_has_its_kernels_needs_on_record():
    ours = {
        t.op for t in registry.TEMPLATES if t.device == "cuda" and t.accepts.__module__.startswith("compiled_attn.")
    }
    q, m = torch.empty(2, 2, 10, 32, dtype=torch.float16), torch.empty(2, 14, 14, 2, 32, dtype=torch.float16)
    whole = torch.zeros(2, 2, 10, dtype=torch.int64)
    calls = {
        "attention": ((q, q, q, None), {"scale": 1.0}),
        "attention_with_class_row": ((q, q, q, None), {"scale": 1.0}),
        "cached_attention": ((q[:, :, :1], q, q, whole, whole[:, 0, :1]), {"scale": 1.0}),
        "decay_attention": ((m, m, m, torch.empty(2)), {"scale": 1.0, "along": [0]}),
        "depthwise_block": ((torch.empty(2, 24, 7, 7), torch.empty(3, 3, 24)), {"norm_eps": 1e-6}),
        "depthwise_input_gradient": (
            (torch.empty(2, 24, 4, 4), torch.empty(3, 3, 24)),
            {"size": [9, 9], "stride": [2, 2]},
        ),
        "depthwise_weight_gradient": ((torch.empty(2, 24, 7, 7), torch.empty(2, 24, 5, 5)), {"kernel": [3, 3]}),
        "local_attention": ((m, m, m, torch.empty(2, 13, 13)), {"window": [7, 7], "scale": 1.0}),
        "neighborhood_apply": ((torch.empty(2, 14, 14, 2, 9, 9), m.float()), {"window": [3, 3], "border": "zero"}),
        "select_tokens": ((torch.empty(2, 10, 64), torch.empty(2, 9), 5), {"prefix": 1}),
    }
    assert set(calls) <= ours
    for op, (args, kwargs) in calls.items():
        for target in ("a100", "l4", "orin", "h100"):
            found = triton_needs.launches(op, args, kwargs, targets.load(target))
            assert found and all(launch.needs.spills == 0 for launch in found)
            assert all(launch.needs.shared <= targets.load(target).shared_bytes_per_block for launch in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have the target")
def test_compile_for_an_absent_gpu_says_what_is_here_and_what_can_be_done():
    with pytest.raises(TargetError, match="target h100 is not at hand") as caught:
        ca.compile(Tiny().eval(), target="h100")
    assert "no GPU" in caught.value.facts
    assert "export(..., target='h100')" in caught.value.do
    assert "compiled-attn explain NAME --target h100" in caught.value.do
