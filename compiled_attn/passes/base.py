"""What a pass is, and the runner that alone verifies, times, dumps and compares."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch.utils import _pytree as pytree

from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.ir.verify import verify

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its options.

    name: kebab-case.  exact: whether the numbers stay (up to rounding).  `run` returns the same object where nothing
    fired; it never prints, times, verifies or looks at a device.  `__call__`-free: the runner is the only caller.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]

    def run(self, program: Program, target: Target, notes: Notes) -> Program: ...


@dataclass(frozen=True)
class PassRecord:
    """What the runner saw of a pass. error: when compared, the largest difference of the outputs over their size."""

    name: str
    exact: bool
    seconds: float
    changed: bool
    nodes: int
    error: float | None = None

    def __str__(self) -> str:
        numbers = "" if self.error is None else f", outputs differ by {self.error:.1e} of their size"
        what = f"{self.nodes} nodes after{numbers}" if self.changed else "no change"
        return f"{self.name:<22} {'exact' if self.exact else 'approximate':<12} {self.seconds:6.2f} s  {what}"


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    target: Target,
    notes: Notes,
    *,
    dump: str | Path | None = None,
    compare: bool = False,
) -> tuple[Program, list[PassRecord]]:
    """Runs passes in order, verifying after each.

    dump: folder for `03-fuse-depthwise.before.txt` and `.after.txt`.  compare: also runs the program on its example
    inputs before and after each pass that fired; an exact pass that changes the numbers is an error.
    """
    records: list[PassRecord] = []
    for number, item in enumerate(passes):
        _check(item)
        began = time.perf_counter()
        changed = item.run(program, target, notes)
        if changed is not program:
            verify(changed, program, after=item.name)
        seconds = time.perf_counter() - began
        if dump is not None:
            folder = Path(dump)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02d}-{item.name}.before.txt").write_text(f"{program}\n")
            (folder / f"{number:02d}-{item.name}.after.txt").write_text(f"{changed}\n")
        error = difference(program, changed) if compare and changed is not program else None
        if error is not None and item.exact and not error < exact_tolerance(program):
            raise PassError(
                f"pass {item.name} changed the numbers",
                facts=f"it says that it is exact; the outputs differ by {error:.2e} of their size",
                do="report this model; leave the pass out meanwhile",
            )
        records.append(
            PassRecord(item.name, item.exact, seconds, changed is not program, len(changed.graph.nodes), error)
        )
        program = changed
    return program, records


def difference(before: Program, after: Program) -> float:
    """Largest difference of the outputs on each program's example inputs, relative to the largest output of `before`.

    The two are the same inputs, but for a state that a pass gave another shape.
    """
    with torch.no_grad(), torch.random.fork_rng():
        outputs = []
        for program in (before, after):
            args, kwargs = program.example_inputs
            torch.manual_seed(0)
            outputs.append(pytree.tree_leaves(program(*_clone(args), **_clone(kwargs))))
        old, new = outputs
    worst = 0.0
    for a, b in zip(old, new, strict=True):
        if isinstance(a, torch.Tensor) and a.numel():
            if a.shape != b.shape:
                return float("inf")
            size = max(a.double().abs().max().item(), 1e-12)
            worst = max(worst, (a.double() - b.double()).abs().max().item() / size)
    return worst


def exact_tolerance(program: Program) -> float:
    """What rounding alone may change, relative to the largest output: by the narrowest floating dtype in the graph."""
    narrow = 1e-4
    for node in program.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16):
                narrow = 5e-2
    return narrow


def cache_key(passes: Sequence[Pass]) -> str:
    """Digest of the passes with their options, of their source and of torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for item in passes:
        digest.update(repr(item).encode())
        module = inspect.getmodule(type(item))
        try:
            digest.update(inspect.getsource(module if module is not None else type(item)).encode())
        except (OSError, TypeError):
            digest.update(type(item).__qualname__.encode())
    return digest.hexdigest()


def _check(item: Any) -> None:
    if isinstance(item, type) or not isinstance(item, Pass):
        raise PassError(
            f"{item!r} is not a pass",
            facts="a pass is an instance with name, exact and run(program, target, notes)",
            do="pass an instance, for example ca.passes.ReorganizeTokens(keep_rate=0.7)",
        )


def _clone(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)
