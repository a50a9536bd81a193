"""What `compile`, `export`, `explain` and the command line share: capture, passes, native code."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compiled_attn.ir import _torch, targets
from compiled_attn.ir.errors import LowerError, PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.ir.targets import Target
from compiled_attn.ops.templates import registry
from compiled_attn.ops.templates.base import calls_in_package
from compiled_attn.passes import pipelines
from compiled_attn.passes.base import Pass, PassRecord, run_passes
from compiled_attn.passes.cast_boundary import CastBoundary
from compiled_attn.runtime import measure, package_cache
from compiled_attn.runtime.capture import arguments, capture

PRECISIONS = {None: None, "float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How a model is compiled: everything but the model and its inputs.

    weights_beside: the package holds its weights beside the code, and not in it (runtime/weights.py).
    """

    target: Target
    passes: tuple[Pass, ...] = ()
    dynamic_shapes: Any = None
    precision: str | None = None
    mode: str = "inference"
    strict: bool = False
    tune: str = "heuristic"
    dump: str | None = None
    compare: bool = False
    weights_beside: bool = False

    @classmethod
    def of(cls, target: str | Target = "auto", **options: Any) -> Settings:
        """Settings from what a user wrote, checked."""
        if options.get("precision") not in PRECISIONS:
            raise PassError(
                f"unknown precision {options['precision']!r}",
                facts=f"precisions are {', '.join(str(p) for p in PRECISIONS if p)}",
                do="choose one of them, or leave it out to keep the model's own dtypes",
            )
        if options.get("tune", "heuristic") not in ("heuristic", "measure"):
            raise PassError(
                f"unknown tune {options['tune']!r}", facts="it is heuristic or measure", do="choose one of them"
            )
        passes = options.get("passes") or ()
        if not isinstance(passes, (list, tuple)):
            raise PassError(
                "passes is a list", facts=f"given is a {type(passes).__name__}", do="give passes=[...], also for one"
            )
        found = target if isinstance(target, Target) else targets.detect() if target == "auto" else targets.load(target)
        return cls(found, **{**options, "passes": tuple(passes)})


@dataclass
class Build:
    """A Program after its passes, with what they said.

    seconds: stage -> time spent.  calls: template -> how often the generated code was found to call it.
    """

    program: Program
    notes: Notes
    records: list[PassRecord]
    settings: Settings
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def templates(self) -> frozenset[str]:
        """Those that the generated code was found to hold."""
        return frozenset(self.calls)


@_torch.one_at_a_time
def prepare(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, settings: Settings) -> Build:
    """Captures the model and runs the target's passes and the named ones. The model is not changed."""
    began = time.perf_counter()
    args, kwargs = arguments(args), dict(kwargs or {})
    narrow = PRECISIONS[settings.precision]
    boundary: list[Pass] = []
    if narrow is not None:
        model = copy.deepcopy(model).to(narrow)
        boundary = [CastBoundary(str(narrow).removeprefix("torch."), _floating_dtypes((args, kwargs)))]
        args, kwargs = _cast(args, narrow), _cast(kwargs, narrow)
    program = capture(model, args, kwargs, dynamic_shapes=settings.dynamic_shapes, mode=settings.mode)
    captured = time.perf_counter()
    notes = Notes()
    pipeline = pipelines.default(
        settings.target, settings.mode, settings.passes, tune=settings.tune, measure=measure.SERVICE
    )
    passes = [*boundary, *pipeline]
    program, records = run_passes(program, passes, settings.target, notes, dump=settings.dump, compare=settings.compare)
    done = time.perf_counter()
    return Build(program, notes, records, settings, {"capture": captured - began, "passes": done - captured})


@_torch.one_at_a_time
def build_package(build: Build, path: str | Path) -> Path:
    """Lowers a prepared program and compiles it with AOTInductor into a raw `.pt2` at `path`.

    A package of the same program, weights and circumstances that was built before is taken from disk instead.
    """
    from compiled_attn.runtime import lower

    settings = build.settings
    targets.require_here(settings.target)
    began = time.perf_counter()
    program = lower.lower(build.program, settings.target, build.notes, strict=settings.strict)
    options = lower.inductor_config(settings.target, program, weights_beside=settings.weights_beside)
    key = package_cache.key_of(program, options)
    if key is not None and package_cache.fetch(key, Path(path)):
        build.seconds["fetched"] = time.perf_counter() - began
        _hold_to_templates(build, Path(path))
        return Path(path)
    lower.register()
    try:
        with torch.no_grad():
            found = _torch.aoti_package(program.to_exported(), str(path), options)
    except Exception as error:
        raise LowerError(
            "Inductor could not compile the program",
            where=_first_line(error),
            facts=f"{type(error).__name__} while building for {settings.target.name}",
            do="run compiled_attn.doctor(); if it finds nothing amiss, report the model with explain()'s text",
        ) from error
    build.seconds["inductor"] = time.perf_counter() - began
    _hold_to_templates(build, Path(found))
    if key is not None:
        package_cache.keep(key, Path(found))
    return Path(found)


def _hold_to_templates(build: Build, package: Path) -> None:
    """A C++ template counts as used only where the generated code holds it; a broken promise is an error."""
    names = {t.name for t in registry.TEMPLATES if t.device == "cpu"}
    promised = {note.what for note in build.notes.done if note.what in names}
    build.calls = calls_in_package(package)
    absent = promised - build.templates
    if absent:
        raise LowerError(
            f"Inductor's code does not hold {', '.join(sorted(absent))}",
            facts="the template accepted the op, and the generated code computes it otherwise",
            do="report the model with explain()'s text; meanwhile leave the pass out that chose it",
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    compiler = [line for line in lines if " error: " in line]
    return next(iter(compiler or lines), "")[:400]


def _floating_dtypes(tree: Any) -> str:
    leaves = torch.utils._pytree.tree_leaves(tree)
    found = {x.dtype for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return str(next(iter(found), torch.float32)).removeprefix("torch.")


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def one(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return torch.utils._pytree.tree_map(one, tree)
