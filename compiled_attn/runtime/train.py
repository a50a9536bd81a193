"""`compile(model, mode="train")`: an nn.Module on the user's own Parameters, whose gradients AOTAutograd makes.

The model is captured in torch.export's training form once per state of its train/eval flags, the passes run, and the
rewritten graph, with parameters and buffers as arguments, goes to Inductor. So an optimizer step, `load_state_dict` or
`.to()` on either module is seen by the other, and batch norm writes its statistics into the user's buffers.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch, targets
from compiled_attn.ir.errors import CaptureError, PassError
from compiled_attn.ir.program import Program
from compiled_attn.runtime.build import Build, Settings, prepare
from compiled_attn.runtime.capture import arguments
from compiled_attn.runtime.flat import SHARED, flat_module, kind_of, tensor_arguments, tensors_of

LIMIT = 16  # captures of one model; more mean that a dimension should be declared dynamic


def compile_train(
    model: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
) -> TrainedModel:
    """A module that computes what `model` does, with gradients; captured now if example inputs are given, else at call.

    Raises PassError for a precision (mixed precision is autocast's in training), TargetError where the target is not
    at hand, CaptureError where the model can not be captured.
    """
    settings = settings or Settings.of(mode="train")
    if settings.precision is not None:
        raise PassError(
            f"precision={settings.precision!r} in training",
            where="compile(..., mode='train')",
            facts="the Parameters are the user's own and keep their dtype",
            do="leave it out, and call the result under torch.autocast",
        )
    targets.require_here(settings.target)
    trained = TrainedModel(model, settings)
    if example_inputs is not None or example_kwargs is not None:
        trained.entry_for(arguments(example_inputs), dict(example_kwargs or {}))
    return trained


@dataclass
class Entry:
    """One capture, compiled. tensors: names of the parameters and buffers that it takes, in order."""

    build: Build
    function: Any
    tensors: tuple[str, ...]
    free: tuple[frozenset[int], ...]


class TrainedModel(nn.Module):
    """Called as the user's model, and shares its parameters, buffers and submodules, so its state_dict too.

    `.train()` and `.eval()` act on both. A call under autocast goes through the Dynamo backend instead, since a
    captured graph would not hold the casts. Thread-safe as far as the model itself is.
    """

    _model: nn.Module

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise CaptureError(
                f"{type(model).__name__} is not an nn.Module",
                facts="training needs the parameters of a module",
                do="wrap the function in a module whose forward calls it",
            )
        self.settings = settings
        self.events: list[str] = []
        self._entries: dict[Any, Entry] = {}
        self._lock = threading.RLock()
        self._dynamo: Any = None
        self.training = model.training
        self.__dict__["_model"] = model  # no submodule, so that the keys stay the user's
        self.__dict__.update({name: getattr(model, name) for name in SHARED})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return self._under_autocast()(*args, **kwargs)
        entry = self.entry_for(args, kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        for leaf, dims in zip(leaves, entry.free, strict=True):
            if dims:
                _torch.mark_dynamic(leaf, dims)
        state = tensors_of(self._model)
        flat = entry.function(*(state[name] for name in entry.tensors), *leaves)
        return pytree.tree_unflatten(flat, entry.build.program.out_spec)

    def train(self, mode: bool = True) -> TrainedModel:
        """Sets train or eval mode of both modules."""
        self.__dict__["training"] = mode
        self._model.train(mode)
        return self

    @property
    def builds(self) -> list[Build]:
        return [entry.build for entry in self._entries.values()]

    @property
    def programs(self) -> list[Program]:
        """The programs captured so far, after their passes: one per train/eval state and kind of call."""
        return [build.program for build in self.builds]

    def explain(self) -> Any:
        """What each pass did, what it did not do and because of what, for every capture so far."""
        from compiled_attn.runtime.report import explain

        return explain(self)

    def entry_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """The compiled entry for such a call in the present train/eval state, captured if there is none."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        flags = tuple(module.training for module in self._model.modules())
        state = tuple((t.shape, t.dtype, t.device) for t in tensors_of(self._model).values())
        with self._lock:
            for (have_flags, have_state, have_spec, kinds), entry in self._entries.items():
                same = (have_flags, have_state, have_spec) == (flags, state, spec)
                if same and kinds == tuple(map(kind_of, leaves, entry.free)):
                    return entry
            if len(self._entries) >= LIMIT:
                raise CaptureError(
                    f"{type(self._model).__name__} was captured {LIMIT} times",
                    facts="each call was unlike those before in shape, dtype, keyword or train/eval flags",
                    do="declare the dimensions that vary: compile(..., dynamic_shapes=...)",
                )
            entry = self._compile(args, kwargs)
            self._entries[flags, state, spec, tuple(map(kind_of, leaves, entry.free))] = entry
            state_name = "train" if self._model.training else "eval"
            self.events.append(f"captured in {state_name} mode, {sum(entry.build.seconds.values()):.1f} s")
            return entry

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        from compiled_attn.runtime import lower

        build = prepare(self._model, args, kwargs, self.settings)
        lower.register()
        program = lower.lower(build.program, self.settings.target, build.notes, strict=self.settings.strict)
        options = lower.jit_config(self.settings.target, program)
        return Entry(
            build=build,
            function=torch.compile(flat_module(program), fullgraph=True, options=options),
            tensors=tensor_arguments(program),
            free=tuple(_free(node.meta.get("val")) for node in program.inputs),
        )

    def _under_autocast(self) -> Any:
        with self._lock:
            if self._dynamo is None:
                self.events.append("through Dynamo: autocast is on, so each call is captured with its casts")
                self.__dict__["_dynamo"] = torch.compile(self._model, backend="compiled_attn")
        return self._dynamo

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainedModel:
        return TrainedModel(copy.deepcopy(self._model, memo), self.settings)


def _free(value: Any) -> frozenset[int]:
    if not isinstance(value, torch.Tensor):
        return frozenset()
    return frozenset(d for d, size in enumerate(value.shape) if _torch.is_symbolic(size))
