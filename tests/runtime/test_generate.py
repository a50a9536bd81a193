"""Generation from stock decoders whose caches forget: tokens, sampling, batches, chunks, turns, and explicit state."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import decoders
import pytest
import torch
from decoders import VOCABULARY

import compiled_attn as ca
from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.passes.evict_policies import HeavyHitters, Policy, SinkAndRecent
from compiled_attn.runtime.decoder_file import Decoder
from compiled_attn.runtime.sample import drawn, uniform

H2O = HeavyHitters(recent=4)


@cache
def decoder(policy: Policy | None = H2O, budget: int = 8, chunk: int = 6) -> Decoder:
    return ca.decoder(decoders.decoder("llama"), policy=policy, budget=budget, chunk=chunk)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_greedy_tokens_with_the_full_cache_are_those_of_transformers():
    model, text = decoders.decoder("llama"), prompt(9)
    found = ca.generate(decoder(None, 40), [text], max_new_tokens=12)
    wanted = model.generate(torch.tensor([text]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found.tokens == [wanted[0, 9:].tolist()] and found.ended == ["length"]


def test_texts_of_a_batch_are_continued_as_if_alone():
    texts = [prompt(9), prompt(3, 1), prompt(14, 2)]
    together = ca.generate(decoder(), texts, max_new_tokens=10)
    assert together.tokens == [ca.generate(decoder(), [t], max_new_tokens=10).tokens[0] for t in texts]


def test_a_text_that_ended_leaves_no_trace_in_the_others_or_in_its_own_cache():
    texts = [prompt(9), prompt(3, 1)]
    free = ca.generate(decoder(), texts, max_new_tokens=10)
    stop = free.tokens[0][2]
    found = ca.generate(decoder(), texts, max_new_tokens=10, stop=[[free.tokens[0][1], stop]])
    assert found.ended[0] == "stop" and found.tokens[0] == free.tokens[0][:3]
    length = len(found.tokens[1])
    assert found.tokens[1] == free.tokens[1][:length]
    assert found.conversation.lengths == [9 + 2, 3 + length - 1]
    alone = ca.generate(decoder(), texts[:1], max_new_tokens=3)
    assert found.conversation.kept(0)[0] == alone.conversation.kept(0)[0]


def test_a_text_ends_behind_several_tokens_in_a_row_that_it_said_itself():
    texts = [prompt(9), prompt(3, 1)]
    options = {"max_new_tokens": 10, "temperature": 1.5, "seed": 3}
    free = ca.generate(decoder(), texts, **options).tokens
    stop = [free[0][2:5], [texts[1][-1], free[1][0]], [free[1][0], VOCABULARY]]
    found = ca.generate(decoder(), texts, stop=stop, **options)
    assert found.ended == ["stop", "length"]
    assert found.tokens == [free[0][:5], free[1]]


def test_two_turns_in_one_conversation_are_one_text():
    first = ca.generate(decoder(None, 40), [prompt(5)], max_new_tokens=4)
    second = ca.generate(decoder(None, 40), [prompt(6, 3)], max_new_tokens=5, conversation=first.conversation)
    whole = ca.generate(decoder(None, 40), [prompt(5) + first.tokens[0] + prompt(6, 3)], max_new_tokens=5)
    assert second.tokens == whole.tokens
    assert second.conversation.lengths == whole.conversation.lengths == [5 + 4 + 6 + 4]


def test_many_turns_take_no_more_memory_and_positions_do_not_drift():
    model = decoder(SinkAndRecent(sinks=2), 8)
    talk = model.fresh(2)
    size = talk.nbytes
    for turn in range(6):
        ca.generate(model, [prompt(7, turn), prompt(4, turn)], max_new_tokens=9, conversation=talk)
    assert talk.nbytes == size
    assert talk.lengths == [6 * 16 - 1, 6 * 13 - 1]
    for text, length in enumerate(talk.lengths):
        assert talk.kept(1)[text] == [[0, 1, *range(length - 6, length)]] * 2


def test_what_was_saved_goes_on_where_it_was_and_two_conversations_do_not_mix(tmp_path: Path):
    talk = ca.generate(decoder(), [prompt(9)], max_new_tokens=3).conversation
    talk.save(tmp_path / "talk.pt")
    wanted = ca.generate(decoder(), [prompt(2, 5)], max_new_tokens=6, conversation=talk.copy()).tokens
    other = ca.generate(decoder(), [prompt(11, 7)], max_new_tokens=8).conversation
    restored = decoder().fresh(1)
    restored.restore(tmp_path / "talk.pt")
    assert ca.generate(decoder(), [prompt(2, 5)], max_new_tokens=6, conversation=restored).tokens == wanted
    other.reset()
    again = ca.generate(decoder(), [prompt(9)], max_new_tokens=3, conversation=other)
    assert again.tokens == ca.generate(decoder(), [prompt(9)], max_new_tokens=3).tokens
    with pytest.raises(CompiledAttnError, match="not of this decoder"):
        decoder(SinkAndRecent(sinks=2), 8).fresh(2).restore(tmp_path / "talk.pt")


def test_reordered_texts_go_on_as_they_were():
    talk = ca.generate(decoder(), [prompt(9), prompt(5, 1)], max_new_tokens=3).conversation
    swapped = talk.reorder([1, 0, 1])
    wanted = ca.generate(decoder(), [[4], [5]], max_new_tokens=4, conversation=talk).tokens
    found = ca.generate(decoder(), [[5], [4], [5]], max_new_tokens=4, conversation=swapped).tokens
    assert found == [wanted[1], wanted[0], wanted[1]]


def test_the_same_seed_draws_the_same_text_and_each_token_is_streamed():
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 9, "top_p": 0.9}
    heard: list[tuple[int, int]] = []
    first = ca.generate(decoder(), [prompt(5)], seed=3, on_token=lambda t, n: heard.append((t, n)), **options)
    assert heard == [(0, t) for t in first.tokens[0]]
    assert ca.generate(decoder(), [prompt(5)], seed=3, **options).tokens == first.tokens
    assert any(ca.generate(decoder(), [prompt(5)], seed=s, **options).tokens != first.tokens for s in (4, 5))
    ended = ca.generate(decoder(), [prompt(5)], seed=3, on_token=lambda *_: True, **options)
    assert ended.tokens == [first.tokens[0][:1]] and ended.ended == ["callback"]


def test_sampling_keeps_to_the_likeliest_tokens():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    draws = [uniform(0, 0, position) for position in range(4000)]
    assert drawn(logits, 1.0, 2, 1.0, draws).unique().tolist() == [0, 1]
    assert drawn(logits, 1.0, 0, 0.79, draws).unique().tolist() == [0, 1]
    assert drawn(logits, 1.0, 0, 0.0, draws).unique().tolist() == [0]
    assert drawn(logits[:2], 1.0, 0, 1.0, [0.0, 1 - 2**-32]).tolist() == [0, 3]
    share = drawn(logits, 1.0, 0, 1.0, draws).bincount(minlength=4) / 4000
    assert (share - logits[0].exp()).abs().max() < 0.03
    hot = drawn(logits, 2.0, 0, 1.0, draws).bincount(minlength=4) / 4000
    assert (hot - (logits[0] / 2).softmax(0)).abs().max() < 0.03


def test_draws_are_even_and_differ_by_seed_text_and_position():
    rows = [[uniform(s, t, p) for p in range(500)] for s in range(3) for t in range(3)]
    found = torch.tensor(rows, dtype=torch.float64)
    assert found.unique().numel() == found.numel()
    assert (found.histc(10, 0, 1) / found.numel() - 0.1).abs().max() < 0.015
    assert (found.corrcoef() - torch.eye(9)).abs().max() < 0.15


def test_a_drawn_text_depends_on_its_seed_and_place_but_not_on_turns_or_other_texts():
    options = {"temperature": 1.2, "seed": 5}
    whole = ca.generate(decoder(), [prompt(9), prompt(5, 1)], max_new_tokens=9, **options)
    assert ca.generate(decoder(), [prompt(9)], max_new_tokens=9, **options).tokens == whole.tokens[:1]
    first = ca.generate(decoder(), [prompt(9), prompt(5, 1)], max_new_tokens=4, **options)
    rest = ca.generate(decoder(), [[], []], max_new_tokens=5, conversation=first.conversation, **options)
    assert [a + b for a, b in zip(first.tokens, rest.tokens, strict=True)] == whole.tokens


def test_what_does_not_fit_is_refused_in_words():
    with pytest.raises(CompiledAttnError, match="would outgrow the cache"):
        ca.generate(decoder(None, 40), [prompt(30)], max_new_tokens=12)
    with pytest.raises(CompiledAttnError, match="prompt 1 is empty"):
        ca.generate(decoder(), [[3], []])
    with pytest.raises(CompiledAttnError, match="not one prompt for each text"):
        ca.generate(decoder(), [[3], [4]], conversation=decoder().fresh(1))
    for wrong in ({"temperature": -1.0}, {"temperature": 1.0, "top_p": 1.5}, {"temperature": 1.0, "top_k": -2}):
        with pytest.raises(CompiledAttnError, match="no token is drawn with"):
            ca.generate(decoder(), [[3]], **wrong)
    with pytest.raises(CompiledAttnError, match="takes a decoder"):
        ca.generate(decoders.decoder("llama"), [[3]])  # type: ignore[arg-type]
    with pytest.raises(CompiledAttnError, match="no decoder of transformers"):
        ca.decoder(torch.nn.Linear(2, 2))
