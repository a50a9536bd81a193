"""`export`: a model to an artifact that runs without the model, in Python or in the C++ runner."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.errors import PassError, TargetError
from compiled_attn.ir.targets import Target
from compiled_attn.passes.base import Pass
from compiled_attn.runtime import cross, cross_sources, describe
from compiled_attn.runtime.artifact import Artifact, write_artifact
from compiled_attn.runtime.build import Build, Settings, build_package, prepare
from compiled_attn.runtime.bundle import Bundle, write_bundle
from compiled_attn.runtime.contract import CROSS, Call
from compiled_attn.runtime.cross_attention import fuse_attention
from compiled_attn.runtime.decoder_file import Decoder, export_decoder
from compiled_attn.runtime.files import require_writable
from compiled_attn.runtime.host import needs_of
from compiled_attn.runtime.lower import lower
from compiled_attn.runtime.onnx import OnnxFile, export_onnx
from compiled_attn.runtime.programs import DecoderFile


def export(
    model: nn.Module | Decoder,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    path: str | Path,
    target: str | Target | Sequence[str | Target] = "auto",
    dynamic_shapes: Any = None,
    precision: str | None = None,
    passes: Sequence[Pass] = (),
    strict: bool = False,
    tune: str = "heuristic",
) -> Artifact | OnnxFile | Bundle | DecoderFile:
    """Compiles `model` into an artifact at `path` that `compiled_attn.load` and the C++ runner run without the model.

    target: a GPU that this machine does not have is built for all the same (runtime/cross.py); the contract then says
    "cross-compiled, not run on the target". A path that ends in `.zip` gets sources, cubins and PTX to be built on the
    target's own host (runtime/cross_sources.py), which a target with another processor (orin) needs. Several targets
    give one file, of which `load` takes the part that fits its machine (runtime/bundle.py).
    A path that ends in `.onnx` gives an ONNX file instead (runtime/onnx.py): vocabulary ops by their decompositions,
    checked against the model in ONNX Runtime where that is installed; target, strict and tune do not apply to it.

    args, kwargs: example inputs. Dimensions are fixed but for those in dynamic_shapes (as `compile` takes it).
    precision, passes, strict, tune: as for `compile`.
    A decoder (`compiled_attn.decoder`) gives one file of its two programs with one copy of their weights, for
    `load_decoder` and the C++ runner; besides path only target, strict and tune apply to it.
    Tensors that the model writes into must be its inputs (state); a buffer that it writes into is an error.
    Raises CaptureError, PassError, TargetError, LowerError or ContractError, each in four parts.
    """
    require_writable(path)
    if isinstance(model, Decoder):
        if args or kwargs or dynamic_shapes is not None or precision or passes or not isinstance(target, (str, Target)):
            raise PassError(
                "a decoder is exported as it was made",
                where=str(path),
                facts="inputs, sizes, precision and passes were settled by compiled_attn.decoder; it has one target",
                do="give export(decoder, path=...) only target=, strict= and tune= besides",
            )
        return export_decoder(model, path, target=target, strict=strict, tune=tune)
    if Path(path).suffix == ".onnx":
        return _export_onnx(model, args, kwargs, path, dynamic_shapes, precision, passes)
    if not isinstance(target, (str, Target)):
        options = {"dynamic_shapes": dynamic_shapes, "precision": precision, "passes": passes}
        return _export_all(target, path, partial(export, model, args, kwargs, **options, strict=strict, tune=tune))
    settings = Settings.of(
        target,
        passes=passes,
        dynamic_shapes=dynamic_shapes,
        precision=precision,
        strict=strict,
        tune=tune,
    )
    cross.require_possible(settings.target, path)
    return export_build(prepare(model, args, kwargs, settings), path)


def _export_all(wanted: Sequence[str | Target], path: str | Path, one: Callable[..., Any]) -> Bundle:
    """One file with a build for each target; none is written where one fails."""
    found = [t if isinstance(t, Target) else targets.load(t) for t in wanted]
    if not found or cross.is_sources(path):
        raise TargetError(
            "several targets do not go into a package of sources" if found else "no target is named",
            where=str(path),
            facts=f"{len(found)} targets, and the path ends in {Path(path).suffix or 'nothing'}",
            do="give a path that ends in .pt2 and at least one target",
        )
    for target in found:
        cross.require_possible(target, path)
    with tempfile.TemporaryDirectory(prefix="compiled_attn-") as folder:
        return write_bundle(path, [one(target=t, path=Path(folder) / f"{i}.pt2") for i, t in enumerate(found)])


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
    if cross.wanted(settings.target) or cross.is_sources(path):
        return _export_cross(build, call, path)
    with tempfile.TemporaryDirectory(prefix="compiled_attn-") as folder:
        raw = build_package(build, Path(folder) / "model.pt2")
        return write_artifact(path, raw, call, settings.target, passes=describe.passes_of(build))


def _export_cross(build: Build, call: Call, path: str | Path) -> Artifact:
    """The artifact, or the sources, of a prepared program for a GPU that is not here."""
    target, sources = build.settings.target, cross.is_sources(path)
    call = cross.call_on_cuda(call)
    program = lower(build.program, target, build.notes, strict=build.settings.strict)
    program = fuse_attention(program, target, build.notes, strict=build.settings.strict)
    with cross.built(program, call, target, sources=sources) as product:
        build.seconds.update(product.seconds)
        for kernel in product.kernels:
            build.notes.did(kernel.name, "kernel", kernel.config, kernel.needs)
        passes = describe.passes_of(build)
        if sources:
            return cross_sources.write_sources(path, product, call, target, passes=passes)
        needs = needs_of(target, host_march=cross.MARCH, origin=CROSS)
        return write_artifact(
            path, product.package, call, target, passes=passes, needs=needs, versions=product.versions
        )
