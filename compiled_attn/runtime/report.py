"""`explain` as text: what each pass did, what it did not do and because of what, and where the time went. Aligned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compiled_attn.ir.notes import Miss, Note
from compiled_attn.ir.text import type_text
from compiled_attn.passes.base import PassRecord

if TYPE_CHECKING:
    from compiled_attn.runtime.build import Build

WIDEST = 44  # a column is padded to its widest cell, but no further than this


@dataclass(frozen=True)
class Explanation:
    """Text of `explain`, and what it was made of: one build a capture."""

    title: str
    builds: tuple[Build, ...]
    events: tuple[str, ...] = ()

    @property
    def misses(self) -> list[Miss]:
        """What was not done, of every capture."""
        return [miss for build in self.builds for miss in build.notes.misses]

    @property
    def done(self) -> list[Note]:
        """What was done, of every capture."""
        return [note for build in self.builds for note in build.notes.done]

    def __str__(self) -> str:
        parts = [self.title]
        if not self.builds:
            parts.append("nothing captured yet: call the model, or give example_inputs")
        for number, build in enumerate(self.builds):
            head = [f"capture {number}"] if len(self.builds) > 1 else []
            parts.append("\n".join([*head, build_text(build)]))
        if self.events:
            parts.append("\n".join(self.events))
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        return str(self)


def explain(compiled: Any) -> Explanation:
    """The explanation of what `compile` returned, in either mode: it has `settings`, `builds` and `events`."""
    model = getattr(compiled, "model", None) or getattr(compiled, "_model", compiled)
    settings = compiled.settings
    title = f"{type(model).__name__} for {settings.target.name}, {settings.mode}"
    if settings.precision:
        title += f", {settings.precision}"
    return Explanation(title, tuple(compiled.builds), tuple(compiled.events))


def build_text(build: Build) -> str:
    """One capture: its inputs, its passes, its notes by place, the templates in its code, its seconds."""
    inputs = [("input", n.name, type_text(n.meta.get("val"))) for n in build.program.inputs]
    seconds = [("time", name, f"{spent:.2f} s") for name, spent in build.seconds.items()]
    passes = [("pass", r.name, *_pass_cells(r)) for r in build.records]
    notes = [_note_cells(record) for record in ordered(build.notes)]
    code = [("code", name, "found in the generated source", f"{n} x") for name, n in sorted(build.calls.items())]
    blocks: list[list[tuple[str, ...]]] = [[*inputs], [*passes], notes, [*code], [*seconds]]
    return "\n\n".join(aligned(block) for block in blocks if block)


def _pass_cells(record: PassRecord) -> tuple[str, str, str]:
    change = f"{record.nodes} nodes after" if record.changed else "no change"
    if record.error is not None:
        change += f", outputs differ by {record.error:.1e} of their size"
    return "exact" if record.exact else "approximate", f"{record.seconds:.2f} s", change


def _note_cells(record: Note | Miss) -> tuple[str, ...]:
    if isinstance(record, Miss):
        return record.where, f"not {record.rule}", f"because {record.because}"
    return record.where, record.rule, record.what, record.measure


def ordered(records: Iterable[Note | Miss]) -> list[Note | Miss]:
    """Records grouped by place, places in the order in which they first appear; each record once."""
    by_place: dict[str, list[Note | Miss]] = {}
    for record in dict.fromkeys(records):
        by_place.setdefault(record.where, []).append(record)
    return [record for group in by_place.values() for record in group]


def aligned(rows: Iterable[Sequence[str]], *, gap: int = 2) -> str:
    """Rows as lines whose columns begin together; a first cell that repeats the one above is left blank."""
    table = [[str(cell) for cell in row] for row in rows]
    columns = max((len(row) for row in table), default=0)
    widths = [min(WIDEST, max((len(row[i]) for row in table if i < len(row)), default=0)) for i in range(columns)]
    lines, above = [], None
    for row in table:
        cells = list(row)
        if row[0] == above:
            cells[0] = ""
        above = row[0]
        lines.append((" " * gap).join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip())
    return "\n".join(lines)
