"""Eviction in captured decoders: kept positions and logits are those of a plain reference, or of the full cache."""

from __future__ import annotations

import copy
from typing import Any

import decoders
import laws
import pytest
import torch
from decoders import VOCABULARY, WINDOW
from passes import evict_reference as plain
from torch import nn

from compiled_attn.ir import _torch, targets
from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.evict_kv import EvictKV
from compiled_attn.passes.evict_policies import (
    HeavyHitters,
    KeyNorm,
    MaskedHeavyHitters,
    Policy,
    Protect,
    SinkAndRecent,
    SlidingWindow,
    SnapKV,
    Tova,
    pyramid,
)
from compiled_attn.passes.pipelines import portable
from compiled_attn.runtime.decoder import cache_shapes, captured

BUDGET, PROMPT, STEPS = 7, 11, 8
POLICIES: dict[str, tuple[Policy, Any]] = {
    "sliding window": (SlidingWindow(), plain.sink_and_recent(0, BUDGET)),
    "sinks and recent": (SinkAndRecent(sinks=2), plain.sink_and_recent(2, BUDGET)),
    "h2o": (HeavyHitters(recent=3), plain.heavy_hitters(3, BUDGET)),
    "h2o, simulated": (MaskedHeavyHitters(recent=3), plain.masked_heavy_hitters(3, BUDGET)),
    "tova": (Tova(), plain.tova(BUDGET)),
    "snapkv": (SnapKV(window=3, kernel=3), plain.snapkv(3, 3, BUDGET)),
    "key norm": (KeyNorm(), plain.key_norm(BUDGET)),
    "protected": (Protect(SlidingWindow(), sinks=2), plain.sink_and_recent(2, BUDGET)),
}


class Session:
    """A prompt program and a step program over one state."""

    def __init__(self, prompt: Program, step: Program, batch: int = 2) -> None:
        self.runs = [_torch.quiet_module(p.to_exported()) for p in (prompt, step)]
        args, kwargs = copy.deepcopy(prompt.example_inputs)
        self.state, self.slots = args[2], kwargs.get("slots", {})
        assert args[0].shape[0] == batch
        self.seen = 0

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        count = tokens.shape[1]
        if positions is None:
            positions = torch.arange(self.seen, self.seen + count).expand(tokens.shape).contiguous()
        self.seen += count
        run = self.runs[1] if count == 1 else self.runs[0]
        return run(tokens, positions, self.state, **({"slots": self.slots} if self.slots else {}))

    def kept(self, layer: int) -> list[list[list[int]]]:
        return [
            [sorted(p for p in head if p >= 0) for head in text] for text in self.slots["positions"][layer].tolist()
        ]


def session(name: str, item: EvictKV) -> Session:
    return Session(*(decoders.evicting(name, item, prompt=p)[0] for p in (True, False)))


def text(length: int = PROMPT + STEPS) -> torch.Tensor:
    """Two texts without a repeated token, whose keys would be equally long."""
    random = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(VOCABULARY, generator=random)[:length] for _ in range(2)])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", decoders.STOCK)
def test_kept_positions_and_logits_are_those_of_the_policy_in_plain_pytorch(name, policy):
    ours, rule = POLICIES[policy]
    model, tokens = decoders.decoder(name), text()
    found = session(name, EvictKV(ours, BUDGET, positions="positions"))
    wanted = plain.Reference(model, [rule] * 2, window=WINDOW if name == "mistral" else 0)
    for chunk in tokens.split([PROMPT, *[1] * STEPS], 1):
        laws.near(found.logits(chunk), wanted.logits(chunk), 1e-6)
        for layer in range(2):
            assert found.kept(layer) == wanted.kept(layer)


def full_logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("name", decoders.STOCK)
def test_a_budget_of_the_texts_length_gives_the_logits_of_the_full_cache(name):
    tokens = text()
    found = session(name, EvictKV(Tova(), tokens.shape[1], positions="positions"))
    logits = torch.cat([found.logits(chunk) for chunk in tokens.split([PROMPT, *[1] * STEPS], 1)], 1)
    laws.near(logits, full_logits(decoders.decoder(name), tokens), 1e-6)


