"""`compile`: any nn.Module to a fast callable. Native code is made by AOTInductor, for calls as for artifacts."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch, targets
from compiled_attn.ir.errors import CaptureError
from compiled_attn.ir.program import Program
from compiled_attn.ir.targets import Target
from compiled_attn.passes.base import Pass
from compiled_attn.runtime.build import Build, Settings, build_package, prepare
from compiled_attn.runtime.call import Caller
from compiled_attn.runtime.capture import arguments, shapes_of_arguments
from compiled_attn.runtime.describe import call_of

LIMIT = 16  # captures of one compiled model; more mean that a dimension should be declared dynamic


def compile(
    model: nn.Module,
    target: str | Target = "auto",
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    precision: str | None = None,
    passes: Sequence[Pass] = (),
    mode: str = "inference",
    strict: bool = False,
    tune: str = "heuristic",
    dump: str | None = None,
    compare: bool = False,
) -> Any:
    """A fast callable with the model's own signature and, up to rounding, its numbers.

    target: a name of `compiled_attn.targets.names()`; "auto" reads this machine. One that is not at hand is an error:
    `export` builds for it, `compiled-attn explain` says what such a build would hold.
    example_inputs, example_kwargs: capture and compile now; otherwise at the first call.
    dynamic_shapes: as torch.export takes it, and dimensions may be named by strings.
    precision: "bf16" or "fp16" computes in that dtype, inputs and outputs keep theirs; None keeps the model's own.
    passes: added to the target's pipeline; approximate passes run only when named here.
    mode: "train" gives an nn.Module that shares the model's Parameters and has gradients.
    strict: a vocabulary op that no template serves is an error.  tune: "measure" times candidates, and caches that.
    dump: folder for the program before and after each pass.  compare: checks numbers after each pass.
    Raises CaptureError, PassError, TargetError or LowerError, each in four parts.
    """
    settings = Settings.of(
        target,
        passes=passes,
        dynamic_shapes=dynamic_shapes,
        precision=precision,
        mode=mode,
        strict=strict,
        tune=tune,
        dump=dump,
        compare=compare,
    )
    targets.require_here(settings.target)
    if mode == "train":
        from compiled_attn.runtime.train import compile_train

        return compile_train(model, example_inputs, example_kwargs, settings)
    compiled = CompiledModel(model, settings)
    if example_inputs is not None or example_kwargs is not None:
        compiled.entry_for(arguments(example_inputs), dict(example_kwargs or {}))
    return compiled


@dataclass
class Entry:
    """One capture of the model, compiled. weights: what was folded into it: (tensor's name, version, address).

    held: the modules and tensors on the way to them: (where a module holds them, under which key, what, its name).
    """

    build: Build
    runner: Any
    weights: tuple[tuple[str, int, int], ...]
    tensors: tuple[torch.Tensor, ...]
    held: tuple[tuple[Mapping[str, Any], str, Any, str], ...]
    caller: Caller
    reason: str

    def stale(self) -> str | None:
        """Name of a weight that changed since it was folded, or None."""
        for tensor, (name, version, address) in zip(self.tensors, self.weights, strict=True):
            if tensor._version != version or tensor.data_ptr() != address:
                return name
        for holder, key, value, name in self.held:
            if holder.get(key) is not value:
                return name
        return None


class CompiledModel:
    """What `compile` returns: call it as the model. Thread-safe; a call never answers from stale weights."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        if not isinstance(model, nn.Module):
            raise CaptureError(
                f"{type(model).__name__} is not an nn.Module",
                facts="compile records the parameters of a module",
                do="wrap the function in a module whose forward calls it",
            )
        self.model = model
        self.settings = settings
        self.events: list[str] = []
        self._entries: dict[Any, Entry] = {}
        self._lock = threading.RLock()
        self._dynamo: Any = None
        self._signature = inspect.signature(model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, _ = pytree.tree_flatten((args, kwargs))
        other = self._elsewhere(leaves)
        if other is not None:
            return other(*args, **kwargs)
        entry = self.entry_for(args, kwargs)
        inputs, sizes = entry.caller.check(entry.caller.bind(args, kwargs))
        with torch.no_grad():
            outputs = entry.runner.boxed_run(inputs)
        return entry.caller.restore(outputs, sizes)

    @property
    def programs(self) -> list[Program]:
        """The programs captured so far, after their passes."""
        return [entry.build.program for entry in self._entries.values()]

    @property
    def builds(self) -> list[Build]:
        return [entry.build for entry in self._entries.values()]

    def explain(self) -> Any:
        """What each pass did, what it did not do and because of what, for every capture so far."""
        from compiled_attn.runtime.report import explain

        return explain(self)

    def entry_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """The compiled entry for such a call, captured and compiled if there is none, or none that is up to date."""
        key = self._key(args, kwargs)
        entry = self._entries.get(key)
        if entry is not None and entry.stale() is None:
            return entry
        with self._lock:
            entry = self._entries.get(key)
            changed = entry.stale() if entry is not None else None
            if entry is not None and changed is None:
                return entry
            if entry is not None:
                reason = f"{changed} changed after it was folded in"
                self._entries = {k: e for k, e in self._entries.items() if e.stale() is None}
            else:
                reason = "first call" if not self._entries else f"a call unlike those before: {_describe(args, kwargs)}"
            if len(self._entries) >= LIMIT:
                raise CaptureError(
                    f"{type(self.model).__name__} was captured {LIMIT} times",
                    facts=f"each call was unlike those before; the last: {_describe(args, kwargs)}",
                    do="declare the dimensions that vary: compile(..., dynamic_shapes=...)",
                )
            entry = self._compile(args, kwargs, reason)
            self._entries[self._key(args, kwargs)] = entry
            self.events.append(f"captured: {reason}, {sum(entry.build.seconds.values()):.1f} s")
            return entry

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Entry:
        build = prepare(self.model, args, kwargs, self.settings)
        folder = Path(tempfile.mkdtemp(prefix="compiled_attn-"))
        try:
            package = build_package(build, folder / "model.pt2")
            began = time.perf_counter()
            runner = _torch.package_loader(str(package))
            build.seconds["load"] = time.perf_counter() - began
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        used = _used(self.model, build.program)
        where, kind = f"compiled {type(self.model).__name__}", self.settings.target.kind
        return Entry(
            build=build,
            runner=runner,
            weights=tuple((name, t._version, t.data_ptr()) for name, t in used.items()),
            tensors=tuple(used.values()),
            held=_held(self.model, used),
            caller=Caller(
                call_of(build.program, dynamic_shapes=self.settings.dynamic_shapes), where, torch.device(kind)
            ),
            reason=reason,
        )

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        free = self._free(args, kwargs)
        parts: list[Any] = [spec, self.model.training]
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                dims = free.get(i, frozenset())
                shape = tuple(None if d in dims else n for d, n in enumerate(leaf.shape))
                parts.append((leaf.dtype, leaf.device, shape))
            else:
                _want_hashable(leaf)
                parts.append((type(leaf), leaf))
        return tuple(parts)

    def _free(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, frozenset[int]]:
        """Flat position -> dimensions that were declared dynamic."""
        shapes = self.settings.dynamic_shapes
        if shapes is None:
            return {}
        positional, keyword = shapes_of_arguments(shapes, self._signature, len(args), list(kwargs))
        found: dict[int, frozenset[int]] = {}
        position = 0
        for value, declared in [*zip(args, positional, strict=True), *((kwargs[k], keyword[k]) for k in kwargs)]:
            position = _walk(value, declared, position, found)
        return found

    def _elsewhere(self, leaves: list[Any]) -> Any:
        """Who answers a call that needs gradients or autocast: the same passes behind Dynamo; None for the usual."""
        grads = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in leaves)
        autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        if not grads and not autocast:
            return None
        with self._lock:
            if self._dynamo is None:
                why = "an input wants a gradient" if grads else "autocast is on"
                self.events.append(f"through Dynamo: {why}, so AOTAutograd compiles this call")
                self._dynamo = torch.compile(self.model, backend="compiled_attn")
        return self._dynamo


def _want_hashable(leaf: Any) -> None:
    """Raises CaptureError for what is neither a tensor nor a constant, such as an array of numpy."""
    try:
        hash(leaf)
    except TypeError:
        raise CaptureError(
            f"an argument is a {type(leaf).__name__}",
            facts="arguments are tensors, numbers, strings and None, and containers of these",
            do="give tensors, for example torch.from_numpy(array)",
        ) from None


def _walk(value: Any, declared: Any, position: int, found: dict[int, frozenset[int]]) -> int:
    if isinstance(value, torch.Tensor):
        if declared is not None:
            dims = declared.items() if isinstance(declared, Mapping) else enumerate(declared)
            found[position] = frozenset(d for d, size in dims if size is not None and not isinstance(size, int))
        return position + 1
    if isinstance(value, Mapping):
        for k in value:
            position = _walk(value[k], (declared or {}).get(k), position, found)
        return position
    if isinstance(value, (list, tuple)):
        declared = declared or [None] * len(value)
        for v, d in zip(value, declared, strict=False):
            position = _walk(v, d, position, found)
        return position
    return position + len(pytree.tree_leaves(value))


def _used(model: nn.Module, program: Program) -> dict[str, torch.Tensor]:
    """The model's tensors that the program was made from, by name."""
    names = {*program.state, *(n for made in program.origin.values() for n in made)}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {n: tensors[n] for n in sorted(names) if n in tensors}


def _held(model: nn.Module, names: Iterable[str]) -> tuple[tuple[Mapping[str, Any], str, Any, str], ...]:
    """Every module and tensor on the paths to the named tensors, with what holds it."""
    found: dict[str, tuple[Mapping[str, Any], str, Any, str]] = {}
    for name in names:
        *path, last = name.split(".")
        module = model
        for depth, key in enumerate(path):
            place = ".".join(path[: depth + 1])
            found[place] = (module._modules, key, module._modules[key], place)
            module = module._modules[key]  # type: ignore[assignment]
        holder: Mapping[str, Any] = module._parameters if last in module._parameters else module._buffers
        found[name] = (holder, last, holder.get(last), name)
    return tuple(found.values())


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    parts = []
    for leaf in pytree.tree_leaves((args, kwargs)):
        is_tensor = isinstance(leaf, torch.Tensor)
        parts.append(f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" if is_tensor else repr(leaf))
    return ", ".join(parts)
