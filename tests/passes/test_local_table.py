"""Raising local attention on stock models: how many blocks, with what sentences; copies change nothing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import copies
import pytest
import torch
from local_models import LOCAL_CASES, LocalCase

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.local_table import Row, counted, local_row, local_table, prepared

QUICK = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "maxvit_tiny_tf_224", "davit_tiny", "MistralModel")
CASES = [
    pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.deep) for name, case in LOCAL_CASES.items()
]
REMADE = [
    pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.deep)
    for name, case in LOCAL_CASES.items()
    if case.raised
]


@functools.cache
def made(name: str) -> tuple[torch.nn.Module, Program, Notes]:
    return prepared(LOCAL_CASES[name])


def check(row: Row, case: LocalCase) -> None:
    assert row.error < 1e-5, str(row)
    assert (row.raised, row.plain, row.missed) == (case.raised, case.plain, case.missed), str(row)
    assert len(row.misses) >= case.missed
    said = (*row.wholes, *row.misses)
    assert not case.because or any(case.because in sentence for sentence in said), said


@pytest.mark.parametrize("case", CASES)
def test_every_local_attention_of_a_stock_model_is_raised_or_says_why_with_eager_numbers_at_1e_5(
    case: LocalCase,
) -> None:
    check(local_row(case, *made(case.name)), case)


@pytest.mark.parametrize("case", REMADE)
@pytest.mark.parametrize(
    "change",
    [
        copies.remade,
        *(pytest.param(f, marks=pytest.mark.deep) for f in (copies.renamed, copies.split, copies.reordered)),
    ],
    ids=lambda f: f.__name__,
)
def test_a_renamed_split_or_reordered_copy_gives_the_same_row(
    case: LocalCase, change: Callable[[Program], Program]
) -> None:
    model, program, notes = made(case.name)
    row = local_row(case, model, change(program), notes)
    assert row.error < 1e-5
    assert (row.raised, row.plain, row.missed) == (case.raised, case.plain, case.missed), str(row)


@pytest.mark.parametrize(
    ("name", "change", "left", "because"),
    [
        ("swin_tiny_patch4_window7_224", copies.rolled_back_wrong, 1, "is not put back into the map"),
        ("swin_tiny_patch4_window7_224", copies.bias_bent, 0, "no function of the distance between two tokens"),
        ("maxvit_tiny_tf_224", copies.bias_bent, 0, "no function of the distance between two tokens"),
        ("MistralModel", copies.mask_bent, 0, "follow no pattern"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_copy_that_is_wrong_in_one_constant_is_refused_with_that_sentence(
    name: str, change: Callable[[Program], Program], left: int, because: str
) -> None:
    case = LOCAL_CASES[name]
    _, program, notes = made(name)
    wrong = change(program)
    row = local_row(case, wrong, wrong, notes)
    assert row.raised == left
    assert row.error < 1e-5
    assert sum(because in sentence for sentence in row.misses) == case.raised - left, row.misses


@pytest.mark.deep
@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in LOCAL_CASES.items()])
def test_the_published_sizes_leave_no_near_miss_without_a_sentence(case: LocalCase) -> None:
    row = local_row(case, *prepared(case, full=True), full=True, batch=1)
    assert row.error < 1e-4
    assert bool(row.raised) == bool(case.raised)
    assert len(row.misses) >= row.missed


def test_the_table_has_a_line_for_each_model_each_pattern_and_each_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.local_table.prepared", lambda case, **_: made(case.name))
    text = list(local_table([LOCAL_CASES["swin_tiny_patch4_window7_224"]]))
    assert text[1].startswith("swin_tiny_patch4_window7_224        2 of 3         1      0")
    assert [line.strip().startswith("plain") for line in text[2:]] == [False, False, True]


def test_lines_that_say_the_same_are_counted_behind_the_first_place() -> None:
    assert counted(["a: x", "b: x", "c: y"]) == ["a and 1 more: x", "c: y"]
