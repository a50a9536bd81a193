"""Eviction in bfloat16 decoders, stock and the zoo's: the rule in the same precision, and float32 as the reference."""

from __future__ import annotations

import copy
from functools import cache, partial

import decoders
import laws
import pytest
import torch
from decoders import VOCABULARY
from passes import evict_reference as plain
from passes.test_evict_kv import BUDGET, POLICIES, PROMPT, STEPS, text
from torch import nn

import compiled_attn as ca
from compiled_attn.zoo.sinklora import Config, SinkLoRA

# of the largest logit: one rounding of the type, where all else is the same; and what two layers of them add up to
SAME, NARROW = 2**-7, 5e-2
CASES = [
    ("llama", "sinks and recent"),
    ("llama", "h2o"),
    ("llama", "tova"),
    ("llama", "snapkv"),
    ("sinklora", "sinks and recent"),
    ("sinklora", "h2o"),
]


@cache
def stock() -> nn.Module:
    """The stock Llama in bfloat16, its rotation's frequencies in float32 as `from_pretrained` leaves them."""
    model = copy.deepcopy(decoders.stock("llama", torch.bfloat16))
    model.model.rotary_emb.inv_freq = decoders.stock("llama").model.rotary_emb.inv_freq
    return model


def decoder(name: str, dtype: torch.dtype) -> nn.Module:
    """The stock Llama, or the zoo's with its weights."""
    theirs = stock() if dtype == torch.bfloat16 else decoders.stock("llama", dtype)
    if name == "llama":
        return theirs
    sizes = {"vocabulary": VOCABULARY, "width": 32, "hidden": 48, "depth": 2, "heads": 4, "groups": 2}
    zoo = SinkLoRA(Config(**sizes)).eval().to(dtype)
    keys = zoo.load_state_dict(theirs.state_dict(), strict=False)
    assert not keys.missing_keys and not keys.unexpected_keys
    return zoo.requires_grad_(False)


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_kept_positions_are_those_of_the_rule_in_bfloat16_and_logits_are_within_its_rounding(name, policy):
    ours, rule = POLICIES[policy]
    found = ca.decoder(decoder(name, torch.bfloat16), policy=ours, budget=BUDGET, chunk=PROMPT)
    talk = found.fresh(2)
    assert {t.dtype for t in talk.state["keys"]} == {torch.bfloat16}
    same = plain.Reference(stock(), [rule] * 2)
    wide = plain.Reference(copy.deepcopy(stock()).float(), [plain.told(partial(talk.kept, i)) for i in range(2)])
    for chunk in text().split([PROMPT, *[1] * STEPS], 1):
        begin = talk.lengths[0]
        positions = torch.arange(begin, begin + chunk.shape[1]).expand(2, -1).contiguous()
        run = found.prompt if chunk.shape[1] > 1 else found.step
        logits = run(chunk.contiguous(), positions, talk.state, slots=talk.slots)
        talk.lengths = [begin + chunk.shape[1]] * 2
        assert logits.dtype == torch.bfloat16
        laws.near(logits, same.logits(chunk)[:, -1:], SAME)
        for layer in range(2):
            assert talk.kept(layer) == same.kept(layer)
        laws.near(logits, wide.logits(chunk)[:, -1:], NARROW)


def test_the_zoos_decoder_in_float64_keeps_what_the_stock_one_keeps():
    ours, rule = POLICIES["h2o"]
    found = ca.decoder(decoder("sinklora", torch.float64), policy=ours, budget=BUDGET, chunk=PROMPT)
    wanted = plain.Reference(decoders.decoder("llama"), [rule] * 2)
    talk, whole = found.fresh(2), text()
    ca.generate(found, whole[:, :PROMPT].tolist(), max_new_tokens=0, conversation=talk)
    wanted.logits(whole[:, :PROMPT])
    assert [talk.kept(layer) for layer in range(2)] == [wanted.kept(layer) for layer in range(2)]
