"""Attention over any number of leading axes becomes attention over two, with equal numbers at 1e-6."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiled_attn import ops
from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.flatten_attention import SDPA, FlattenAttention
from compiled_attn.passes.raise_local_attention import RaiseLocalAttention
from compiled_attn.runtime.capture import capture

CPU = targets.load("cpu")
LENGTH = 30


class Rows(nn.Module):
    """Five rows of six tokens as an axis of their own, [B, H, rows, N, D]; mask over [B, H, rows, N, M]."""

    def __init__(self, *, mask: tuple[int, ...] | None = None, shared: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.shared, self.causal = nn.Linear(16, 48), shared, causal
        self.register_buffer("mask", None if mask is None else torch.randn(*mask))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 5, 6, 3, 2, 8).permute(3, 0, 4, 1, 2, 5).unbind(0)
        k, v = (k[:, :1], v[:, :1]) if self.shared else (k, v)
        out = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.causal)
        return out.permute(0, 2, 3, 1, 4).reshape(-1, LENGTH, 16)


class Single(nn.Module):
    """No heads: [B, N, D]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(3)
        return F.scaled_dot_product_attention(x, x, x, seen)


def flattened(model: nn.Module):
    torch.manual_seed(0)
    before = capture(model.eval(), (torch.randn(2, LENGTH, 16),), dynamic_shapes=({0: "batch"},))
    notes = Notes()
    after, _ = run_passes(before, [FlattenAttention()], CPU, notes)
    x = torch.randn(3, LENGTH, 16)
    with torch.no_grad():
        assert (after(x) - model(x)).abs().max() < 1e-6
    again, _ = run_passes(after, [FlattenAttention()], CPU, Notes())
    assert again is after
    return after, notes


@pytest.mark.parametrize(
    "model",
    [
        Rows(),
        Rows(causal=True),
        Rows(mask=(6, 6)),
        Rows(mask=(5, 6, 6)),
        Rows(mask=(2, 5, 6, 6)),
        Rows(mask=(1, 1, 5, 6, 6)),
        Single(),
    ],
    ids=["rows", "causal", "mask", "mask a row", "mask a head and row", "mask of five axes", "no heads"],
)
def test_leading_axes_are_two_afterwards_and_the_numbers_are_eagers(model):
    after, notes = flattened(model)
    (node,) = [n for n in after.graph.nodes if n.target is SDPA]
    assert [x.meta["val"].dim() for x in node.args[:3]] == [4, 4, 4]
    assert len(notes.done) == 1 and not notes.misses


@pytest.mark.parametrize(
    ("model", "because"),
    [
        (Rows(shared=True), "its q, k and v broadcast over leading axes"),
        (Rows(mask=(2, 1, 6, 6)), "its mask tells apart axes [1, 2, 1] that can not be joined"),
    ],
)
def test_what_can_not_be_joined_stays_and_says_why(model, because):
    _, notes = flattened(model)
    assert [m.because for m in notes.misses] == [because]


def test_windows_on_an_axis_of_their_own_become_local_attention():
    class Windows(Rows):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).view(-1, 5, 6, 3, 2, 8).permute(3, 0, 4, 1, 2, 5).unbind(0)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 3).contiguous().view(-1, LENGTH, 16)

    after, _ = flattened(Windows())
    raised, _ = run_passes(after, [RaiseLocalAttention()], CPU, Notes())
    (node,) = [n for n in raised.graph.nodes if n.target is ops.local_attention.overload]
    assert node.kwargs["window"] == [6] and node.kwargs["stride"] == [6]
