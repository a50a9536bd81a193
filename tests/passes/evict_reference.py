"""Eviction policies as plain PyTorch on stock decoders: every token's key stays, and what is dropped is masked.

`Reference` runs a model of transformers with its own growing cache; in each layer it notes, per text and key head, the
positions that are still there, and hides the rest. The rules are loops over heads, as the papers state them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

# (kept positions in order, probabilities [queries, tokens] summed over the group, step) -> positions to keep
Rule = Callable[["Head", list[int], "Step"], list[int]]


@dataclass
class Step:
    """What one step showed a head. probabilities: [T, n], of all tokens so far, summed over the group's query heads.

    layer_mean: [T, n], the mean over all query heads of the layer.  keys: [n, D].  first: position of the first query.
    """

    probabilities: Tensor
    layer_mean: Tensor
    keys: Tensor
    first: int
    prompt: bool


@dataclass
class Head:
    """alive: positions that are kept.  hidden: those of them that the next step does not see."""

    alive: list[int] = field(default_factory=list)
    score: dict[int, float] = field(default_factory=dict)
    hidden: list[int] = field(default_factory=list)


def best(candidates: list[int], score: Callable[[int], float], count: int) -> list[int]:
    """The `count` candidates of highest score, of equal ones the later."""
    return sorted(sorted(candidates, key=lambda p: (score(p), p), reverse=True)[: max(count, 0)])


def sink_and_recent(sinks: int, budget: int) -> Rule:
    def rule(head: Head, alive: list[int], step: Step) -> list[int]:
        del head, step
        return alive if len(alive) <= budget else alive[:sinks] + alive[len(alive) - (budget - sinks) :]

    return rule


def heavy_hitters(recent: int, budget: int) -> Rule:
    def rule(head: Head, alive: list[int], step: Step) -> list[int]:
        for p in alive:
            head.score[p] = head.score.get(p, 0.0) + step.probabilities[:, p].sum().item()
        if len(alive) <= budget:
            return alive
        return best(alive[: len(alive) - recent], head.score.__getitem__, budget - recent) + alive[-recent:]

    return rule


def masked_heavy_hitters(recent: int, budget: int) -> Rule:
    """As the authors' simulation has it: columns of a mask for the step to come, which is one longer."""

    def rule(head: Head, alive: list[int], step: Step) -> list[int]:
        count = alive[-1] + 1
        for p in alive:
            head.score[p] = head.score.get(p, 0.0) + step.probabilities[:, p].sum().item()
        if count <= budget:
            return alive
        heavy = best([p for p in alive if p < count - recent], head.score.__getitem__, budget - recent)
        mask = [*heavy, *range(count + 1 - recent, count + 1)]
        head.hidden = [p for p in range(count) if p not in mask]
        return [*heavy, *range(count - recent, count)]

    return rule


def tova(budget: int) -> Rule:
    def rule(head: Head, alive: list[int], step: Step) -> list[int]:
        del head
        last = step.layer_mean[-1]
        return best(alive[:-1], lambda p: last[p].item(), budget - 1) + alive[-1:] if len(alive) > budget else alive

    return rule


def snapkv(window: int, kernel: int, budget: int) -> Rule:
    """Behind the prompt the paper's; then, in fixed memory, what leaves the window goes."""

    def rule(head: Head, alive: list[int], step: Step) -> list[int]:
        count = len(alive)
        if step.prompt:
            mass = step.probabilities[-window:, : count - window].sum(0)
            if count > window:
                pooled = nn.functional.max_pool1d(mass[None, None], kernel, 1, kernel // 2)[0, 0]
                head.score = {p: pooled[p].item() for p in range(count - window)}
        if count <= budget:
            return alive
        newest = alive[-1]
        inside = [p for p in alive if p > newest - window]
        outside = [p for p in alive if p <= newest - window]
        return best(outside, lambda p: head.score.get(p, 0.0), budget - len(inside)) + inside

    return rule


def key_norm(budget: int) -> Rule:
    def rule(head: Head, alive: list[int], step: Step) -> list[int]:
        del head
        return best(alive, lambda p: -step.keys[p].norm().item(), budget) if len(alive) > budget else alive

    return rule


def told(kept: Callable[[], list[list[list[int]]]]) -> Rule:
    """Keeps the positions that `kept` names, text by text and head by head, whatever was shown."""
    turns = itertools.count()

    def rule(head: Head, alive: list[int], step: Step) -> list[int]:
        del head, alive, step
        heads = [positions for text in kept() for positions in text]
        return list(heads[next(turns) % len(heads)])

    return rule


class Reference:
    """A model whose attention forgets: `logits(tokens)` continues the text, `kept(layer)` says what is left.

    Attention is computed at least in float32, as the op has it.

    rules: one a layer.  window: of the model's own sliding attention, 0 for none.
    """

    def __init__(self, model: nn.Module, rules: list[Rule], window: int = 0) -> None:
        self.model, self.rules, self.window = model, rules, window
        self.cache = DynamicCache()
        self.heads: list[list[list[Head]]] = [[] for _ in rules]
        self.seen = 0

    def logits(self, tokens: Tensor) -> Tensor:
        AttentionInterface.register("forgetful", self._attend)
        kind = self.model.config._attn_implementation
        self.model.set_attn_implementation("forgetful")
        positions = torch.arange(self.seen, self.seen + tokens.shape[1]).expand(tokens.shape)
        with torch.no_grad():
            out = self.model(input_ids=tokens, position_ids=positions, past_key_values=self.cache, use_cache=True)
        self.model.set_attn_implementation(kind)
        self.seen += tokens.shape[1]
        return out.logits

    def kept(self, layer: int) -> list[list[list[int]]]:
        return [[head.alive for head in text] for text in self.heads[layer]]

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **rest: Any
    ) -> tuple[Tensor, None]:
        del mask, rest
        layer, groups, total, narrow = module.layer_idx, key.shape[1], key.shape[2], query.dtype
        query, key, value = (t.to(torch.promote_types(narrow, torch.float32)) for t in (query, key, value))
        share, count = query.shape[1] // groups, query.shape[2]
        if not self.heads[layer]:
            self.heads[layer] = [[Head() for _ in range(groups)] for _ in range(key.shape[0])]
        out = torch.empty_like(query)
        places = torch.arange(total)
        for b, text in enumerate(self.heads[layer]):
            there, open_ = [], []
            for head in text:
                alive = torch.zeros(total, dtype=torch.bool)
                alive[head.alive] = True
                alive[self.seen :] = True
                there.append(alive)
                open_.append(alive.index_fill(0, torch.tensor(head.hidden, dtype=torch.int64), False))
            sees = places <= (self.seen + torch.arange(count))[:, None]
            if self.window:
                sees &= places > (self.seen + torch.arange(count))[:, None] - self.window
            weights = torch.stack(
                [
                    (query[b, h] @ key[b, h // share].T * scaling)
                    .masked_fill(~(sees & open_[h // share]), -torch.inf)
                    .softmax(-1)
                    for h in range(query.shape[1])
                ]
            )
            for h in range(query.shape[1]):
                out[b, h] = weights[h] @ value[b, h // share]
            for g, head in enumerate(text):
                alive = there[g].nonzero().squeeze(1).tolist()
                shown = weights[g * share : (g + 1) * share].sum(0)
                step = Step(shown, weights.mean(0), key[b, g], self.seen, prompt=count > 1)
                head.alive = self.rules[layer](head, alive, step)
        return out.to(narrow).transpose(1, 2), None
