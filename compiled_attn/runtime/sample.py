"""How a token is drawn from logits: by temperature, top-k and top-p, with draws that Python and C++ make alike.

A draw depends on the seed, the text's number in the batch and the token's position in it, on nothing else: not on the
other texts, on how a text was cut into turns, or on a generator's state. cpp/sample.cpp computes the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiled_attn.ir.errors import ContractError

_WORD = 2**64 - 1


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the likeliest token, otherwise logits are divided by it and one is drawn, of the `top_k`
    likeliest (0: all) and of the fewest whose probabilities reach `top_p`.  seed: 64 bits; None: another each time.

    Raises ContractError where a number is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, most in (("temperature", self.temperature, float("inf")), ("top_p", self.top_p, 1.0)):
            if not 0 <= value <= most or value == float("inf"):
                raise ContractError(
                    f"no token is drawn with {name}={value}",
                    facts=f"{name} is a number from 0{f' to {most:g}' if most == 1 else ''}",
                    do="for example temperature=0.8, top_p=0.95",
                )
        if self.top_k < 0:
            raise ContractError(
                f"no token is drawn with top_k={self.top_k}",
                facts="top_k counts the likeliest tokens, 0 for all",
                do="for example top_k=50",
            )
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(63))

    def tokens(self, logits: Tensor, positions: Sequence[int]) -> list[int]:
        """One token a text, of logits [B, vocabulary], for the place `positions` [B] in each text."""
        if self.temperature == 0:
            return logits.argmax(1).tolist()
        draws = [uniform(self.seed or 0, text, position) for text, position in enumerate(positions)]
        return drawn(logits.cpu(), self.temperature, self.top_k, self.top_p, draws).tolist()


def drawn(logits: Tensor, temperature: float, top_k: int, top_p: float, draws: Sequence[float]) -> Tensor:
    """One token a text, [B], of logits [B, vocabulary]: where the running sum of probabilities passes the draw."""
    scores = logits.float() / temperature
    order = scores.sort(dim=1, descending=True, stable=True)
    probabilities = order.values.softmax(1)
    before = probabilities.cumsum(1) - probabilities  # of all that are likelier
    dropped = before >= top_p
    if top_k:
        dropped |= torch.arange(scores.shape[1]) >= top_k
    dropped[:, 0] = False
    running = probabilities.masked_fill(dropped, 0.0).double().cumsum(1)
    passed = running <= running[:, -1:] * torch.tensor(draws, dtype=torch.float64).unsqueeze(1)
    place = passed.sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)  # what is not a number passes nothing
    return order.indices.gather(1, place).squeeze(1)


def uniform(seed: int, text: int, position: int) -> float:
    """A number of [0, 1) with 32 bits, by the mixing function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    return (_mixed(_mixed(_mixed(seed) + text) + position) >> 32) / 2**32


def _mixed(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