def test_positions_may_be_counted_by_the_program_itself():
    tokens = text()
    item = EvictKV(SinkAndRecent(sinks=2), BUDGET)
    counted, told = session("llama", item), session("llama", EvictKV(item.policy, BUDGET, positions="positions"))
    for chunk in tokens.split([PROMPT, *[1] * STEPS], 1)[:3]:
        laws.near(counted.logits(chunk), told.logits(chunk), 1e-12)


def test_budgets_may_differ_from_layer_to_layer():
    budgets, tokens = pyramid(8, 2, narrowing=2.0), text()
    assert budgets == (12, 4)
    found = session("llama", EvictKV(SinkAndRecent(sinks=2), budgets, positions="positions"))
    wanted = plain.Reference(decoders.decoder("llama"), [plain.sink_and_recent(2, b) for b in budgets])
    for chunk in tokens.split([PROMPT, *[1] * STEPS], 1):
        laws.near(found.logits(chunk), wanted.logits(chunk), 1e-6)
    assert [len(found.kept(layer)[0][0]) for layer in range(2)] == list(budgets)


def of_the_zoo() -> Any:
    """The zoo's Llama with the stock one's weights."""
    from compiled_attn.zoo.sinklora import Config, SinkLoRA

    sizes = {"vocabulary": VOCABULARY, "width": 32, "hidden": 48, "depth": 2, "heads": 4, "groups": 2}
    zoo = SinkLoRA(Config(**sizes)).double()
    keys = zoo.load_state_dict(decoders.decoder("llama").state_dict(), strict=False)
    assert not keys.missing_keys and not keys.unexpected_keys
    return zoo


def test_rolling_positions_are_those_of_the_zoos_streaming_llm():
    from compiled_attn.zoo.layers import eviction

    tokens, zoo = text(), of_the_zoo()
    found = session("llama", EvictKV(SinkAndRecent(sinks=2, rolling=True), BUDGET, positions="positions"))
    policy, caches, start = eviction.SinkAndRecent(start=2, recent=BUDGET - 2), zoo.caches(2), 0
    with torch.no_grad():
        for chunk in tokens.split([PROMPT, *[1] * STEPS], 1):
            logits, caches = zoo.extend(chunk, caches, policy, start)
            laws.near(found.logits(chunk), logits, 1e-5)
            start += chunk.shape[1]


def test_h2os_simulation_is_the_zoos_which_is_held_to_the_published_code():
    from compiled_attn.zoo.layers import eviction

    tokens, zoo, recent = text(), of_the_zoo(), 3
    found = session("llama", EvictKV(MaskedHeavyHitters(recent=recent), BUDGET, positions="positions"))
    ratios = [(n + 0.5) / PROMPT for n in (BUDGET - recent, recent)]
    policy, caches, masks = eviction.MaskedHeavyHitters(*ratios), zoo.caches(2), [None, None]
    assert policy.budgets(PROMPT) == (BUDGET - recent, recent)
    with torch.no_grad():
        for chunk in tokens.split([PROMPT, *[1] * STEPS], 1):
            logits, caches, masks = zoo.extend_masked(chunk, caches, masks, policy, PROMPT)
            laws.near(found.logits(chunk), logits, 1e-5)
    count = PROMPT + STEPS
    for layer, mask in enumerate(masks):
        kept = [[sorted({*h.nonzero().flatten().tolist(), count - recent} - {count}) for h in t] for t in mask]
        assert found.kept(layer) == kept


def test_texts_of_different_length_are_answered_as_if_each_were_alone():
    tokens = text(PROMPT + 3)
    item = EvictKV(HeavyHitters(recent=3), BUDGET, positions="positions")
    padded, alone = session("llama", item), session("llama", item)
    missing = 4  # in front of the second text
    positions = torch.arange(PROMPT).expand(2, -1).clone()
    positions[1] = torch.arange(PROMPT) - missing
    positions[1, :missing] = -1
    mixed = [padded.logits(tokens[:, :PROMPT], positions)[:, -1]]
    single = [alone.logits(tokens[1:, missing:PROMPT].expand(2, -1).contiguous())[:, -1]]
    for i in range(3):
        at = torch.tensor([[PROMPT + i], [PROMPT - missing + i]])
        mixed.append(padded.logits(tokens[:, PROMPT + i : PROMPT + i + 1], at)[:, -1])
        single.append(alone.logits(tokens[1:, PROMPT + i : PROMPT + i + 1].expand(2, -1).contiguous())[:, -1])
    laws.near(torch.stack(mixed)[:, 1], torch.stack(single)[:, 1], 1e-9)
    assert padded.kept(0)[1] == alone.kept(0)[1]


