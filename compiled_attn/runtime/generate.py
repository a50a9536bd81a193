"""Text from a decoder in fixed memory: prompts of any length in chunks, one token at a time, turn after turn.

decoder = ca.decoder(model, policy=HeavyHitters(recent=128), budget=512)
found = ca.generate(decoder, [[1, 5, 9]], max_new_tokens=64, stop=[2])
more = ca.generate(decoder, [[7, 3]], conversation=found.conversation)      the next turn
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compiled_attn.ir import _torch, targets
from compiled_attn.ir.errors import CaptureError, ContractError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.op import op_of
from compiled_attn.ir.program import Program
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.evict_kv import EvictKV
from compiled_attn.passes.evict_policies import Policy, SlidingWindow
from compiled_attn.passes.pipelines import portable
from compiled_attn.runtime.conversation import Conversation
from compiled_attn.runtime.decoder import captured
from compiled_attn.runtime.decoder_file import Decoder, Recipe, export_decoder, load_decoder
from compiled_attn.runtime.describe import call_of
from compiled_attn.runtime.lower import inline
from compiled_attn.runtime.sample import Sampling


def decoder(
    model: nn.Module,
    *,
    policy: Policy | None = None,
    budget: int | tuple[int, ...] = 512,
    chunk: int = 512,
    batch: int | None = None,
    compiled: bool = False,
    target: str = "auto",
) -> Decoder:
    """A decoder of transformers, unchanged, whose caches keep `budget` tokens a key head under `policy`.

    policy: None keeps all of a text, which may then be no longer than the budget.  chunk: most tokens of a prompt that
    are read at once.  batch: texts at once, None: any number.  compiled: for `target`; otherwise the rewritten programs
    run eagerly.  Raises CaptureError or PassError where the model is no decoder with a cache that can be rewritten.
    """
    limit = None if policy is not None else min((budget,) if isinstance(budget, int) else budget)
    item = EvictKV(policy or SlidingWindow(), budget, positions="positions")
    prompt, step = (captured(model, chunk, prompt=p, batch=batch, last=True) for p in (True, False))
    found = replace(rewritten(prompt, step, item, chunk=chunk), limit=limit, recipe=Recipe(model, item, chunk, batch))
    if not compiled:
        return found
    with tempfile.TemporaryDirectory(prefix="compiled_attn-") as folder:
        export_decoder(found, Path(folder) / "decoder.pt2", target=target)
        return replace(load_decoder(Path(folder) / "decoder.pt2"), recipe=found.recipe)


def rewritten(prompt: Program, step: Program, item: EvictKV, *, chunk: int) -> Decoder:
    """The decoder of a prompt's and a step's captured program (`decoder.captured`), run eagerly behind the pass."""
    here = targets.detect()
    first, one = (run_passes(program, portable([item]), here, Notes())[0] for program in (prompt, step))
    device = one.example_inputs[0][0].device
    return Decoder(runner(first), runner(one), call_of(one), chunk, device)


def runner(program: Program) -> Callable[..., Tensor]:
    """The program node by node, vocabulary ops by their decompositions: the references are loops."""
    edit = program.edit()
    for node in list(edit.graph.nodes):
        op = op_of(node.target) if node.op == "call_function" else None
        if op is not None:
            inline(edit, node, op.decomposition)
    module = _torch.quiet_module(edit.finish("decompose").to_exported())

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = module(*args, **kwargs)
        return found

    return run


@dataclass(frozen=True)
class Generation:
    """tokens: what was said, a text.  ended: why each stopped, "stop", "length" or "callback"."""

    tokens: list[list[int]]
    ended: list[str]
    conversation: Conversation


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[int | Sequence[int]] = (),
    on_token: Callable[[int, int], bool | None] | None = None,
    conversation: Conversation | None = None,
) -> Generation:
    """Continues each prompt, token by token.

    temperature, top_k, top_p, seed: how tokens are drawn (runtime/sample.py); the same seed gives the same draws, here
    and in the C++ runner.  stop: tokens, or sequences of tokens, behind which a text ends; they are part of what was
    said.  on_token: called with (text, token) for each; True ends that text.  conversation: goes on with it; else a
    fresh one.
    Raises ContractError where prompts do not fit, or where a text outgrows a cache that keeps everything.
    """
    if not isinstance(decoder, Decoder):
        raise CaptureError(
            f"generate takes a decoder, not a {type(decoder).__name__}",
            facts="a decoder holds the prompt's and the step's program, with caches of one size",
            do="make one: compiled_attn.decoder(model, policy=..., budget=...)",
        )
    sampling = Sampling(temperature, top_k, top_p, seed)
    made = conversation if conversation is not None else decoder.fresh(len(prompts))
    _check(decoder, prompts, made, max_new_tokens)
    endings = [[s] if isinstance(s, int) else list(s) for s in stop]
    logits = read(decoder, prompts, made)
    said: list[list[int]] = [[] for _ in prompts]
    ended = [""] * len(prompts)
    for count in range(1, max_new_tokens + 1):
        for text, token in enumerate(sampling.tokens(logits, made.lengths)):
            if ended[text]:
                continue
            said[text].append(token)
            made.pending[text].append(token)
            if on_token is not None and on_token(text, token):
                ended[text] = "callback"
            elif any(said[text][-len(e) :] == e for e in endings):
                ended[text] = "stop"
            elif count == max_new_tokens:
                ended[text] = "length"
        if all(ended):
            break
        logits = _next(decoder, made, [not e for e in ended])
    return Generation(said, ended, made)


def read(decoder: Decoder, prompts: Sequence[Sequence[int]], made: Conversation) -> Tensor:
    """Gives the prompts to the caches, behind what is pending, and returns the logits [B, vocabulary] of their ends.

    Shorter ones are filled up in front, with tokens at position -1 that leave no trace.
    """
    texts = [[*before, *prompt] for before, prompt in zip(made.pending, prompts, strict=True)]
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(t)) + t for t in texts])
    places = [[-1] * (longest - len(t)) + list(range(n, n + len(t))) for t, n in zip(texts, made.lengths, strict=True)]
    positions = torch.tensor(places)
    for begin in range(0, longest, decoder.chunk):
        part = slice(begin, begin + decoder.chunk)
        logits = _run(decoder.prompt, decoder, tokens[:, part], positions[:, part], made)
    made.lengths = [n + len(t) for t, n in zip(texts, made.lengths, strict=True)]
    made.pending = [[] for _ in texts]
    return logits


def _next(decoder: Decoder, made: Conversation, going: list[bool]) -> Tensor:
    """One step of the texts that go on; the caches of the others stay as they are."""
    tokens = torch.tensor([[p[0] if g else 0] for p, g in zip(made.pending, going, strict=True)])
    positions = torch.tensor([[n if g else -1] for n, g in zip(made.lengths, going, strict=True)])
    logits = _run(decoder.step, decoder, tokens, positions, made)
    for text, goes in enumerate(going):
        if goes:
            made.lengths[text] += 1
            made.pending[text] = []
    return logits


def _run(program: Any, decoder: Decoder, tokens: Tensor, positions: Tensor, made: Conversation) -> Tensor:
    device = decoder.device
    given = (tokens.contiguous().to(device), positions.contiguous().to(device))
    logits: Tensor = program(*given, made.state, slots=made.slots)
    return logits[:, -1]


def _check(decoder: Decoder, prompts: Sequence[Sequence[int]], made: Conversation, count: int) -> None:
    if len(prompts) != made.batch or not len(prompts):
        raise ContractError(
            "there is not one prompt for each text",
            facts=f"{len(prompts)} prompts, and the conversation holds {made.batch} texts",
            do="give one prompt for each text",
        )
    for text, prompt in enumerate(prompts):
        if not len(prompt) and not made.pending[text]:
            raise ContractError(
                f"prompt {text} is empty",
                facts="the first logits are those of its last token",
                do="give 1 token or more",
            )
    if decoder.limit is not None:
        longest = max(n + len(p) + len(t) for n, p, t in zip(made.lengths, made.pending, prompts, strict=True)) + max(
            count - 1, 0
        )
        if longest > decoder.limit:
            raise ContractError(
                "a text would outgrow the cache",
                facts=f"{longest} tokens, the cache keeps {decoder.limit} and no policy says what goes",
                do="name a policy, or give a greater budget",
            )
