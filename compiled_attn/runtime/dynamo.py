"""`torch.compile(model, backend="compiled_attn")`: the same passes behind Dynamo, graph breaks and all.

Dynamo hands over one graph at a time, each between two graph breaks, with parameters and symbolic sizes as inputs. It
becomes a Program, the target's passes run, and Inductor compiles the result through AOTAutograd, so gradients work. A
graph that no Program can express goes to Inductor as it is, with a miss that says why; `strict` makes that an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from compiled_attn.ir import _torch, targets
from compiled_attn.ir.errors import CompiledAttnError, LowerError
from compiled_attn.ir.from_dynamo import wants_gradients
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.ir.targets import Target
from compiled_attn.ir.verify import verify
from compiled_attn.passes import pipelines
from compiled_attn.passes.base import Pass, PassRecord, run_passes
from compiled_attn.runtime.flat import constant_arguments, flat_module

RULE = "dynamo"
KEPT = 256  # reports of the latest graphs


@dataclass
class GraphReport:
    """What became of one graph that Dynamo handed over. program: after its passes; None where it went on unchanged."""

    number: int
    mode: str
    program: Program | None
    notes: Notes
    records: list[PassRecord] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"graph {self.number}, {self.mode}"
        nodes = "unchanged to Inductor" if self.program is None else f"{len(self.program.graph.nodes)} nodes"
        return "\n".join([f"{head}: {nodes}", *(f"  {r}" for r in self.records), *(f"  {n}" for n in self.notes)])


_reports: list[GraphReport] = []
_lock = threading.Lock()
_count = 0


def reports() -> list[GraphReport]:
    """What the passes did on each graph since `clear_reports`, oldest first; the latest 256 are kept."""
    with _lock:
        return list(_reports)


def clear_reports() -> None:
    """Forgets the reports so far."""
    global _count
    with _lock:
        _reports.clear()
        _count = 0


def backend(
    module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    target: str | Target | None = None,
    passes: Sequence[Pass] = (),
    strict: bool = False,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The function that Dynamo calls in place of the graph.

    Given through torch.compile(..., options={"target": "cpu", "passes": [...], "strict": True}), or bound by
    functools.partial.  target: by default the device of the graph's tensors.  passes: added to the target's pipeline.
    strict: a graph that no Program can express, or an op that no template serves, is an error.
    """
    chosen = dict(options or {})
    target, passes = chosen.pop("target", target), tuple(chosen.pop("passes", passes))
    strict = chosen.pop("strict", strict)
    if chosen or mode not in (None, "default"):
        given = [*chosen, *([f"mode={mode!r}"] if mode else [])]
        raise LowerError(
            "unknown option of the backend compiled_attn",
            where="torch.compile(..., backend='compiled_attn')",
            facts=f"given {', '.join(given)}; known are target, passes, strict",
            do="leave it out, or use backend='inductor' for Inductor's own options",
        )
    found = _target(target, example_inputs)
    _torch.fix_dynamo_floats(module)
    report = _new_report("train" if wants_gradients(example_inputs) else "inference")
    try:
        program = Program.from_dynamo(module, example_inputs)
        verify(program)
    except Exception as error:
        if strict:
            raise
        report.notes.miss("graph", RULE, _because(error))
        return _torch.compile_fx(module, example_inputs)
    pipeline = pipelines.default(found, program.mode, passes)
    program, report.records[:] = run_passes(program, pipeline, found, report.notes)
    return compile_flat(program, found, report, module, example_inputs, strict=strict)


def compile_flat(
    program: Program,
    target: Target,
    report: GraphReport,
    module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    strict: bool,
) -> Callable[..., Any]:
    """Lowers a program that came from `module` and compiles it with Inductor for the same arguments."""
    from compiled_attn.runtime import lower

    lower.register()
    report.program = program
    lowered = lower.lower(program, target, report.notes, strict=strict)
    flat = flat_module(lowered, inside=False)
    _torch.carry_dynamo_marks(module, flat)
    constants = constant_arguments(lowered)
    front = [n.meta["val"] for n in flat.graph.find_nodes(op="placeholder")[: len(constants)]]
    options = lower.jit_config(target, lowered)
    options.pop("freezing", None)  # parameters are inputs here, and may change between calls
    # constants go in as their fakes, of fixed size: real ones would get symbols, which no guard of Dynamo's can name
    compiled = _torch.compile_fx(flat, [*front, *example_inputs], options)
    return (lambda *args: compiled(*constants, *args)) if constants else compiled


def _target(target: str | Target | None, example_inputs: list[Any]) -> Target:
    if isinstance(target, Target):
        return target
    if target is not None and target != "auto":
        return targets.load(target)
    on_gpu = any(getattr(getattr(x, "device", None), "type", "") == "cuda" for x in example_inputs)
    return targets.load("cuda" if on_gpu else "cpu")


def _new_report(mode: str) -> GraphReport:
    global _count
    with _lock:
        report = GraphReport(_count, mode, None, Notes())
        _count += 1
        _reports.append(report)
        del _reports[:-KEPT]
        return report


def _because(error: Exception) -> str:
    if isinstance(error, CompiledAttnError):
        return f"{error.what}: {error.facts}" if error.facts else error.what
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"
