"""Stock decoders of transformers in small random configurations, and their steps captured once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torchvision_shim  # noqa: F401
from models import enliven
from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.evict_kv import EvictKV
from compiled_attn.passes.pipelines import portable
from compiled_attn.runtime.decoder import captured

VOCABULARY, CAPACITY, WINDOW = 31, 24, 6
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def _qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def _mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, **ends))


STOCK: dict[str, Callable[[], nn.Module]] = {"llama": _llama, "qwen2": _qwen2, "mistral": _mistral, "gpt2": _gpt2}


@cache
def stock(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with lively weights, in inference mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = STOCK[name]().eval().to(dtype)
        enliven(model)
    return model.requires_grad_(False)


def decoder(name: str) -> nn.Module:
    """The model in float64, so that no rounding changes an order."""
    return stock(name, torch.float64)


@cache
def step(name: str, *, prompt: bool) -> Program:
    """The captured step behind the portable passes."""
    program = captured(decoder(name), CAPACITY, prompt=prompt)
    return run_passes(program, portable(), targets.load("cpu"), Notes())[0]


def evicting(name: str, item: EvictKV, *, prompt: bool) -> tuple[Program, Notes]:
    """The captured step behind the pass, and what it said."""
    notes = Notes()
    program, _ = run_passes(step(name, prompt=prompt), [item], targets.load("cpu"), notes)
    return program, notes
