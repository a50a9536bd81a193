"""What a cache of keys and values keeps: policies as their papers state them, in plain torch, one small class each.

StreamingLLM (Xiao et al., arXiv 2309.17453), H2O (Zhang et al., arXiv 2306.14048) and SnapKV (Li et al., arXiv
2404.14469). Caches are [B, G, n, D], one per layer; every head keeps what it wants, the same number of slots.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Cache(NamedTuple):
    """One layer's state: keys and values [B, G, n, D], their tokens' positions in the text and the attention that each
    got so far, [B, G, n].
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor

    def appended(self, keys: Tensor, values: Tensor, positions: Tensor) -> "Cache":
        """With new slots behind: keys and values [B, G, t, D], positions broadcastable to [B, G, t], no score yet."""
        here = positions.expand(keys.shape[:3])
        more = (keys, values, here, torch.zeros(keys.shape[:3], device=keys.device))
        return Cache(*(torch.cat([old, new], dim=2) for old, new in zip(self, more, strict=True)))

    def scored(self, mass: Tensor) -> "Cache":
        return self._replace(scores=self.scores + mass)

    def kept(self, index: Tensor) -> "Cache":
        """Only the slots index [B, G, m], in that order."""
        wide = index[..., None].expand(*index.shape, self.keys.shape[3])
        keys, values = self.keys.gather(2, wide), self.values.gather(2, wide)
        return Cache(keys, values, self.positions.gather(2, index), self.scores.gather(2, index))


def empty(batch: int, groups: int, width: int, like: Tensor) -> Cache:
    """A cache without slots, of the type and on the device of `like`."""
    slots = like.new_empty((batch, groups, 0, width))
    shape = slots.shape[:3]
    positions = torch.empty(shape, dtype=torch.int64, device=like.device)
    return Cache(slots, slots, positions, torch.empty(shape, device=like.device))


class Policy(Protocol):
    """rolling: keys are kept unrotated, and a slot's number is its position, so that none outgrows the cache."""

    rolling: bool

    def keep(self, cache: Cache) -> Tensor | None:
        """The slots [B, G, m] to keep after a step, ascending, or None where all stay."""


@dataclass(frozen=True)
class Everything:
    rolling: bool = False

    def keep(self, cache: Cache) -> Tensor | None:  # noqa: ARG002
        return None


@dataclass(frozen=True)
class SinkAndRecent:
    """StreamingLLM: the first `start` slots, which attention leans on, and the last `recent`."""

    start: int = 4
    recent: int = 512
    rolling: bool = True

    def keep(self, cache: Cache) -> Tensor | None:
        slots = cache.keys.shape[2]
        if slots <= self.start + self.recent:
            return None
        index = torch.arange(slots, device=cache.keys.device)
        return torch.cat([index[: self.start], index[slots - self.recent :]]).expand(*cache.keys.shape[:2], -1)


@dataclass(frozen=True)
class HeavyHitters:
    """H2O: of the slots before the last `recent`, the `heavy` that got the most attention so far."""

    heavy: int = 4
    recent: int = 512
    rolling: bool = False

    def keep(self, cache: Cache) -> Tensor | None:
        slots = cache.keys.shape[2]
        if slots <= self.heavy + self.recent:
            return None
        heaviest = cache.scores[:, :, : slots - self.recent].topk(self.heavy, dim=2).indices.sort(dim=2).values
        last = torch.arange(slots - self.recent, slots, device=cache.keys.device).expand(*heaviest.shape[:2], -1)
        return torch.cat([heaviest, last], dim=2)


@dataclass(frozen=True)
class MaskedHeavyHitters:
    """H2O's published simulation: nothing is dropped; from step to step a mask hides what would have been.

    heavy_ratio, recent_ratio: budgets over the length of the prompt. `recent` counts the token to come, so every token
    is hidden for one step when it leaves the window, as in the reference (its score stays). A budget of no recent
    tokens never forgets a score, as there too.
    """

    heavy_ratio: float = 0.1
    recent_ratio: float = 0.1

    def budgets(self, prompt: int) -> tuple[int, int]:
        return int(self.heavy_ratio * prompt), int(self.recent_ratio * prompt)

    def step(self, scores: Tensor, heavy: int, recent: int) -> tuple[Tensor, Tensor]:
        """From the scores [B, H, n] after a step: the next step's mask [B, H, n + 1] of ones and zeros, and scores."""
        slots = scores.shape[2]
        shape = (*scores.shape[:2], slots + 1)
        if slots <= heavy + recent:
            return scores.new_ones(shape), scores
        mask = scores.new_zeros(shape)
        if recent:
            mask[:, :, -recent:] = 1
        if heavy:
            mask.scatter_(2, scores[:, :, : slots - recent].topk(heavy, dim=2).indices, 1.0)
        remembered = mask[:, :, :-1].clone()
        remembered[:, :, slots - recent if recent else 0 :] = 1
        return mask, scores * remembered


@dataclass(frozen=True)
class SnapKV:
    """Once, behind the prompt: the last `window` slots, and of the others those that the window's queries attend to
    most, smoothed over `kernel` neighbours; `capacity` slots in all.
    """

    window: int = 64
    capacity: int = 320
    kernel: int = 5
    pooling: str = "avgpool"

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Smoothed attention [B, H, T - window] of rotated q and k [B, H, T, D]; an average counts zeros outside."""
        window = self.window
        logits = q[:, :, -window:] @ k.transpose(2, 3) * q.shape[3] ** -0.5
        hidden = torch.ones(window, window, dtype=torch.bool, device=q.device).triu(1)
        logits = torch.cat([logits[..., :-window], logits[..., -window:].masked_fill(hidden, float("-inf"))], dim=3)
        mass = torch.softmax(logits.float(), dim=3).to(q.dtype)[..., :-window].sum(2)
        pool = F.avg_pool1d if self.pooling == "avgpool" else F.max_pool1d
        return pool(mass, self.kernel, stride=1, padding=self.kernel // 2)

    def keep(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Slots [B, H, capacity]: the best by decreasing score, then the window; None where the prompt fits."""
        length = k.shape[2]
        if length < self.capacity:
            return None
        best = self.scores(q, k).topk(self.capacity - self.window, dim=2).indices
        last = torch.arange(length - self.window, length, device=k.device).expand(*best.shape[:2], -1)
        return torch.cat([best, last], dim=2)
