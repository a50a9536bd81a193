"""One layer's step over a slot cache, as torch code that `EvictKV` traces into the program.

Letters: B batch, H query heads, G key heads, S slots, T new tokens, D head width. S is the budget and one slot more,
so that a single token always finds a free one: it is written in place, attended to, and then the lowest slot is freed.
A prompt is attended to beside the cache; of its tokens only those that stay are written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_attn.ops import cache_append, cache_evict, cached_attention
from compiled_attn.passes.evict_policies import Policy, Slots

Turn = Callable[[Tensor, Tensor], Tensor]  # heads [B, *, n, D] and places [B, n] -> the heads turned by them


class Layer(NamedTuple):
    """A layer's state: keys [B, G, S, D], values [B, G, S, Dv], positions [B, G, S], scores [B, G, S] or None."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None


class New(NamedTuple):
    """A step's new tokens: queries [B, H, T, D], keys [B, G, T, D], values [B, G, T, Dv] and positions [B, T].

    Under a policy that turns keys by their place, queries and keys are not rotated.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Rule:
    """What is fixed of a layer. window: of the model's own sliding attention, 0 for none. turn_query, turn_key: the
    model's rotation, for a policy that turns keys by their place.
    """

    policy: Policy
    budget: int
    scale: float
    window: int = 0
    turn_query: Turn | None = None
    turn_key: Turn | None = None


def decode(layer: Layer, new: New, rule: Rule) -> tuple[Tensor, Layer]:
    """One token: the output [B, H, 1, Dv] and the state behind it. A token at position -1 leaves its slot free."""
    policy = rule.policy
    at = layer.positions.argmin(2, keepdim=True)  # a free slot: -1 is the lowest
    layer = Layer(
        cache_append(layer.keys, new.keys, at),
        cache_append(layer.values, new.values, at),
        cache_append(layer.positions, _for_heads(new.positions, layer), at),
        None if layer.scores is None else cache_append(layer.scores, policy.start(new.keys), at),
    )
    out, slots = _attend(layer, new, rule, 0)
    positions = cache_evict(slots.positions, policy.priority(slots), rule.budget)
    return out, layer._replace(positions=positions, scores=slots.scores)


def prompt(layer: Layer, new: New, rule: Rule) -> tuple[Tensor, Layer]:
    """Any number of tokens: the output [B, H, T, Dv] and the state behind it."""
    policy, count = rule.policy, layer.positions.shape[2]
    both = Layer(
        torch.cat([layer.keys, new.keys], 2),
        torch.cat([layer.values, new.values], 2),
        torch.cat([layer.positions, _for_heads(new.positions, layer)], 2),
        None if layer.scores is None else torch.cat([layer.scores, policy.start(new.keys)], 2),
    )
    out, slots = _attend(both, new, rule, new.keys.shape[2])
    positions = cache_evict(slots.positions, policy.priority(slots), rule.budget)
    old, fresh = positions[:, :, :count], positions[:, :, count:]
    at = free_slots(old, fresh >= 0)
    scores = None
    if slots.scores is not None:
        scores = cache_append(slots.scores[:, :, :count], slots.scores[:, :, count:], at)
    return out, Layer(
        cache_append(layer.keys, new.keys, at),
        cache_append(layer.values, new.values, at),
        cache_append(old, fresh, at),
        scores,
    )


def _attend(layer: Layer, new: New, rule: Rule, count: int) -> tuple[Tensor, Slots]:
    policy = rule.policy
    newest = new.positions.amax(1)[:, None, None]
    slots = Slots(layer.positions, newest, None, layer.scores, count)
    queries, keys = new.queries, layer.keys
    if rule.turn_query is not None and rule.turn_key is not None:
        queries = rule.turn_query(queries, policy.place(new.positions, slots))
        keys = rule.turn_key(keys, policy.place(layer.positions[:, 0], slots))
    hidden = policy.hidden(slots)
    out, mass = cached_attention(
        queries,
        keys,
        layer.values,
        layer.positions if hidden is None else layer.positions.masked_fill(hidden, -1),
        new.positions,
        scale=rule.scale,
        window=rule.window,
        tail=policy.observes or 0,
    )
    slots = slots._replace(mass=None if policy.observes is None else mass.float())
    return out, slots._replace(scores=policy.remember(slots)) if policy.remembers else slots


def _for_heads(positions: Tensor, layer: Layer) -> Tensor:
    """[B, T] -> [B, G, T]."""
    return positions.unsqueeze(1).expand(-1, layer.keys.shape[1], -1)


def free_slots(positions: Tensor, wanted: Tensor) -> Tensor:
    """[B, G, T]: for the n-th wanted token the n-th free slot of positions [B, G, S], -1 for the others."""
    count = positions.shape[2]
    free = positions < 0
    slot = torch.arange(count, device=positions.device).expand(positions.shape)
    place = torch.where(free, free.cumsum(2) - 1, count)
    listed = positions.new_zeros((*positions.shape[:2], count + 1)).scatter(2, place, slot)
    number = (wanted.cumsum(2) - 1).clamp(min=0, max=count)
    return torch.where(wanted, listed.gather(2, number), -1)
