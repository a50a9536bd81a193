"""Interleaved timing (A B C A B C ...): whatever disturbs the machine disturbs all alike, and ratios hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call. median and quartiles over rounds; cpu: process time, which counts all threads."""

    median: float
    low: float
    high: float
    best: float
    cpu_median: float

    def as_dict(self) -> dict[str, float]:
        return {
            "ms": round(self.median, 4),
            "ms_low": round(self.low, 4),
            "ms_high": round(self.high, 4),
            "ms_best": round(self.best, 4),
            "cpu_ms": round(self.cpu_median, 4),
        }


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    round_seconds: float = 0.1,
    after_round: Callable[[int], None] = lambda _done: None,
) -> dict[str, Times]:
    """Times of each call. One untimed call precedes each turn, so that nobody pays for the caches of the one before."""
    with torch.no_grad():
        repeats = {name: _repeats(call, round_seconds) for name, call in calls.items()}
        wall: dict[str, list[float]] = {name: [] for name in calls}
        cpu: dict[str, list[float]] = {name: [] for name in calls}
        for done in range(rounds):
            for name, call in calls.items():
                call()
                began, used = time.perf_counter(), time.process_time()
                for _ in range(repeats[name]):
                    call()
                wall[name].append((time.perf_counter() - began) / repeats[name] * 1e3)
                cpu[name].append((time.process_time() - used) / repeats[name] * 1e3)
            after_round(done + 1)
    return {name: _summary(wall[name], cpu[name]) for name in calls}


def _repeats(call: Callable[[], Any], seconds: float) -> int:
    call()
    began = time.perf_counter()
    call()
    return max(1, round(seconds / max(time.perf_counter() - began, 1e-6)))


def _summary(wall: list[float], cpu: list[float]) -> Times:
    ordered = sorted(wall)
    quarter = len(ordered) // 4
    return Times(
        statistics.median(ordered), ordered[quarter], ordered[-1 - quarter], ordered[0], statistics.median(cpu)
    )
