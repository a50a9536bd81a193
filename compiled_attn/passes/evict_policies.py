"""Which tokens a cache of keys and values keeps: policies for `EvictKV`, one small class each, its fields the paper's.

A policy says which slots go first: `priority` ranks live slots, and behind every step those of highest priority stay,
as many as the budget allows; of equal ones the later token. What it observes is the attention that slots got in this
step. What it remembers is one number a slot. All are functions of tensors that are traced into the program.

    @dataclass(frozen=True)
    class Mine(Policy):
        def priority(self, slots: Slots) -> Tensor:
            return protected(slots, slots.mass, sinks=4)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn.ir.errors import PassError


class Slots(NamedTuple):
    """What a policy sees of one layer behind a step. N: its slots; in a prompt, those and then the new tokens.

    positions: [B, G, N], -1 where free.  newest: [B, 1, 1], the last position of each text.
    mass: [B, G, N], attention of the observed queries, summed over those that share the key head; None: not observed.
    scores: [B, G, N], what is remembered; None where nothing is.  new: how many of the N are the prompt's, 0 in decode.
    """

    positions: Tensor
    newest: Tensor
    mass: Tensor | None
    scores: Tensor | None
    new: int


@dataclass(frozen=True)
class Policy:
    """Keeps the latest tokens: the base of all, whose parts the others replace.

    observes: whose attention `mass` is: None nobody's, 0 all queries', n the last n queries'.
    remembers: whether a number a slot is kept.  rolling: whether keys are turned by their place among those kept, and
    not by their position in the text.
    """

    remembers: ClassVar[bool] = False

    @property
    def observes(self) -> int | None:
        return None

    @property
    def turns_by_place(self) -> bool:
        return False

    def start(self, keys: Tensor) -> Tensor:
        """What is remembered of new tokens at first, [B, G, T], from their keys [B, G, T, D]."""
        return keys.new_zeros(keys.shape[:3], dtype=torch.float32)

    def remember(self, slots: Slots) -> Tensor:
        """What is remembered of each slot behind this step, [B, G, N]."""
        return known(slots.scores)

    def priority(self, slots: Slots) -> Tensor:
        """[B, G, N], the lowest goes first."""
        return slots.positions.float()

    def hidden(self, slots: Slots) -> Tensor | None:
        """[B, G, N]: slots that this step's queries do not see although they stay; None: there are none.

        Asked before the attention, when `slots` has the new tokens and no mass.
        """
        del slots
        return None

    def place(self, positions: Tensor, slots: Slots) -> Tensor:
        """Places [B, n] of positions [B, n] among the tokens kept, for a policy that turns keys by them."""
        del slots
        return positions


def known(value: Tensor | None) -> Tensor:
    if value is None:
        raise PassError(
            "a policy reads what it does not observe or remember",
            facts="mass needs `observes`, scores need `remembers`",
            do="say so in the policy",
        )
    return value


def protected(slots: Slots, priority: Tensor, *, sinks: int = 0, recent: int = 0) -> Tensor:
    """The priority, with the first `sinks` and the last `recent` positions of the text above all others."""
    safe = (slots.positions < sinks) | (slots.positions > slots.newest - recent)
    return priority.masked_fill(safe, float("inf"))


@dataclass(frozen=True)
class SlidingWindow(Policy):
    """The last tokens, as many as the budget."""


@dataclass(frozen=True)
class SinkAndRecent(Policy):
    """StreamingLLM (Xiao et al., arXiv 2309.17453, section 3.2): the first `sinks` tokens and the last ones.

    rolling: keys are kept unrotated and turned, at every step, by their place in the cache, as the paper has it, so
    that no position outgrows the training length; False: by their position in the text.
    """

    sinks: int = 4
    rolling: bool = False

    @property
    def turns_by_place(self) -> bool:
        return self.rolling

    def priority(self, slots: Slots) -> Tensor:
        return protected(slots, slots.positions.float(), sinks=self.sinks)

    def place(self, positions: Tensor, slots: Slots) -> Tensor:
        """Behind the sinks the kept tokens are the last ones: their places end with the number of live slots."""
        live = (slots.positions[:, 0] >= 0).sum(1, keepdim=True)
        return torch.where(positions < self.sinks, positions, positions - slots.newest[:, 0] - 1 + live)


@dataclass(frozen=True)
class HeavyHitters(Policy):
    """H2O (Zhang et al., arXiv 2306.14048, section 4): the last `recent` tokens, and of the others those that got the
    most attention so far; each key head drops its own. What a token got is summed over the query heads of a group.
    """

    recent: int = 256
    remembers: ClassVar[bool] = True

    @property
    def observes(self) -> int | None:
        return 0

    def remember(self, slots: Slots) -> Tensor:
        return known(slots.scores) + known(slots.mass)

    def priority(self, slots: Slots) -> Tensor:
        return protected(slots, known(slots.scores), recent=self.recent)


@dataclass(frozen=True)
class MaskedHeavyHitters(HeavyHitters):
    """H2O as its authors simulate it (FMInference/H2O, `utils_hh`: a mask, and no drop), in as little memory.

    The mask behind a step is made for the next one, whose token counts among the `recent`: a token that leaves them is
    hidden for one step, its score as it was, before it is judged. What the mask hides for longer never comes back, and
    so is dropped. The published code reads a prompt at once; of one in chunks, each sees all that is kept.
    """

    def hidden(self, slots: Slots) -> Tensor | None:
        if slots.new or not self.recent:
            return None
        dropped = (slots.positions >= 0).sum(2, keepdim=True) <= slots.newest  # fewer than there were
        return (slots.positions == slots.newest - self.recent) & dropped


@dataclass(frozen=True)
class Tova(Policy):
    """TOVA (Oren et al., arXiv 2401.06104, section 3.2): the tokens that the last query attends to, by the mean over
    all heads of the layer; the newest token stays, whatever it got.
    """

    @property
    def observes(self) -> int | None:
        return 1

    def priority(self, slots: Slots) -> Tensor:
        mean = known(slots.mass).mean(1, keepdim=True).expand_as(slots.positions)
        return protected(slots, mean, recent=1)


@dataclass(frozen=True)
class SnapKV(Policy):
    """SnapKV (Li et al., arXiv 2404.14469, section 4): behind a prompt, its last `window` tokens, and of the others
    those that the window's queries attend to most, smoothed over `kernel` neighbours ("avg" or "max").

    The paper drops nothing while it generates. Here, in fixed memory, the selection stays and the window moves on: a
    token that leaves it goes. A prompt in chunks is judged anew by the window of each chunk.
    """

    window: int = 32
    kernel: int = 7
    pooling: str = "max"
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.pooling not in ("avg", "max") or self.kernel % 2 == 0 or self.window < 1:
            raise PassError(
                f"{self} smooths over no neighbours",
                facts='pooling is "avg" or "max", the kernel an odd number, the window 1 or more',
                do='for example SnapKV(window=32, kernel=7, pooling="max")',
            )

    @property
    def observes(self) -> int | None:
        return self.window

    def remember(self, slots: Slots) -> Tensor:
        if not slots.new:
            return known(slots.scores)
        kept = slots.positions.shape[2] - slots.new
        inside = slots.positions > slots.newest - self.window
        mass = known(slots.mass).masked_fill(inside, 0.0)
        old, fresh = mass.narrow(2, 0, kept), mass.narrow(2, kept, slots.new)
        return torch.cat([old, self._smoothed(fresh)], 2).masked_fill(inside, 0.0)

    def _smoothed(self, mass: Tensor) -> Tensor:
        """[B, G, T], over `kernel` neighbours; zeros stand outside, which no attention is below."""
        reach = self.kernel // 2
        wide = F.pad(mass, (reach, reach))
        near = torch.stack([wide.narrow(2, i, mass.shape[2]) for i in range(self.kernel)])
        return near.mean(0) if self.pooling == "avg" else near.amax(0)

    def priority(self, slots: Slots) -> Tensor:
        return protected(slots, known(slots.scores), recent=self.window)


@dataclass(frozen=True)
class KeyNorm(Policy):
    """Devoto et al., arXiv 2406.11430, section 3: the tokens whose keys are shortest, which get the most attention."""

    remembers: ClassVar[bool] = True

    def start(self, keys: Tensor) -> Tensor:
        return -keys.float().square().sum(3).sqrt()

    def priority(self, slots: Slots) -> Tensor:
        return known(slots.scores)


@dataclass(frozen=True)
class Protect(Policy):
    """Another policy, but the first `sinks` and the last `recent` tokens stay in any case."""

    policy: Policy = field(default_factory=SlidingWindow)
    sinks: int = 4
    recent: int = 0

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return self.policy.remembers

    @property
    def observes(self) -> int | None:
        return self.policy.observes

    @property
    def turns_by_place(self) -> bool:
        return False

    def start(self, keys: Tensor) -> Tensor:
        return self.policy.start(keys)

    def hidden(self, slots: Slots) -> Tensor | None:
        return self.policy.hidden(slots)

    def remember(self, slots: Slots) -> Tensor:
        return self.policy.remember(slots)

    def priority(self, slots: Slots) -> Tensor:
        return protected(slots, self.policy.priority(slots), sinks=self.sinks, recent=self.recent)


def pyramid(budget: int, layers: int, *, narrowing: float = 20.0) -> tuple[int, ...]:
    """Budgets that fall linearly from layer to layer around the mean `budget` (PyramidKV, Cai et al., arXiv 2406.02069,
    section 4.1): the last layer gets `budget / narrowing`, the first what makes the mean right.
    """
    if layers == 1:
        return (budget,)
    last = max(1, int(budget / narrowing))
    first = 2 * budget - last
    return tuple(round(first - (first - last) * i / (layers - 1)) for i in range(layers))
