"""What this machine can do at most, measured: a large packed matrix product, and a copy between two large arrays."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Roof:
    """gflops: best rate of a matrix product in 1e9 flop/s.  copy_gb_per_s: bytes read and written in 1e9 byte/s.

    gflops_cpu: the rate by process time, which counts all threads: what one core does while it works for us.
    """

    precision: str
    threads: int
    gflops: float
    gflops_cpu: float
    copy_gb_per_s: float

    def seconds(self, flops: float) -> float:
        """Time of that many flops if all ran at the rate of the matrix product."""
        return flops / (self.gflops * 1e9)


def measure(precision: str, *, size: int = 1536, mebibytes: int = 256, rounds: int = 7) -> Roof:
    """The roof for "float32" or "bf16" at torch's present thread count; the best of `rounds`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
        product, used = _best(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""), rounds)
    else:
        product, used = _best(lambda: a @ b, rounds)
    source = torch.ones(mebibytes * 2**20 // 4)
    target = torch.empty_like(source)
    copy, _ = _best(lambda: target.copy_(source), rounds)
    work, moved = 2 * size**3, 2 * source.numel() * 4
    return Roof(precision, torch.get_num_threads(), work / product / 1e9, work / used / 1e9, moved / copy / 1e9)


def _best(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Least wall seconds and least process seconds of one call."""
    call()
    wall, cpu = [], []
    for _ in range(rounds):
        began, used = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    return min(wall), min(cpu)
