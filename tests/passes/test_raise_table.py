"""Raising on stock models of timm and transformers: how many blocks, with what sentences; copies change nothing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import copies
import pytest
import torch
from models import CASES, Case

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.passes.raise_attention import RaiseAttention

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.raising_table import Row, captured, raise_row, raising_table

QUICK_SDPA = ("vit_base_patch16_224", "cait_xxs24_224", "BertModel")
PAIRS = [
    pytest.param(case, attention, id=f"{name}-{attention}", marks=() if quick else pytest.mark.deep)
    for name, case in CASES.items()
    for attention in case.attention
    for quick in [attention == "eager" or name in QUICK_SDPA]
]
BIASED = ("beit_base_patch16_224", "swin_tiny_patch4_window7_224", "BertModel")
EAGER = [pytest.param(case, id=name) for name, case in CASES.items()]


@functools.cache
def program_of(name: str, attention: str = "eager") -> tuple[torch.nn.Module, Program]:
    return captured(CASES[name], attention)


def check(row: Row, case: Case) -> None:
    assert row.error < 1e-5, str(row)
    assert row.fused + row.written == case.blocks, str(row)
    assert row.raised == row.written - case.unraised, str(row)
    assert len(row.misses) == len(case.missed), row.misses
    assert all(part in sentence for part, sentence in zip(case.missed, row.misses, strict=True)), row.misses


@pytest.mark.parametrize(("case", "attention"), PAIRS)
def test_every_attention_of_a_stock_model_is_raised_or_says_why_with_eager_numbers_at_1e_5(
    case: Case, attention: str
) -> None:
    model, program = program_of(case.name, attention)
    row = raise_row(case, attention, model, program)
    check(row, case)
    assert (row.fused == 0) == (attention == "eager")


@pytest.mark.parametrize("case", EAGER)
@pytest.mark.parametrize(
    "change",
    [
        copies.remade,
        *(pytest.param(f, marks=pytest.mark.deep) for f in (copies.renamed, copies.split, copies.reordered)),
    ],
    ids=lambda f: f.__name__,
)
def test_a_renamed_split_or_reordered_copy_gives_the_same_row(case: Case, change: Callable[[Program], Program]) -> None:
    model, program = program_of(case.name)
    row = raise_row(case, "eager", model, change(program))
    assert row.error < 1e-5
    assert (row.fused, row.written, row.raised) == (0, case.blocks, case.blocks - case.unraised), row
    assert len(row.misses) == len(case.missed)


@pytest.mark.parametrize("case", EAGER)
def test_a_copy_with_its_softmax_over_the_wrong_axis_is_refused_with_that_sentence(case: Case) -> None:
    _, program = program_of(case.name)
    wrong = copies.softmax_over_queries(program)
    notes = Notes()
    assert RaiseAttention().run(wrong, None, notes) is wrong  # type: ignore[arg-type]
    assert sum("normalises over dimension" in m.because for m in notes.misses) == case.blocks - case.unraised


@pytest.mark.parametrize(
    "case", [pytest.param(*p.values, id=p.id, marks=() if p.id in BIASED else pytest.mark.deep) for p in EAGER]
)
@pytest.mark.parametrize("change", [copies.scale_off, copies.bias_transposed], ids=lambda f: f.__name__)
def test_a_copy_with_its_scale_off_or_its_bias_transposed_keeps_its_own_wrong_numbers_at_1e_5(
    case: Case, change: Callable[[Program], Program]
) -> None:
    _, program = program_of(case.name)
    wrong = change(program)
    row = raise_row(case, "eager", wrong, wrong)
    assert row.raised == case.blocks - case.unraised
    assert row.error < 1e-5


@pytest.mark.deep
@pytest.mark.parametrize(("case", "attention"), [(c, a) for c in CASES.values() for a in c.attention])
def test_a_static_batch_gives_the_same_row(case: Case, attention: str) -> None:
    model, program = captured(case, attention, dynamic=False)
    check(raise_row(case, attention, model, program, batch=2), case)


@pytest.mark.deep
@pytest.mark.parametrize("case", EAGER)
def test_the_published_sizes_leave_no_attention_without_a_node_or_a_sentence(case: Case) -> None:
    model, program = captured(case, "eager", full=True)
    row = raise_row(case, "eager", model, program, batch=1, full=True)
    assert row.error < 1e-4
    assert row.written and row.raised + len(row.misses) >= row.written
    assert bool(row.misses) == bool(case.missed)


def test_the_table_is_aligned_text_with_a_line_for_each_model_and_each_miss() -> None:
    case = replace(CASES["cait_xxs24_224"], attention=("eager",))
    text = raising_table([case], make=lambda case, attention, **_: program_of(case.name, attention)).splitlines()
    assert len(text) == 3
    assert text[1].startswith("cait_xxs24_224                 eager     2 of 3       2 of 3")
    assert "stands between the scores" in text[2]
