"""Attention with decay becomes plain attention with a bias, or says why not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compiled_attn import ops
from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.lower_decay import LowerDecay
from compiled_attn.runtime import lower
from compiled_attn.runtime.capture import capture

CPU = targets.load("cpu")
BATCH = {0: torch.export.Dim("batch", min=1, max=16)}
SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Decayed(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("decay", torch.tensor([-0.5, -0.1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.unflatten(-1, (3, 2, 4)).unbind(-3)
        return ops.decay_attention(q, k, v, self.decay, scale=0.4, **self.options).flatten(-2)


def lowered(model: nn.Module, x: torch.Tensor):
    before = capture(model.eval(), (x,), {}, dynamic_shapes=(BATCH,), mode="inference")
    notes = Notes()
    after, _ = run_passes(before, [LowerDecay()], CPU, notes)
    return before, after, notes


CASES = {
    "over all pairs": ({}, (3, 5)),
    "along columns": ({"along": [0]}, (3, 5)),
    "along rows": ({"along": [1]}, (3, 5)),
    "causal": ({"causal": True}, (6,)),
    "two of three axes": ({"along": [0, 2]}, (2, 3, 4)),
}


@pytest.mark.parametrize(("options", "sizes"), CASES.values(), ids=CASES)
def test_attention_with_decay_becomes_one_plain_attention_with_equal_numbers_at_1e_6(options, sizes):
    model = Decayed(**options)
    _, after, notes = lowered(model, torch.randn(2, *sizes, 24))
    assert sum(n.target is SDPA for n in after.graph.nodes) == 1 and not notes.misses
    assert not [n for n in after.graph.nodes if n.target is ops.decay_attention.overload]
    x = torch.randn(3, *sizes, 24)
    assert (after(x) - model(x)).abs().max() < 1e-6
    again, _ = run_passes(after, [LowerDecay()], CPU, Notes())
    assert again is after


@pytest.mark.parametrize("options", [{}, {"along": [0]}, {"softmax": False}], ids=str)
def test_on_a_gpu_it_stays_for_the_template(options):
    pytest.importorskip("triton")
    before = capture(Decayed(**options), (torch.randn(2, 3, 5, 24),), {}, dynamic_shapes=(BATCH,), mode="inference")
    notes = Notes()
    a100 = targets.load("a100")
    after, _ = run_passes(before, [LowerDecay()], a100, notes)
    assert after is before and not notes.misses
    lowered = lower.lower(after, a100, notes, strict=True)
    assert [note.what for note in notes.of("decay_attention").done] == ["triton_decay_attention"]
    assert any("compiled_attn_triton.decay_attention" in str(n.target) for n in lowered.graph.nodes)


def test_retention_stays_and_says_why():
    before, after, notes = lowered(Decayed(softmax=False), torch.randn(2, 3, 5, 24))
    assert after is before
    assert [miss.because for miss in notes.misses] == ["retention has no softmax"]
