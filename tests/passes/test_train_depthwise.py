"""Training through depthwise convolutions: the user's parameters, eager's gradients, templates forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from laws import near
from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.ops import depthwise_block
from compiled_attn.ops.templates.base import templates_in
from compiled_attn.passes.match.depthwise import PADS
from compiled_attn.passes.train_depthwise import TrainDepthwise
from compiled_attn.runtime.build import Settings
from compiled_attn.runtime.capture import capture
from compiled_attn.runtime.train import compile_train

C = 12


class Block(nn.Module):
    """A block as people train it: two kernels, batch norm, a stride behind uneven padding, a linear map of tokens."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(C, C, 7, padding=3, groups=C)
        self.far = nn.Conv2d(C, C, (5, 3), padding=(4, 2), dilation=2, groups=C, bias=False)
        self.strided = nn.Conv2d(C, C, 5, stride=2, padding=1, groups=C)
        self.twice = nn.Conv2d(C, 2 * C, 5, padding=2, groups=C)
        self.small = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.norm, self.linear = nn.BatchNorm2d(C), nn.Linear(2 * C, 5)

    def forward(self, x):
        y = self.norm(self.wide(x)).relu()
        y = self.small(self.strided(F.pad(y + self.far(x), (0, 1, 1, 1))))
        return self.linear(self.twice(y).flatten(2).transpose(1, 2))


def run(target, model=Block, dtype=torch.float32):
    x = torch.randn(2, C, 9, 10, dtype=dtype)
    program = capture(model().to(dtype), (x,), {}, mode="train", dynamic_shapes={"x": {0: "batch"}})
    notes = Notes()
    return program, TrainDepthwise().run(program, targets.load(target), notes), notes.of("depthwise_block")


@pytest.mark.parametrize("target", ["cpu", "a100"])
def test_convolutions_whose_gradients_are_templates_become_the_op_and_the_others_say_why(target):
    _, fused, notes = run(target)
    assert [n.what for n in notes.done] == ["7x7, trained", "5x3, trained", "5x5, trained", "3x3, trained"]
    assert [m.because for m in notes.misses] == ["it makes 2 results of every channel"]
    assert not [n for n in fused.graph.nodes if n.target in PADS]
    assert len([n for n in fused.graph.nodes if n.target is depthwise_block.overload]) == len(notes.done)
    assert TrainDepthwise().run(fused, targets.load(target), Notes()) is fused


@pytest.mark.parametrize(("target", "kept"), [("cpu", True), ("a100", False)])
def test_a_small_kernel_on_a_large_map_is_left_to_onednn_on_a_cpu(target, kept):
    model, x = nn.Conv2d(C, C, 3, padding=1, groups=C), torch.randn(1, C, 200, 200)
    notes, program = Notes(), capture(nn.Sequential(model), (x,), {}, mode="train")
    assert (TrainDepthwise().run(program, targets.load(target), notes) is program) == kept
    assert [m.because for m in notes.misses] == kept * [
        "oneDNN is faster at 3x3 on maps of 3.8 MB a picture, in and out"
    ]


def test_a_target_without_templates_keeps_its_convolutions():
    program, fused, notes = run("t4")
    assert fused is program
    assert any("sm_75" in m.because for m in notes.misses)


def test_compiled_training_calls_both_templates_and_gives_eagers_gradients_at_two_batch_sizes():
    from torch._inductor.utils import run_fw_bw_and_get_code

    model = Block()
    plain = copy.deepcopy(model)
    trained = compile_train(model, None, None, Settings.of("cpu", mode="train", dynamic_shapes={"x": {0: "batch"}}))
    _, code = run_fw_bw_and_get_code(lambda: trained(torch.randn(2, C, 9, 10, requires_grad=True)))
    assert [templates_in(text) for text in code] == [
        {"cpp_depthwise"},
        {"cpp_depthwise_gradient", "cpp_depthwise_input_gradient"},
    ]
    for batch in (2, 5):
        x = torch.randn(batch, C, 9, 10)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        trained.zero_grad()
        plain.zero_grad()
        plain.load_state_dict(model.state_dict())
        trained(a).sin().sum().backward()
        plain(b).sin().sum().backward()
        near(a.grad, b.grad, 2e-5)
        for (name, found), wanted in zip(trained.named_parameters(), plain.parameters(), strict=True):
            if name != "wide.bias":  # batch norm removes it: its gradient is rounding
                near(found.grad, wanted.grad, 2e-5)
