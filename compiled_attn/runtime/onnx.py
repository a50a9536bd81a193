"""ONNX: a Program with its vocabulary ops decomposed, written by torch's exporter and checked."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from compiled_attn.ir import targets
from compiled_attn.ir.errors import LowerError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.op import op_of
from compiled_attn.ir.program import Program
from compiled_attn.passes import pipelines
from compiled_attn.passes.base import Pass, run_passes
from compiled_attn.runtime import describe
from compiled_attn.runtime.capture import capture
from compiled_attn.runtime.contract import ConstantSpec

OPSET = 20  # attention becomes MatMul and Softmax; from 23 on it is one Attention op
NEEDED = ("onnx", "onnxscript")


@dataclass(frozen=True)
class OnnxFile:
    """What was written. inputs, outputs: name -> shape, with names for dimensions that vary.

    error: largest difference from the program in eager mode on the example inputs, relative to the largest output;
    None where ONNX Runtime was not asked.
    """

    path: Path
    opset: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    notes: Notes
    error: float | None = None

    def __str__(self) -> str:
        size = self.path.stat().st_size / 1e6
        lines = [f"file     {self.path.name:<20} {size:.1f} MB, opset {self.opset}"]
        lines += [f"input    {k:<20} {list(v)}" for k, v in self.inputs.items()]
        lines += [f"output   {k:<20} {list(v)}" for k, v in self.outputs.items()]
        if self.error is not None:
            lines.append(f"checked  {'ONNX Runtime':<20} differs by {self.error:.1e} of the largest output")
        return "\n".join(lines)


def export_onnx(
    model: nn.Module | Program,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    path: str | Path,
    opset: int = OPSET,
    dynamic_shapes: Any = None,
    passes: Sequence[Pass] = (),
    check: bool = False,
    tolerance: float = 1e-3,
) -> OnnxFile:
    """Writes `model` as an ONNX file, with the names of its inputs and outputs, and lets onnx's checker read it.

    model: a module with its example inputs, or a Program as it stands.  opset: 18 to 25.
    dynamic_shapes: as `compile` takes it; the names of dimensions appear in the file.
    passes: run before, after attention was raised.  check: also runs the file in ONNX Runtime on the example inputs,
    and raises where an output differs by more than `tolerance` of the largest one.
    Raises CaptureError, PassError or ContractError; LowerError where torch has no ONNX form for an op, where the file
    does not pass the checker, or where onnx, onnxscript or (for `check`) onnxruntime is not installed.
    """
    _need(*NEEDED, *(["onnxruntime"] if check else []))
    notes = Notes()
    program = model if isinstance(model, Program) else capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    target = targets.load("cpu")
    program, _ = run_passes(program, pipelines.portable(passes), target, notes)
    call = describe.call_of(program, dynamic_shapes=dynamic_shapes)
    onnx_program = _convert(program, opset)
    named = [o for o in call.outputs if not isinstance(o, ConstantSpec)]
    _rename(onnx_program.model, [o.name for o in named], _symbols(program, call))
    path = Path(path)
    onnx_program.save(str(path))
    _check_file(path)
    graph = onnx_program.model.graph
    written = OnnxFile(path, opset, _shapes(graph.inputs), _shapes(graph.outputs), notes)
    if not check:
        return written
    return _checked(written, program, tolerance)


def run_onnx(path: str | Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs by name of one run in ONNX Runtime on the CPU. Raises LowerError where it is not installed."""
    _need("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    feed = {k: v.detach().cpu().numpy() for k, v in inputs.items() if k in wanted}
    names = [o.name for o in session.get_outputs()]
    return {k: torch.from_numpy(v) for k, v in zip(names, session.run(names, feed), strict=True)}


def _need(*packages: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise LowerError(
            "ONNX export lacks a package",
            where="export to .onnx",
            facts=f"it needs {', '.join(packages)}; not installed: {', '.join(missing)}",
            do="pip install 'compiled-attn[onnx]'",
        )


def decomposed(program: Program) -> torch.export.ExportedProgram:
    """The exported program with every vocabulary op replaced by its decomposition."""
    table = {}
    for node in program.graph.nodes:
        op = op_of(node.target) if node.op == "call_function" else None
        if op is not None:
            table[node.target] = op.decomposition
    exported = program.to_exported()
    return exported.run_decompositions(table) if table else exported


def _convert(program: Program, opset: int) -> Any:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(decomposed(program), dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = error.__cause__
        raise LowerError(
            "torch can not write this program as ONNX",
            where=str(cause).splitlines()[0][:300] if cause is not None and str(cause) else "",
            facts=f"{type(error).__name__}: {lines[0][:300] if lines else ''}",
            do=f"try another opset than {opset}, or leave the op that it names out of the model",
        ) from error


def _symbols(program: Program, call: Any) -> dict[str, str]:
    """torch's symbol (`s77`) -> the name that the user gave the dimension."""
    plain = describe.call_of(program)
    names: dict[str, str] = {}
    for mine, theirs in zip(plain.tensors, call.tensors, strict=True):
        for a, b in zip(mine.shape, theirs.shape, strict=True):
            if isinstance(a, str) and isinstance(b, str) and a != b:
                names[a] = b
    return names


def _rename(model: Any, outputs: list[str], symbols: Mapping[str, str]) -> None:
    """Gives the graph's outputs their names, and its symbolic dimensions the user's."""
    import onnx_ir

    graph = model.graph
    if len(graph.outputs) != len(outputs):
        raise LowerError(
            "the ONNX graph has other outputs than the program",
            facts=f"{len(graph.outputs)} in the file, {len(outputs)} in the program",
            do="return each tensor once, and no input unchanged",
        )
    taken = {v.name for node in graph for v in node.outputs} | {v.name for v in graph.inputs}
    for value, name in zip(graph.outputs, outputs, strict=True):
        if value.name != name and name in taken:
            for node in graph:
                for other in node.outputs:
                    if other.name == name and other is not value:
                        other.name = f"{name}_inner"
        value.name = name
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b") if symbols else None
    for value in [*graph.inputs, *(v for node in graph for v in node.outputs)]:
        if pattern is None or value.shape is None:
            continue
        dims = [
            dim
            if isinstance(dim, int) or dim.value is None
            else onnx_ir.SymbolicDim(pattern.sub(lambda m: symbols[m[0]], str(dim.value)))
            for dim in value.shape.dims
        ]
        value.shape = onnx_ir.Shape(dims)


def _check_file(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise LowerError(
            "the ONNX file does not pass onnx's checker",
            where=str(path),
            facts=str(error).splitlines()[0][:300],
            do="try another opset, and report the model",
        ) from error


def _shapes(values: Any) -> dict[str, tuple[int | str, ...]]:
    return {
        v.name: tuple(d if isinstance(d, int) else str(d.value) for d in (v.shape.dims if v.shape is not None else ()))
        for v in values
    }


def _checked(written: OnnxFile, program: Program, tolerance: float) -> OnnxFile:
    args, kwargs = program.example_inputs
    with torch.no_grad():
        expected = [t for t in pytree.tree_leaves(program(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    names = [n.name for n in program.inputs]
    given = dict(zip(names, pytree.tree_leaves((args, kwargs)), strict=True))
    found = run_onnx(written.path, {k: v for k, v in given.items() if isinstance(v, torch.Tensor)})
    worst = 0.0
    for name, want in zip(written.outputs, expected, strict=True):
        got = found[name]
        difference = (got.double() - want.double()).abs().max().item() if got.shape == want.shape else float("inf")
        worst = max(worst, difference / max(want.double().abs().max().item(), 1e-12))
    if not worst <= tolerance:
        raise LowerError(
            "ONNX Runtime computes something else than the model",
            where=str(written.path),
            facts=f"outputs differ by {worst:.1e} of the largest, {tolerance:.0e} is allowed",
            do="report the model, the opset and the versions of onnxruntime and torch",
        )
    return replace(written, error=worst)
