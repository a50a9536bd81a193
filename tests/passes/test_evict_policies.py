"""What holds of every policy, whatever is appended, evicted, reset and reordered: drawn sequences of steps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled_attn.ir.errors import PassError
from compiled_attn.passes.evict_policies import (
    HeavyHitters,
    KeyNorm,
    MaskedHeavyHitters,
    Policy,
    Protect,
    SinkAndRecent,
    SlidingWindow,
    Slots,
    SnapKV,
    Tova,
    pyramid,
)
from compiled_attn.passes.evict_step import Layer, New, Rule, decode, free_slots, prompt

GROUPS, SHARE, WIDTH = 2, 2, 4
POLICIES: dict[str, tuple[Policy, int, int]] = {  # policy, sinks and recent tokens that never go
    "sliding window": (SlidingWindow(), 0, 5),
    "sinks and recent": (SinkAndRecent(sinks=2), 2, 3),
    "sinks, rolling": (SinkAndRecent(sinks=2, rolling=True), 2, 3),
    "h2o": (HeavyHitters(recent=3), 0, 3),
    "h2o, simulated": (MaskedHeavyHitters(recent=3), 0, 3),
    "tova": (Tova(), 0, 1),
    "snapkv": (SnapKV(window=2, kernel=3), 0, 2),
    "snapkv, averaged": (SnapKV(window=2, kernel=3, pooling="avg"), 0, 2),
    "key norm": (KeyNorm(), 0, 0),
    "protected": (Protect(Tova(), sinks=1, recent=2), 1, 2),
    "protected twice": (Protect(Protect(KeyNorm(), sinks=2, recent=0), sinks=0, recent=2), 2, 2),
}


@dataclass(frozen=True)
class Script:
    """steps: ("read", lengths of each text's prompt), ("say", which texts go on), ("reset", ()), ("order", which of
    the texts take the two places).
    """

    budget: int
    steps: tuple[tuple[str, tuple[int, ...]], ...]
    seed: int


def empty(policy: Policy, budget: int, batch: int) -> Layer:
    shape = (batch, GROUPS, budget + 1)
    scores = torch.zeros(shape) if policy.remembers else None
    return Layer(torch.zeros(*shape, WIDTH), torch.zeros(*shape, WIDTH), torch.full(shape, -1), scores)


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    step = st.one_of(
        st.tuples(st.just("read"), st.tuples(st.integers(0, 9), st.integers(1, 9))),
        st.tuples(st.just("say"), st.tuples(st.integers(0, 1), st.integers(0, 1))),
        st.tuples(st.just("say"), st.just((1, 1))),
        st.tuples(st.just("reset"), st.just(())),
        st.tuples(st.just("order"), st.tuples(st.integers(0, 1), st.integers(0, 1))),
    )
    return Script(
        draw(st.integers(5, 8)), tuple(draw(st.lists(step, min_size=1, max_size=12))), draw(st.integers(0, 99))
    )


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25, deadline=None)
@given(script=scripts())
def test_slots_hold_distinct_tokens_within_the_budget_and_what_is_protected_stays(name: str, script: Script) -> None:
    policy, sinks, recent = POLICIES[name]
    random = torch.Generator().manual_seed(script.seed)
    most = script.budget + max([1, *(max(numbers) for kind, numbers in script.steps if kind == "read")])

    going: list[int] = []

    def turn(heads: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        assert (places[going] < most).all()  # no position grows with the text
        return heads

    rolling = {"turn_query": turn, "turn_key": turn} if policy.turns_by_place else {}
    rule = Rule(policy, script.budget, 0.5, **rolling)
    layer, lengths = empty(policy, script.budget, 2), [0, 0]
    for kind, numbers in script.steps:
        begun = lengths
        if kind == "reset":
            layer, lengths = empty(policy, script.budget, 2), [0, 0]
        elif kind == "order":
            layer = Layer(*(None if t is None else t[list(numbers)] for t in layer))
            begun = lengths = [lengths[i] for i in numbers]
        known = [[set(head) for head in text] for text in layer.positions.tolist()]
        if kind in ("read", "say"):
            longest = max(numbers) if kind == "read" else 1
            places = [[-1] * (longest - n) + list(range(at, at + n)) for n, at in zip(numbers, lengths, strict=True)]
            rows = torch.randn(3, 2, GROUPS * SHARE, longest, WIDTH, generator=random)
            going[:] = [i for i, n in enumerate(numbers) if n]
            new = New(rows[0], rows[1, :, :GROUPS], rows[2, :, :GROUPS], torch.tensor(places))
            out, layer = (prompt if kind == "read" else decode)(layer, new, rule)
            assert out.isfinite().all()
            lengths = [at + n for n, at in zip(numbers, lengths, strict=True)]
        for number, (text, length) in enumerate(zip(layer.positions.tolist(), lengths, strict=True)):
            for head, before in zip(text, known[number], strict=True):
                live = [p for p in head if p >= 0]
                assert set(live) <= before | set(range(begun[number], length))  # what left does not come back
                assert len(set(live)) == len(live) == min(length, script.budget)
                assert all(p < length for p in live)
                assert set(range(min(sinks, length))) <= set(live)
                assert set(range(max(length - recent, 0), length)) <= set(live)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=9), st.lists(st.booleans(), min_size=1, max_size=9))
def test_wanted_tokens_get_free_slots_in_order(taken: list[bool], wanted: list[bool]) -> None:
    positions = torch.tensor([[[0 if t else -1 for t in taken]]])
    count = min(sum(wanted), len(taken) - sum(taken))
    kept = torch.tensor([w and sum(wanted[: i + 1]) <= count for i, w in enumerate(wanted)])
    found = free_slots(positions, kept[None, None])[0, 0].tolist()
    free = [i for i, t in enumerate(taken) if not t]
    assert [s for s, k in zip(found, kept.tolist(), strict=True) if k] == free[: int(kept.sum())]
    assert all(s == -1 for s, k in zip(found, kept.tolist(), strict=True) if not k)


def test_a_pyramid_keeps_the_mean_and_falls_from_layer_to_layer():
    budgets = pyramid(128, 8)
    assert sum(budgets) == 8 * 128 and list(budgets) == sorted(budgets, reverse=True)
    assert budgets[-1] == 6 and pyramid(5, 1) == (5,)


def test_a_policy_that_reads_what_it_does_not_observe_is_told_so():
    class Greedy(Policy):
        def priority(self, slots: Slots) -> torch.Tensor:
            from compiled_attn.passes.evict_policies import known

            return known(slots.mass)

    rows = torch.zeros(1, GROUPS * SHARE, 1, WIDTH)
    new = New(rows, rows[:, :GROUPS], rows[:, :GROUPS], torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(PassError, match="does not observe or remember"):
        decode(empty(Greedy(), 4, 1), new, Rule(Greedy(), 4, 1.0))
    with pytest.raises(PassError, match="smooths over no neighbours"):
        SnapKV(kernel=4)