class OtherMask(nn.Module):
    """A step whose attention sees everything but the newest token."""

    def forward(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        index = torch.arange(1) + seen
        keys.index_copy_(2, index, q)
        values.index_copy_(2, index, q)
        seen.add_(1)
        mask = torch.arange(8)[None, :] < index[:, None]
        return nn.functional.scaled_dot_product_attention(q, keys, values, mask)


def test_an_attention_with_another_mask_is_refused_with_its_reason():
    from compiled_attn.ir import targets
    from compiled_attn.ir.notes import Notes
    from compiled_attn.runtime.capture import capture

    caches = (torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4), torch.tensor(0))
    program = capture(OtherMask(), (torch.zeros(1, 2, 1, 4), *caches))
    with pytest.raises(PassError, match="its mask is neither causal"):
        EvictKV(SlidingWindow(), 4).run(program, targets.load("cpu"), Notes())


def test_what_does_not_fit_is_refused_in_words():
    with pytest.raises(PassError, match="given 3 budgets"):
        decoders.evicting("llama", EvictKV(SlidingWindow(), (4, 4, 4)), prompt=False)
    with pytest.raises(PassError, match="the model does not rotate them"):
        decoders.evicting("gpt2", EvictKV(SinkAndRecent(rolling=True), 4, positions="positions"), prompt=False)
    with pytest.raises(PassError, match="needs an argument with the positions"):
        decoders.evicting("llama", EvictKV(SinkAndRecent(rolling=True), 4, positions="tokens_at"), prompt=False)
    with pytest.raises(PassError, match="keeps no token"):
        EvictKV(SlidingWindow(), 0)


def test_keys_repeated_in_another_dimension_are_refused():
    from compiled_attn.passes.evict_match import Unlike, cached_layer
    from compiled_attn.runtime.capture import capture

    class Repeats(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.dim = dim

        def forward(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            repeated = (t.repeat_interleave(2, self.dim) for t in (keys, values))
            return nn.functional.scaled_dot_product_attention(q, *repeated)

    for dim, because in ((1, "no index_copy"), (2, "otherwise than head by head")):
        q, cache = torch.zeros(1, 4 if dim == 1 else 2, 8, 4), torch.zeros(1, 2, 8, 4)
        program = capture(Repeats(dim), (q, cache, cache.clone()))
        node = next(n for n in program.graph.nodes if "scaled_dot" in n.name)
        with pytest.raises(Unlike, match=because):
            cached_layer(program, program.graph, node)


def test_notes_say_what_became_of_each_cache():
    _, notes = decoders.evicting("llama", EvictKV(SinkAndRecent(), 7), prompt=False)
    lines = [str(note) for note in notes.of("evict-kv").done]
    assert len(lines) == 2 and all("24 -> 7 tokens" in line and "approximate" in line for line in lines)


def test_a_bias_of_positions_in_the_mask_is_no_causal_mask():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)).eval()
    passes = [*portable(), EvictKV(SinkAndRecent(sinks=2), BUDGET)]
    with pytest.raises(PassError, match="adds numbers to the scores"):
        run_passes(captured(model, 12, prompt=False), passes, targets.load("cpu"), Notes())


def test_a_decoder_whose_attention_is_not_recognised_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).eval()
    passes = [*portable(), EvictKV(SinkAndRecent(sinks=2), BUDGET)]
    with pytest.raises(PassError, match="soft cap"):
        run_passes(captured(model, 12, prompt=False), passes, targets.load("cpu"), Notes())


def test_the_caches_of_a_decoder_with_one_key_head_are_those_that_it_makes():
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = FalconForCausalLM(FalconConfig(**sizes, alibi=False, new_decoder_architecture=False)).eval()
    assert cache_shapes(model) == [(1, 8, 8)]
    assert captured(model, 12, prompt=False)
