"""Child process one of the emulation: writes what Inductor generates for a CUDA target that is not here.

    python tests/cross/emulate_generate.py TARGET static|dynamic PRECISION FOLDER/CASE...

Writes into each case's folder: code.py, Inductor's Python wrapper with its Triton kernels; call.pt, the inputs
with the strides that the wrapper expects, eager's outputs and the templates that lowering chose. Or failure.txt. A
dynamic program is captured at one batch and called at a larger one. The device is faked as for a cross build
(ir/_torch_cross.py); no kernel is compiled, since only the text is wanted.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import emulate_cases
import torch
from sympy import sympify
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch, _torch_cross, _torch_mends
from compiled_attn.ir.program import Program
from compiled_attn.ir.targets import Target, load
from compiled_attn.ops.templates.registry import TEMPLATES
from compiled_attn.runtime import cross_toolchain
from compiled_attn.runtime.build import Settings, prepare
from compiled_attn.runtime.capture import capture
from compiled_attn.runtime.cross_attention import fuse_attention
from compiled_attn.runtime.flat import flat_module, tensor_arguments, tensors_of
from compiled_attn.runtime.lower import inductor_config, lower


class Written(Exception):
    """Inductor has written its code, and need not go on to compile it."""


def main() -> None:
    target, batch, precision, *places = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    _give_guard()
    _torch_mends.mend()
    for place in map(Path, places):
        began = time.process_time()
        try:
            record = generate(
                emulate_cases.of(place.name), load(target), batch == "dynamic", precision, place / "code.py"
            )
            torch.save(record | {"seconds": time.process_time() - began}, place / "call.pt")
        except Exception:
            (place / "failure.txt").write_text(traceback.format_exc())
    sys.stderr.flush()
    os._exit(0)  # torch's own clean-up would look for the device


def generate(case: emulate_cases.Case, target: Target, dynamic: bool, precision: str, code: Path) -> dict[str, Any]:
    """Writes the wrapper to `code`; returns what call.pt holds."""
    shapes = case.dynamic_shapes() if dynamic else None
    mode = "train" if case.trained else "inference"
    settings = Settings.of(target, dynamic_shapes=shapes, precision=precision, passes=case.named, mode=mode)
    build = prepare(case.model, case.args, None, settings)
    program = lower(build.program, target, build.notes)
    if case.trained:
        case, program = step(case, program)
    else:  # as runtime/package.py does for a target that is not here
        program = fuse_attention(program, target, build.notes)
    text, promised = wrapper(program, target)
    code.write_text(text)
    weights, user = program.tensors(), {n.name for n in program.inputs}
    layouts = dict(zip((n.name for n in program.placeholders), promised, strict=True))
    args, strides = _called(case, [fake for name, fake in layouts.items() if name in user], dynamic)
    with torch.no_grad():
        wanted = pytree.tree_leaves((build.program if case.named else case.model)(*args))
    given = iter(zip(pytree.tree_leaves(args), strides, strict=True))
    inputs = [(weights[n], fake.stride()) if n in weights else next(given) for n, fake in layouts.items()]
    cuda = {t.name for t in TEMPLATES if t.device == "cuda"}
    return {
        "inputs": [(t.detach().contiguous(), stride) for t, stride in inputs],
        "wanted": [t.contiguous() for t in wanted],
        "templates": sorted({note.what for note in build.notes.done} & cuda),
        "misses": [f"{miss.where}: {miss.because}" for miss in build.notes.misses],
    }


class Step(nn.Module):
    """A function of flat tensors, and the gradients of half of its outputs' sum of squares."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
            outputs = [o for o in pytree.tree_leaves(self.function(*leaves)) if o.is_floating_point()]
            loss = torch.stack([o.float().square().sum() / 2 for o in outputs]).sum()
            by = [leaf for leaf in leaves if leaf.requires_grad]
            return [*outputs, *torch.autograd.grad(loss, by, allow_unused=True, materialize_grads=True)]


def step(case: emulate_cases.Case, lowered: Program) -> tuple[emulate_cases.Case, Program]:
    """The case as a step of training on flat tensors, and its program: the lowered one's forward and backward."""
    names, state = tensor_arguments(lowered), tensors_of(case.model)
    leaves, spec = pytree.tree_flatten(case.args)
    tensors = tuple(t.detach() for t in (*(state[name] for name in names), *leaves))

    def eager(*flat: torch.Tensor) -> Any:
        args = pytree.tree_unflatten(list(flat[len(names) :]), spec)
        return torch.func.functional_call(case.model, dict(zip(names, flat, strict=False)), args)

    mode = FakeTensorMode()
    fakes = tuple(mode.from_tensor(t) for t in tensors)
    graph = _torch.trace(Step(flat_module(lowered)), fakes, mode, pre_dispatch=False)
    trained = emulate_cases.Case(Step(eager), tensors, (False,) * len(tensors))
    return trained, capture(graph, tensors)


def wrapper(program: Program, target: Target) -> tuple[str, list[Any]]:
    """Inductor's Python wrapper for a lowered program on a CUDA target, and the (fake) inputs it was promised."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.graph import GraphLowering

    written: list[str] = []

    def stop(self: Any) -> None:
        written.append(self.codegen()[0].value)
        raise Written

    options = {**_torch_cross.OPTIONS, **inductor_config(target, program)}
    options |= {"freezing": False}  # needs weights with bytes on the device
    with _torch_cross.patched(target) as cross:
        moved = _torch_cross.to_cuda(program.to_exported(), cross)
        fakes = [n.meta["val"] for n in moved.graph.nodes if n.op == "placeholder"]
        context = TracingContext(program.fake_mode)
        graph: fx.GraphModule = moved.graph_module
        with torch.no_grad(), tracing(context), mock.patch.object(GraphLowering, "compile_to_module", stop):
            try:
                _torch.compile_fx(graph, fakes, options)
            except Exception:
                if not written:
                    raise
    return written[-1], fakes


def _called(
    case: emulate_cases.Case, promised: list[Any], dynamic: bool
) -> tuple[tuple[Any, ...], list[tuple[int, ...]]]:
    """Inputs of the emulated call, the captured ones or of a batch larger by one, and the strides the code expects."""
    flat, spec = pytree.tree_flatten(case.args)
    called, strides = [], []
    for tensor, batched, fake in zip(flat, case.batched, promised, strict=True):
        size, symbols = tensor.shape[0] if tensor.dim() else 0, {}
        if dynamic and batched:
            if not _torch.is_symbolic(fake.shape[0]):
                raise AssertionError(f"a batch is symbolic no more: {tuple(fake.shape)}")
            size += 1
            symbols = {_torch.expression(fake.shape[0]): size}
        strides.append(tuple(int(sympify(_torch.expression(s)).subs(symbols)) for s in fake.stride()))
        called.append(emulate_cases.larger(tensor, size))
    return pytree.tree_unflatten(called, spec), strides


def _give_guard() -> None:
    """A device guard for CUDA, which torch's CPU build lacks; kept between runs, for it takes a compiler seconds."""
    folder = Path(tempfile.gettempdir()) / f"compiled_attn-guard-{torch.__version__}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if torch.version.cuda is None:
        cross_toolchain.build_guard(folder)
        cross_toolchain.install_guard(folder)


if __name__ == "__main__":
    main()
