"""`export`: a model to an artifact that runs without the model, in Python or in the C++ runner."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from compiled_attn.ir.errors import PassError
from compiled_attn.ir.targets import Target
from compiled_attn.passes.base import Pass
from compiled_attn.runtime import describe
from compiled_attn.runtime.artifact import Artifact, write_artifact
from compiled_attn.runtime.build import Build, Settings, build_package, prepare
from compiled_attn.runtime.onnx import OnnxFile, export_onnx


def export(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    path: str | Path,
    target: str | Target = "auto",
    dynamic_shapes: Any = None,
    precision: str | None = None,
    passes: Sequence[Pass] = (),
    strict: bool = False,
    tune: str = "heuristic",
) -> Artifact | OnnxFile:
    """Compiles `model` into an artifact at `path` that `compiled_attn.load` and the C++ runner run without the model.

    A path that ends in `.onnx` gives an ONNX file instead (runtime/onnx.py): vocabulary ops by their decompositions,
    checked against the model in ONNX Runtime where that is installed; target, strict and tune do not apply to it.

    args, kwargs: example inputs. Dimensions are fixed but for those in dynamic_shapes (as `compile` takes it).
    target, precision, passes, strict, tune: as for `compile`.
    Tensors that the model writes into must be its inputs (state); a buffer that it writes into is an error.
    Raises CaptureError, PassError, TargetError, LowerError or ContractError, each in four parts.
    """
    if Path(path).suffix == ".onnx":
        return _export_onnx(model, args, kwargs, path, dynamic_shapes, precision, passes)
    settings = Settings.of(
        target,
        passes=tuple(passes),
        dynamic_shapes=dynamic_shapes,
        precision=precision,
        strict=strict,
        tune=tune,
    )
    return export_build(prepare(model, args, kwargs, settings), path)


def _export_onnx(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    path: str | Path,
    dynamic_shapes: Any,
    precision: str | None,
    passes: Sequence[Pass],
) -> OnnxFile:
    if precision not in (None, "float32"):
        raise PassError(
            f"an ONNX file can not be given precision {precision!r}",
            where=str(path),
            facts="ONNX Runtime's CPU kernels compute in float32; the file would not run there",
            do="leave precision out, and let the runtime that executes the file lower it",
        )
    check = importlib.util.find_spec("onnxruntime") is not None
    return export_onnx(model, args, kwargs, path=path, dynamic_shapes=dynamic_shapes, passes=passes, check=check)


def export_build(build: Build, path: str | Path) -> Artifact:
    """The artifact of a prepared program: compiled, described and written."""
    settings = build.settings
    call = describe.call_of(build.program, dynamic_shapes=settings.dynamic_shapes)
    with tempfile.TemporaryDirectory(prefix="compiled_attn-") as folder:
        raw = build_package(build, Path(folder) / "model.pt2")
        return write_artifact(path, raw, call, settings.target, passes=describe.passes_of(build))
