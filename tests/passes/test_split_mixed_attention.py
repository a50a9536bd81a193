"""Attention whose probabilities are mixed with positional ones becomes two parts with equal numbers."""

from __future__ import annotations

import copies
import pytest
import torch
from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.raise_attention import RaiseAttention, attention_blocks
from compiled_attn.passes.split_mixed_attention import SplitMixedAttention, factors_of
from compiled_attn.runtime.capture import capture

CPU = targets.load("cpu")
BATCH = {0: torch.export.Dim("batch", min=1, max=16)}


class Gated(nn.Module):
    """ConViT's gated positional self-attention over a map of 3 x 4; positions that factorise, or any."""

    def __init__(
        self,
        *,
        separable: bool = True,
        divided: bool = True,
        read: bool = False,
        gates: tuple[bool, bool] = (True, True),
    ) -> None:
        super().__init__()
        self.divided, self.read, self.gates = divided, read, gates
        self.qkv = nn.Linear(8, 24)
        self.gate = nn.Parameter(torch.tensor([0.3, -1.0]))
        place = torch.cartesian_prod(torch.arange(3), torch.arange(4)).float()
        away = place[None] - place[:, None]  # [12, 12, 2]
        self.register_buffer("away", torch.cat([away, away.square().sum(-1, keepdim=True)], -1))
        self.positions = nn.Linear(3, 2)
        self.other = None if separable else nn.Parameter(torch.randn(2, 12, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        q, k, v = self.qkv(x).view(batch, 12, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        near = self.positions(self.away.expand(batch, -1, -1, -1)).permute(0, 3, 1, 2)
        near = (near if self.other is None else near + self.other).softmax(-1)
        gate = torch.sigmoid(self.gate).view(1, -1, 1, 1)
        own = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        mixed = ((1.0 - gate) * own if self.gates[0] else own) + (gate * near if self.gates[1] else near)
        if self.divided:
            mixed = mixed / mixed.sum(-1).unsqueeze(-1)
        y = (mixed @ v).transpose(1, 2).reshape(batch, 12, 8)
        return y + mixed.mean((1, 2, 3)).view(-1, 1, 1) if self.read else y


def split(model: nn.Module, change=lambda program: program):
    before = change(capture(model.eval(), (torch.randn(2, 12, 8),), {}, dynamic_shapes=(BATCH,), mode="inference"))
    notes = Notes()
    after, _ = run_passes(before, [SplitMixedAttention(), RaiseAttention()], CPU, notes)
    return before, after, notes


@pytest.mark.parametrize("change", [lambda program: program, copies.remade], ids=["as written", "remade"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "known probabilities as 3 rows and 4 columns"),
        ({"divided": False}, "known probabilities as 3 rows and 4 columns"),
        ({"gates": (False, False)}, "known probabilities as 3 rows and 4 columns"),
        ({"gates": (False, True)}, "known probabilities as 3 rows and 4 columns"),
        ({"separable": False}, "known probabilities as a matrix"),
    ],
)
def test_gated_attention_becomes_one_attention_and_known_products_with_equal_numbers_at_2e_6(options, says, change):
    torch.manual_seed(0)
    model = Gated(**options)
    _, after, notes = split(model, change)
    assert [n.what for n in notes.of(SplitMixedAttention.name).done] == [says]
    assert [len(found) for found in attention_blocks(after)] == [1, 0] and not notes.misses
    x = torch.randn(3, 12, 8)
    with torch.no_grad():
        assert (after(x) - model(x)).abs().max() < 2e-6
    again, _ = run_passes(after, [SplitMixedAttention()], CPU, Notes())
    assert again is after


def test_probabilities_that_something_else_reads_stay_mixed():
    before, after, notes = split(Gated(read=True))
    assert after is before
    assert not notes.of(SplitMixedAttention.name).done and notes.misses


def test_known_probabilities_say_which_parameters_they_follow_from():
    _, after, _ = split(Gated())
    origins = {name for names in after.origin.values() for name in names}
    assert {"positions.weight", "positions.bias", "away"} <= origins


def test_probabilities_bent_in_one_pair_are_no_product_of_rows_and_columns():
    rows, columns = torch.rand(2, 3, 3).softmax(-1), torch.rand(2, 4, 4).softmax(-1)
    known = (rows.view(2, 3, 1, 3, 1) * columns.view(2, 1, 4, 1, 4)).reshape(2, 12, 12)
    found = factors_of(known)
    assert found is not None and (found[0] - rows).abs().max() < 1e-6 and (found[1] - columns).abs().max() < 1e-6
    known[0, 5, 7] += 1e-4
    assert factors_of(known) is None


class Weighted(nn.Module):
    """A product with a sum whose factor is one number."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, a, b, v):
        return (self.alpha * a + b) @ v, (b + a * self.alpha) @ v


def test_a_sum_with_one_number_as_a_factor_is_left_alone():
    given = (torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 5))
    program = capture(Weighted(), given, {})
    assert SplitMixedAttention().run(program, targets.load("cpu"), Notes()) is program
