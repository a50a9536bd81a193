"""Kept positions behind a prompt are those of kvpress 0.5.5, in the same run, where it defines a policy as we do.

The same: StreamingLLM (sinks and the last tokens), TOVA (the last query's attention, mean over all heads; the newest
token stays), SnapKV with average pooling over zeros beyond the ends, and the key norm. Not the same, and so not here:
kvpress's SnapKV has no max pooling, its ObservedAttention divides what a token got by how many queries saw it, which
H2O does not; none of them drops anything while it generates, so only the prompt is compared. (Behind it ours are held
to plain PyTorch in test_evict_kv.py.) kvpress takes no GPT-2; behind Mistral's window transformers' cache has dropped
tokens before a press sees them.

Its presses are imported one by one: the package itself replaces transformers' attention when it is imported, and asks
for packages that only its other presses need. Its own hook reads an argument that transformers no longer passes, so the
test calls `compress` with what the attention layer was given.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import decoders
import pytest
import torch
from decoders import CAPACITY, VOCABULARY
from passes.test_evict_kv import Session
from transformers import DynamicCache

from compiled_attn.passes.evict_kv import EvictKV
from compiled_attn.passes.evict_policies import KeyNorm, Policy, SinkAndRecent, SnapKV, Tova

BUDGET, PROMPT = 9, CAPACITY - 4
RATIO = 1 - (BUDGET + 0.5) / PROMPT  # of which kvpress makes BUDGET
CASES: dict[str, tuple[Policy, str, str, dict[str, int]]] = {
    "sinks and recent": (SinkAndRecent(sinks=3), "streaming_llm_press", "StreamingLLMPress", {"n_sink": 3}),
    "tova": (Tova(), "tova_press", "TOVAPress", {}),
    "snapkv": (
        SnapKV(window=4, kernel=5, pooling="avg"),
        "snapkv_press",
        "SnapKVPress",
        {"window_size": 4, "kernel_size": 5},
    ),
    "key norm": (KeyNorm(), "knorm_press", "KnormPress", {}),
}


@pytest.fixture
def presses(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a press by its file and class."""
    found = importlib.util.find_spec("kvpress")
    assert found and found.submodule_search_locations, "README's second block installs kvpress"
    package = types.ModuleType("kvpress")
    package.__path__ = list(found.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "kvpress", package)
    return lambda file, name: getattr(importlib.import_module(f"kvpress.presses.{file}"), name)


def kept_by(press: Any, model: Any, tokens: torch.Tensor) -> list[list[list[list[int]]]]:
    """Layer, text, key head: positions behind the prompt, ascending."""
    cache, found = DynamicCache(), []

    def behind(module: Any, _args: Any, kwargs: Any, _output: Any) -> None:
        keys = cache.layers[module.layer_idx].keys
        places = torch.arange(keys.shape[2], dtype=keys.dtype)[:, None].expand_as(keys)
        _, kept = press.compress(module, kwargs["hidden_states"], keys, places, None, kwargs)
        found.append(kept[..., 0].sort(2).values.long().tolist())

    hooks = [layer.self_attn.register_forward_hook(behind, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("policy", CASES)
def test_what_is_kept_behind_a_prompt_is_what_kvpress_keeps(name: str, policy: str, presses: Any) -> None:
    ours, file, press, options = CASES[policy]
    random = torch.Generator().manual_seed(7)
    tokens = torch.stack([torch.randperm(VOCABULARY, generator=random)[:PROMPT] for _ in range(2)])
    wanted = kept_by(presses(file, press)(compression_ratio=RATIO, **options), decoders.decoder(name), tokens)
    program, _ = decoders.evicting(name, EvictKV(ours, BUDGET, positions="positions"), prompt=True)
    found = Session(program, program)
    found.logits(tokens)
    assert [found.kept(layer) for layer in range(2)] == wanted
    assert all(len(head) == BUDGET for layer in wanted for text in layer for head in text)
