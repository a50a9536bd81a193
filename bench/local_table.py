"""Which attention of stock models becomes local_attention or neighborhood_apply, which is plain, and which is missed.

python -m bench.local_table            small configurations, random weights, symbolic batch
python -m bench.local_table --full     the published sizes
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.raising_table import largest_difference
from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.passes import pipelines
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.raise_attention import RaiseAttention, attention_blocks
from compiled_attn.passes.raise_local_attention import RULE, RaiseLocalAttention, plain
from compiled_attn.passes.raise_neighborhood import RULE as MIXING
from compiled_attn.passes.raise_neighborhood import RaiseNeighborhood
from compiled_attn.passes.split_mixed_attention import SplitMixedAttention
from compiled_attn.runtime.capture import capture

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from local_models import LOCAL_CASES, LocalCase

RULES = (RULE, MIXING, RaiseAttention.name)


@dataclass(frozen=True)
class Row:
    """One model: attentions present, raised to an op of local attention, near misses; the rest is plain attention.

    error: largest difference from eager, relative to the largest output.  patterns, wholes, misses: what is said of
    those that are raised, of plain ones where something is, and of near misses.
    """

    name: str
    present: int
    raised: int
    missed: int
    error: float
    patterns: tuple[str, ...]
    wholes: tuple[str, ...]
    misses: tuple[str, ...]

    @property
    def plain(self) -> int:
        return self.present - self.raised - self.missed

    def __str__(self) -> str:
        counts = f"{self.raised:>6} of {self.present:<4} {self.plain:>6} {self.missed:>6}"
        return f"{self.name:<30} {counts}   {self.error:8.1e}"


HEADER = f"{'model':<30} {'local':>6}    {'':<4} {'plain':>6} {'missed':>6}   error"


def prepared(case: LocalCase, *, full: bool = False) -> tuple[torch.nn.Module, Program, Notes]:
    """The model, its Program with other attention than local raised to single nodes, and what that raising noted."""
    model = case.model(full=full)
    program = capture(model, (), case.case.example(full=full), dynamic_shapes=case.case.dynamic())
    notes = Notes()
    passes = [SplitMixedAttention(), RaiseNeighborhood(), *pipelines.portable()]
    program, _ = run_passes(program, passes, targets.load("cpu"), notes)
    return model, program, notes


def local_row(
    case: LocalCase, model: torch.nn.Module, program: Program, before: Notes, *, full: bool = False, batch: int = 3
) -> Row:
    """Raises the program's local attention and compares it with `model` on other inputs."""
    notes = Notes()
    raised, _ = run_passes(program, [RaiseLocalAttention()], targets.load("cpu"), notes)
    inputs = case.case.example(batch, full=full, seed=1)
    with torch.no_grad():
        error = largest_difference(model(**inputs), raised(**inputs))
    fused, written = attention_blocks(program)
    mixed = before.of(MIXING).done
    done = [*mixed, *notes.of(RULE).done]
    misses = [m for n in (before, notes) for m in n.misses if m.rule in RULES]
    return Row(
        case.name,
        len(mixed) + len(fused) + len(written),
        len(done),
        sum(not plain(m.because) for m in notes.of(RULE).misses) + len(written),
        error,
        tuple(f"{n.where}: {n.rule}, {n.what}" for n in done),
        tuple(f"{m.where}: {m.because}" for m in misses if plain(m.because)),
        tuple(f"{m.where}: {m.because}" for m in misses if not plain(m.because)),
    )


def local_table(cases: Sequence[LocalCase], *, full: bool = False) -> Iterator[str]:
    """The table, line by line: each model, its patterns with their counts, its sentences."""
    yield HEADER
    for case in cases:
        row = local_row(case, *prepared(case, full=full), full=full, batch=2 if full else 3)
        yield str(row)
        yield from (f"    {line}" for line in counted(row.patterns))
        yield from (f"    plain   {line}" for line in counted(row.wholes))
        yield from (f"    because {line}" for line in counted(row.misses))


def counted(lines: Sequence[str]) -> list[str]:
    """What lines say behind their place, each once, with the first place and how many more there are."""
    places: dict[str, list[str]] = {}
    for line in lines:
        place, _, what = line.partition(": ")
        places.setdefault(what, []).append(place)
    return [f"{where[0]}{f' and {len(where) - 1} more' if where[1:] else ''}: {what}" for what, where in places.items()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    named = [a for a in sys.argv[1:] if not a.startswith("--")]
    chosen = [LOCAL_CASES[name] for name in named] or list(LOCAL_CASES.values())
    for line in local_table(chosen, full="--full" in sys.argv):
        print(line, flush=True)
