"""Which attention of stock models is raised: blocks raised of blocks present, and for each miss its sentence.

python -m bench.raising_table            small configurations, random weights, symbolic batch
python -m bench.raising_table --full     the published sizes
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.ir.verify import verify
from compiled_attn.passes.raise_attention import RaiseAttention, attention_blocks
from compiled_attn.runtime.capture import capture

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from models import CASES, Case


@dataclass(frozen=True)
class Row:
    """One model. fused: attentions that were one SDPA node before.  written: attentions written out, of which `raised`
    became one.  error: largest difference from eager, relative to the largest output.  misses: the sentences."""

    name: str
    attention: str
    fused: int
    written: int
    raised: int
    error: float
    misses: tuple[str, ...]

    def __str__(self) -> str:
        present = self.fused + self.written
        return (
            f"{self.name:<30} {self.attention:<6} {self.fused + self.raised:>4} of {present:<4} "
            f"{self.raised:>4} of {self.written:<4} {self.error:8.1e}"
        )


HEADER = f"{'model':<30} {'as':<6} {'as one node':<12} {'raised now':<12} error"


def captured(
    case: Case, attention: str, *, dynamic: bool = True, full: bool = False
) -> tuple[torch.nn.Module, Program]:
    """The model and its Program; the batch is symbolic if `dynamic`."""
    model = case.model(attention, full=full)
    shapes = case.dynamic() if dynamic else None
    return model, capture(model, (), case.example(full=full), dynamic_shapes=shapes)


def raise_row(
    case: Case,
    attention: str,
    model: Callable[..., object],
    program: Program,
    *,
    batch: int = 3,
    full: bool = False,
) -> Row:
    """Raises the program's attention and compares it with `model` on other inputs."""
    notes = Notes()
    raised = RaiseAttention().run(program, None, notes)  # type: ignore[arg-type]
    if raised is not program:
        verify(raised, program, after=RaiseAttention.name)
    inputs = case.example(batch, full=full, seed=1)
    with torch.no_grad():
        error = largest_difference(model(**inputs), raised(**inputs))
    fused, written = attention_blocks(program)
    sentences = tuple(f"{m.where}: {m.because}" for m in notes.misses)
    return Row(case.name, attention, len(fused), len(written), len(notes.done), error, sentences)


def largest_difference(want: object, got: object) -> float:
    pairs = zip(pytree.tree_leaves(want), pytree.tree_leaves(got), strict=True)
    tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor)]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in tensors)


def raising_table(
    cases: Sequence[Case] = tuple(CASES.values()),
    *,
    dynamic: bool = True,
    full: bool = False,
    make: Callable[..., tuple[torch.nn.Module, Program]] = captured,
) -> str:
    """The table as aligned text. make: gives a case's model and Program, so that both may be at hand already."""
    lines = [HEADER]
    for case in cases:
        for attention in case.attention:
            model, program = make(case, attention, dynamic=dynamic, full=full)
            row = raise_row(case, attention, model, program, batch=3 if dynamic else 2, full=full)
            lines.append(str(row))
            lines += [f"    because {sentence}" for sentence in row.misses]
            if sys.stderr.isatty():
                print(f"\r{len(lines) - 1} lines, {case.name:<30}", end="", file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(raising_table(full="--full" in sys.argv, dynamic="--static" not in sys.argv))
