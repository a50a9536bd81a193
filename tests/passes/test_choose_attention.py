"""Which SDPA calls become the vocabulary's op, that the numbers stay, and the sentence for each that does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.verify import verify
from compiled_attn.passes.base import difference, run_passes
from compiled_attn.passes.choose_attention import SDPA, ChooseAttention
from compiled_attn.runtime.capture import capture

CPU = targets.load("x86-64-v3")
SDPAS = torch.ops.compiled_attn.attention.default


class Attend(nn.Module):
    """SDPA with given keywords on q, k, v [B, H, N, D]; what follows views the result."""

    def __init__(self, **keywords):
        super().__init__()
        self.keywords = keywords

    def forward(self, q, k, v, mask=None):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.keywords)
        return out.reshape(out.shape[0] * out.shape[1], out.shape[2], -1) + 1, out.transpose(1, 2).flatten(2)


def heads(batch=2, count=3, tokens=7, width=8, dtype=torch.float32):
    return tuple(torch.randn(batch, count, tokens, width, dtype=dtype) for _ in range(3))


def run(model, args, target=CPU, dynamic_shapes=None):
    program = capture(model, args, {}, dynamic_shapes=dynamic_shapes, mode="inference")
    notes = Notes()
    changed, _ = run_passes(program, [ChooseAttention()], target, notes)
    return program, changed, notes


def targets_of(program):
    return [n.target for n in program.graph.nodes if n.target in (SDPA, SDPAS)]


MASKS = {
    "none": None,
    "bias": torch.randn(1, 3, 7, 7),
    "rank two": torch.randn(7, 7),
    "booleans": torch.rand(2, 1, 7, 7) < 0.6,
    "keys": torch.tensor([True, True, False, True, False, True, True]).expand(2, 1, 1, 7),
    "blind row": torch.arange(7)[:, None] != 2,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_call_becomes_the_op_and_keeps_its_numbers(mask, scale):
    args = (*heads(), MASKS[mask])
    before, after, notes = run(Attend(scale=scale), args if MASKS[mask] is not None else args[:3])
    assert targets_of(after) == [SDPAS]
    assert not notes.misses
    verify(after, before, after="choose-attention")
    assert difference(before, after) < 1e-5


def test_a_causal_call_becomes_a_causal_op_and_sizes_stay_symbolic():
    batch, tokens = torch.export.Dim("batch", min=1, max=9), torch.export.Dim("tokens", min=2, max=99)
    before, after, _ = run(Attend(is_causal=True), heads(), dynamic_shapes=({0: batch, 2: tokens},) * 3)
    assert targets_of(after) == [SDPAS]
    q, k, v = heads(4, 3, 12)
    for a, b in zip(after(q, k, v), before(q, k, v), strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("keywords", "args", "because"),
    [
        ({"dropout_p": 0.2}, heads(), "it drops probabilities with p = 0.2"),
        ({"enable_gqa": True}, (heads()[0], *heads(count=1)[:2]), "its key heads are shared by groups of query heads"),
        ({}, tuple(x[0] for x in heads()), "its q, k and v have 3 dimensions, the op takes [B, H, N, D]"),
        ({}, (heads()[0], *heads(count=1)[:2]), "its q, k and v broadcast over batch or heads"),
        ({}, heads(dtype=torch.float64), "its elements are torch.float64, the kernel takes float32 and bfloat16"),
        ({}, heads(width=600), "its head width is 600, beyond 512 a block of queries leaves the second-level cache"),
    ],
)
def test_what_stays_says_why(keywords, args, because):
    model = Attend(**keywords)
    if args[0].dim() == 3:
        model.forward = lambda q, k, v: F.scaled_dot_product_attention(q, k, v)
    before, after, notes = run(model, args)
    assert after is before
    assert [miss.because for miss in notes.misses] == [because]


def test_a_gpu_keeps_its_own_sdpa_and_a_second_run_changes_nothing():
    before, same, notes = run(Attend(), heads(), targets.load("a100"))
    assert same is before and not notes.misses
    _, after, _ = run(Attend(), heads())
    again, _ = run_passes(after, [ChooseAttention()], CPU, Notes())
    assert again is after
