"""`observe(model, taps=[...])`: any model made to return `(out, taps)`, by a rewrite of its Program, not by hooks.

A tap is `layer4`, the output of the module at that path, `layer4:input`, what that module reads, or
`blocks.*.attn:probabilities`, the softmax probabilities of the attention under it, also where attention is fused. Paths
may hold wildcards (fnmatch).
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from compiled_attn.ir import targets
from compiled_attn.ir.errors import CaptureError, PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.passes.base import Pass, run_passes
from compiled_attn.passes.raise_attention import RaiseAttention
from compiled_attn.passes.tap import TapModules, TapProbabilities, pair, split
from compiled_attn.runtime.capture import capture
from compiled_attn.runtime.flat import SHARED, flat_module, kind_of, tensor_arguments, tensors_of

LIMIT = 16  # captures of one observed model


def observe(model: nn.Module, taps: Sequence[str]) -> Observed:
    """A module called as `model` that returns `(out, taps)`; taps: name -> tensor, or tuple where there are several.

    Names are `path`, `path:input` and `path:probabilities`, one for each module that a pattern matches; probabilities
    are [B, H, N, M]. The result can be captured, compiled and exported like any module, and has gradients where they
    are on. Raises PassError for a pattern that is none, and at the first call for one that matches nothing.
    """
    if isinstance(taps, str) or not all(isinstance(t, str) for t in taps):
        raise PassError(
            f"taps={taps!r} is not a list of patterns",
            where="observe(model, taps=...)",
            facts="taps are strings such as 'layer4' or 'blocks.*.attn:probabilities'",
            do="pass a list of strings",
        )
    for tap in taps:
        split(tap)
    return Observed(model, tuple(taps))


class Observed(nn.Module):
    """What `observe` returns. It shares the model's parameters, buffers and submodules; keys stay the user's."""

    _model: nn.Module

    def __init__(self, model: nn.Module, taps: tuple[str, ...]) -> None:
        super().__init__()
        self.taps = taps
        self._entries: dict[Any, tuple[Program, Callable[..., Any]]] = {}
        self._lock = threading.RLock()
        self.training = model.training
        self.__dict__["forward"] = functools.update_wrapper(functools.partial(self._run), model.forward)
        self.__dict__["_model"] = model  # no submodule, so that the keys stay the user's
        self.__dict__.update({name: getattr(model, name) for name in SHARED})

    def train(self, mode: bool = True) -> Observed:
        """Sets train or eval mode of both modules."""
        self.__dict__["training"] = mode
        self._model.train(mode)
        return self

    def program_of(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        dynamic_shapes: Any = None,
        mode: str = "inference",
    ) -> Program:
        """The model's Program with the taps among its outputs; `capture` of an observed model asks for it."""
        program = capture(self._model, args, kwargs, dynamic_shapes=dynamic_shapes, mode=mode)
        return tapped(program, self.taps, Notes())

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        state = tensors_of(self._model)
        grads = torch.is_grad_enabled() and any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in (*leaves, *state.values())
        )
        flags = tuple(module.training for module in self._model.modules())
        key = (spec, flags, grads, tuple(kind_of(leaf) for leaf in leaves))
        with self._lock:
            if key not in self._entries:
                self._room()
                program = self.program_of(args, kwargs, mode="train" if grads else "inference")
                self._entries[key] = (program, flat_module(program))
            program, function = self._entries[key]
        outputs = function(*(state[name] for name in tensor_arguments(program)), *leaves)
        return pytree.tree_unflatten(outputs, program.out_spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Observed:
        return Observed(copy.deepcopy(self._model, memo), self.taps)

    def _room(self) -> None:
        if len(self._entries) >= LIMIT:
            raise CaptureError(
                f"{type(self._model).__name__} was captured {LIMIT} times under observe",
                facts="each call was unlike those before in shape, dtype, keyword or train/eval flags",
                do="observe it anew, or compile(observe(...), dynamic_shapes=...)",
            )


def tapped(program: Program, taps: Sequence[str], notes: Notes) -> Program:
    """The program with `(out, taps)` as its result. Modules are tapped as captured; for probabilities, attention that
    no module tap looks into is raised first."""
    modules = tuple(t for t in taps if split(t)[1] != "probabilities")
    attention = tuple(t for t in taps if split(t)[1] == "probabilities")
    passes: list[Pass] = [TapModules(modules)]
    if attention:
        passes += [RaiseAttention(), TapProbabilities(attention)]
    return run_passes(pair(program), passes, targets.load("cpu"), notes)[0]
