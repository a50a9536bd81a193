"""What passes did, and what they did not do and because of what: the raw material of `explain`."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx


@dataclass(frozen=True)
class Note:
    """Something that a pass did at one place."""

    rule: str
    where: str
    what: str
    measure: str = ""

    def __str__(self) -> str:
        return f"{self.where:<28} {self.rule:<20} {self.what}" + (f"   {self.measure}" if self.measure else "")


@dataclass(frozen=True)
class Miss:
    """Something that a pass did not do at one place, and because of what."""

    rule: str
    where: str
    because: str

    def __str__(self) -> str:
        return f"{self.where:<28} not {self.rule:<16} because {self.because}"


@dataclass
class Notes:
    """Collects notes in order; `where` is derived from a node's module path when a node is given."""

    records: list[Note | Miss] = field(default_factory=list)

    def did(self, where: fx.Node | str, rule: str, what: str, measure: str = "") -> None:
        self.records.append(Note(rule, place(where), what, measure))

    def miss(self, where: fx.Node | str, rule: str, because: str) -> None:
        self.records.append(Miss(rule, place(where), because))

    def of(self, rule: str) -> "Notes":
        return Notes([r for r in self.records if r.rule == rule])

    @property
    def done(self) -> list[Note]:
        return [r for r in self.records if isinstance(r, Note)]

    @property
    def misses(self) -> list[Miss]:
        return [r for r in self.records if isinstance(r, Miss)]

    def __iter__(self) -> Iterator[Note | Miss]:
        return iter(self.records)

    def __str__(self) -> str:
        return "\n".join(str(r) for r in self.records)


def place(where: fx.Node | str) -> str:
    """The module path of a node as the user wrote it (`blocks.0.attn`), or the node's name where it has none."""
    if isinstance(where, str):
        return where
    return module_path(where) or where.name


def module_path(node: fx.Node) -> str:
    """Path of the innermost user module that a node came from; empty for the top level."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else path
    path = path.removeprefix("L['self'].").removeprefix("L['self']")
    return path.removeprefix("L__self___")


def user_line(node: fx.Node) -> str:
    """The last line of user code that a node came from (`file.py:12 in forward: x = ...`), or an empty string."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    files = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not files:
        return ""
    last = files[-1]
    return " ".join(lines[last : last + 2])
