"""FlexAttention calls with a recognisable mask become attention that other passes know, or say why not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from compiled_attn import ops
from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.passes import pipelines
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.raise_flex_attention import FLEX, RaiseFlexAttention
from compiled_attn.passes.raise_local_attention import RaiseLocalAttention
from compiled_attn.runtime.capture import capture

CPU = targets.load("cpu")
BATCH = {0: torch.export.Dim("batch", min=1, max=16)}
LENGTH = 24  # a sequence, or a map of 4 x 6


def sliding(_b, _h, q, k):
    return (q >= k) & (q - k < 6)


def sinks(_b, _h, q, k):
    return (q >= k) & ((q - k < 6) | (k < 2))


def causal(_b, _h, q, k):
    return q >= k


def neighborhood(_b, _h, q, k):
    """3 x 3 keys around each query of a map of 4 x 6, moved inside at the border."""
    y, x = (q // 6).clamp(1, 2), (q % 6).clamp(1, 4)
    return ((k // 6 - y).abs() <= 1) & ((k % 6 - x).abs() <= 1)


def blocks(_b, _h, q, k):
    return q // 6 == k // 6


def triples(_b, _h, q, k):
    return (q * k) % 3 == 0


def before(_b, _h, q, k):
    """The first query sees nothing."""
    return (q > k) & (q - k < 6)


def by_head(_b, h, q, k):
    return (q >= k) & (q - k < 3 + h)


def slopes(score, _b, h, q, k):
    return score + (k - q) * torch.exp2(-(h + 1.0))


def capped(score, _b, _h, _q, _k):
    return 20 * torch.tanh(score / 20)


def capped_slopes(score, b, h, q, k):
    return slopes(-5 * torch.tanh(score * -0.4), b, h, q, k)


def squared(score, _b, _h, _q, _k):
    return score * score


def capped_behind_slopes(score, b, h, q, k):
    return capped(slopes(score, b, h, q, k), b, h, q, k)


def later(score, _b, _h, q, k):
    return torch.where(q >= k, score, -float("inf"))


class Flex(nn.Module):
    def __init__(self, mask=None, score=None, key_heads: int = 2, keep: bool = False) -> None:
        super().__init__()
        self.score, self.key_heads, self.keep = score, key_heads, keep
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 16 * key_heads)
        self.mask = None if mask is None else create_block_mask(mask, None, None, LENGTH, LENGTH, device="cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(2, (2, 8)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, self.key_heads, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        shared = self.key_heads != 2
        y = flex_attention(q, k, v, self.score, self.mask, scale=0.3, enable_gqa=shared, return_lse=self.keep)
        y, added = (y[0], y[1].sum()) if self.keep else (y, 0.0)
        return y.transpose(1, 2).flatten(2) + added


def raised(model: nn.Module, target: targets.Target = CPU):
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, 16)
    before = capture(model.eval(), (x,), {}, dynamic_shapes=(BATCH,), mode="inference")
    notes = Notes()
    after, _ = run_passes(before, [*pipelines.portable(), RaiseLocalAttention()], target, notes)
    return before, after, notes


def equal(model: nn.Module, after) -> bool:
    x = torch.randn(3, LENGTH, 16)
    with torch.no_grad():
        return bool((after(x) - model(x)).abs().max() < 1e-6)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"mask": sliding}, {"window": [6], "causal": [True]}),
        ({"mask": sliding, "key_heads": 1}, {"window": [6], "causal": [True]}),
        ({"mask": sliding, "score": slopes}, {"window": [6], "causal": [True]}),
        ({"mask": sliding, "score": capped}, {"window": [6], "softcap": 20.0, "scale": 0.3}),
        ({"mask": sliding, "score": capped_slopes}, {"window": [6], "softcap": 5.0, "scale": 0.6}),
        ({"mask": sinks}, {"window": [6], "causal": [True], "sinks": 2}),
        ({"mask": neighborhood}, {"window": [3, 3], "stride": [1, 1], "border": "clamp"}),
        ({"mask": blocks}, {"window": [6], "stride": [6]}),
    ],
    ids=[
        "sliding",
        "shared heads",
        "sliding, slopes",
        "capped",
        "capped, slopes",
        "sinks",
        "neighborhood of a map",
        "windows",
    ],
)
def test_a_mask_that_follows_a_pattern_ends_as_local_attention_with_equal_numbers_at_1e_6(options, pattern):
    model = Flex(**options)
    _, after, notes = raised(model)
    (node,) = [n for n in after.graph.nodes if n.target is ops.local_attention.overload]
    assert not [n for n in after.graph.nodes if n.target is FLEX] and not notes.misses, str(notes)
    assert {name: node.kwargs[name] for name in pattern} == pattern
    assert equal(model, after)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "attention to all keys"),
        ({"mask": causal}, "attention to all earlier keys"),
        ({"score": later}, "attention to all earlier keys"),
        ({"mask": causal, "score": slopes}, "attention to all earlier keys with a bias"),
        ({"mask": causal, "score": capped}, "attention to all earlier keys, capped at 20"),
    ],
)
def test_a_call_over_all_or_all_earlier_keys_is_plain_attention(options, says):
    model = Flex(**options)
    _, after, notes = raised(model)
    assert [n.what for n in notes.of(RaiseFlexAttention.name).done] == [says]
    assert not [n for n in after.graph.nodes if n.target is FLEX]
    assert equal(model, after)


@pytest.mark.parametrize(
    ("options", "because"),
    [
        ({"mask": triples}, "its mask over 24 queries and 24 keys follows no window, neighborhood or order"),
        ({"mask": before}, "its mask over 24 queries and 24 keys follows no window, neighborhood or order"),
        ({"mask": by_head}, "its mask over 24 queries and 24 keys follows no window, neighborhood or order"),
        ({"mask": sliding, "score": squared}, "to the scores: neither a sum nor a mask"),
        ({"mask": sliding, "score": capped_behind_slopes}, "to the scores: neither a sum nor a mask"),
        ({"mask": sliding, "keep": True}, "its log-sum-exp is read"),
    ],
    ids=[
        "no pattern",
        "the first query sees nothing",
        "other windows for other heads",
        "squared",
        "capped behind a bias",
        "log-sum-exp read",
    ],
)
def test_any_other_call_stays_and_says_why(options, because):
    model = Flex(**options)
    _, after, notes = raised(model)
    assert [n for n in after.graph.nodes if n.target is FLEX]
    (miss,) = notes.of(RaiseFlexAttention.name).misses
    assert because in miss.because
    assert equal(model, after)


def test_capped_scores_stay_with_flex_attention_on_a_gpu():
    _, after, notes = raised(Flex(sliding, capped), targets.load("a100"))
    assert [n for n in after.graph.nodes if n.target is FLEX]
    (miss,) = notes.of(RaiseFlexAttention.name).misses
    assert miss.because == "its scores are capped at 20, and no kernel of windows bends them on a GPU"
