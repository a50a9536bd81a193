"""Threads are started for loops that pay for it, and for no others, where sizes are symbolic too."""

from __future__ import annotations

import re

import laws
import pytest
import torch

from compiled_attn.ir import _torch
from compiled_attn.runtime import lower
from compiled_attn.runtime.package_cache import source_digest

OPTIONS = {"cpp.dynamic_threads": True, "cpp.threads": 2, "aot_inductor.metadata": {"compiled_attn": source_digest()}}
REGION = re.compile(r"#pragma omp parallel\b.*")


def work(small: torch.Tensor, symbolic: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Maps and sums, of rows and of all."""
    return small.exp().sum(1), symbolic.softmax(1), (symbolic * 2).sum(), symbolic.amax(0)


@pytest.fixture(autouse=True)
def mended() -> None:
    lower.register()


def test_a_region_of_symbolic_sizes_asks_for_its_work_and_known_small_loops_have_none():
    small, symbolic = torch.randn(8, 16), torch.rand(3, 40)
    _torch.mark_dynamic(symbolic, frozenset({0}))
    fast, code = _torch.compile_and_read(work, small, symbolic, dynamic=False, **OPTIONS)
    found = REGION.findall(code)
    assert found and all(re.fullmatch(r".* if \(static_cast<int64_t>\(40L\*ks\d\) >= 16384\)", line) for line in found)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (2, 409, 410, 5000):  # 409.6 rows are worth threads
            given = small, torch.rand(rows, 40)
            for mine, theirs in zip(fast(*given), work(*(t.double() for t in given)), strict=True):
                laws.near(mine, theirs, 1e-5)


def test_a_region_over_a_loop_that_is_known_to_be_long_asks_for_nothing():
    given = torch.randn(8, 16), torch.rand(500, 40)
    fast, code = _torch.compile_and_read(work, *given, dynamic=False, **OPTIONS)
    assert set(REGION.findall(code)) == {"#pragma omp parallel"}
    for mine, theirs in zip(fast(*given), work(*(t.double() for t in given)), strict=True):
        laws.near(mine, theirs, 1e-5)


def test_short_loops_of_known_sizes_start_no_threads():
    given = torch.randn(8, 16), torch.randn(30, 40)
    fast, code = _torch.compile_and_read(work, *given, dynamic=False, **OPTIONS)
    assert "cpp_fused" in code and not REGION.findall(code)
    for mine, theirs in zip(fast(*given), work(*(t.double() for t in given)), strict=True):
        laws.near(mine, theirs, 1e-5)
