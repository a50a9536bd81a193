"""The one module that reaches private parts of torch. Imports of them are lazy; features are probed, not versions.

Contract tests in tests/ir/test_torch.py hold each function to what it promises on the installed torch.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import fx


def graph_module_like(old: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule of `graph` that shares the submodules and attributes of `old` which the graph refers to."""
    module = fx.GraphModule(old, graph)
    module.meta.update(old.meta)
    return module


def fake_mode_of(graph: fx.Graph) -> Any:
    """The FakeTensorMode of a graph's values; a fresh one with a ShapeEnv where no tensor value is found."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for node in graph.nodes:
        value = node.meta.get("val")
        for leaf in torch.utils._pytree.tree_leaves(value):
            if isinstance(leaf, FakeTensor):
                return leaf.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv())


def symbolic_argument(name: str, value: Any) -> Any:
    """torch.export's argument record for a SymInt, SymFloat or SymBool output of a graph."""
    from torch.export import graph_signature as sig

    if isinstance(value, (torch.SymInt, int)):
        return sig.SymIntArgument(name)
    if isinstance(value, (torch.SymFloat, float)):
        return sig.SymFloatArgument(name)
    return sig.SymBoolArgument(name)


def quiet_module(exported: torch.export.ExportedProgram) -> Any:
    """`exported.module()` without its warnings; runs the graph in eager mode with the input guards on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return exported.module()


def is_symbolic(value: Any) -> bool:
    """Whether an int-like value depends on a symbol."""
    return isinstance(value, torch.SymInt) and value.node.maybe_as_int() is None


def expression(value: Any) -> Any:
    """The sympy expression of a SymInt, or the int itself."""
    return value.node.expr if isinstance(value, torch.SymInt) else value


def declared(value: Any) -> Any:
    """The expression a SymInt was declared with, whatever has been learnt since; or the int itself."""
    return value.node._expr if isinstance(value, torch.SymInt) else value


def statically_true(condition: Any) -> bool:
    """Whether a (symbolic) condition holds for every allowed value; never adds a guard, never reads a hint."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def specialised(shape_env: Any) -> dict[str, int]:
    """Symbols of a ShapeEnv that have been pinned to one value, by a replacement or by a guard: name -> value."""
    import sympy

    if shape_env is None:
        return {}
    pinned = {str(s): int(v) for s, v in shape_env.replacements.items() if getattr(v, "is_Integer", False)}
    for guard in shape_env.guards:
        if isinstance(guard.expr, sympy.Eq):
            symbols, numbers = guard.expr.free_symbols, [a for a in guard.expr.args if a.is_Integer]
            if len(symbols) == 1 and numbers and guard.expr.args[0].is_Symbol:
                pinned[str(next(iter(symbols)))] = int(numbers[0])
    return pinned


def trace(
    function: Callable[..., Any], args: tuple[Any, ...], fake_mode: Any, *, pre_dispatch: bool = True
) -> fx.GraphModule:
    """ATen graph of `function` on fake arguments, symbolic where the arguments are; made in their own fake mode."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with fake_mode, torch.no_grad():
        return make_fx(function, tracing_mode="real", pre_dispatch=pre_dispatch)(*args)


@contextmanager
def inductor_options(options: dict[str, Any]) -> Iterator[None]:
    """Inductor's configuration patched for the block."""
    from torch._inductor import config

    with config.patch(options):
        yield


def aoti_package(exported: torch.export.ExportedProgram, path: str, options: dict[str, Any]) -> str:
    """Compiles an exported program with AOTInductor into a `.pt2` at `path`; returns the path."""
    import torch._inductor

    return torch._inductor.aoti_compile_and_package(exported, package_path=path, inductor_configs=options)


def aoti_load(path: str, *, device_index: int = -1, threads: int = 1) -> Any:
    """Loads a `.pt2` made by AOTInductor: a callable on the flat user inputs, with load_constants."""
    import torch._inductor

    return torch._inductor.aoti_load_package(path, device_index=device_index, num_runners=threads)


def compile_fx(module: fx.GraphModule, example_inputs: list[Any], options: dict[str, Any] | None = None) -> Any:
    """Inductor's just-in-time compile, through AOTAutograd, of a graph module on (fake) inputs."""
    from torch._inductor.compile_fx import compile_fx as inner

    return inner(module, example_inputs, config_patches=options or {})


def dynamo_inputs(module: fx.GraphModule) -> list[Any]:
    """The fake values of a Dynamo graph's placeholders, in order; None where Dynamo recorded no value."""
    return [n.meta.get("example_value") for n in module.graph.nodes if n.op == "placeholder"]


def dynamo_aten(module: fx.GraphModule, fakes: list[Any], *, functional: bool) -> tuple[fx.GraphModule, dict[str, str]]:
    """Pre-dispatch ATen of a Dynamo graph, traced in Dynamo's own fake mode; provenance of every node is kept.

    functional: without in-place ops; the new values of mutated inputs are then the first outputs, and the second result
    maps each such output's name to the name of the placeholder that it overwrites.
    """
    from torch._functorch.aot_autograd import aot_export_module
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.traceback import preserve_node_meta

    modes = [f.fake_mode for f in fakes if isinstance(f, FakeTensor)]
    mode = modes[0] if modes else FakeTensorMode(shape_env=ShapeEnv())
    with tracing(TracingContext(mode)), mode, preserve_node_meta():
        if functional:
            found, signature = aot_export_module(module, fakes, trace_joint=False, pre_dispatch=True)
            return found, dict(signature.user_inputs_to_mutate)
        return make_fx(fx.Interpreter(module).run, pre_dispatch=True)(*fakes), {}


def carry_dynamo_marks(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """What AOTAutograd reads off a Dynamo graph (sources for its guards, static inputs), put on its rewritten form.

    Both have the same placeholders in the same order; the new form may have others, of constants, in front.
    """
    new.meta.update(old.meta)
    for name in ("_param_name_to_source",):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    before = [n for n in old.graph.nodes if n.op == "placeholder"]
    after = [n for n in new.graph.nodes if n.op == "placeholder"]
    front = len(after) - len(before)
    for node in after[:front]:
        node._dynamo_source = None
    for a, b in zip(before, after[front:], strict=True):
        if hasattr(a, "_dynamo_source"):
            b._dynamo_source = a._dynamo_source
        for key in ("tensor_dict", "example_value"):
            if key in a.meta:
                b.meta[key] = a.meta[key]


def module_call(in_spec: Any, out_spec: Any) -> Any:
    """torch.export's record of how the whole program is called."""
    from torch.export import ModuleCallEntry, ModuleCallSignature

    return ModuleCallEntry(fqn="", signature=ModuleCallSignature([], [], in_spec, out_spec))


def shape_conditions(shape_env: Any) -> list[Any]:
    """Conditions on symbolic sizes that tracing relied on, as sympy expressions: guards and deferred assertions."""
    if shape_env is None:
        return []
    deferred = getattr(shape_env, "deferred_runtime_asserts", {})
    found = [g.expr for g in shape_env.guards] + [a.expr for group in deferred.values() for a in group]
    return list(dict.fromkeys(shape_env.simplify(e) for e in found))


def symbol_range(shape_env: Any, symbol: Any, ranges: Any) -> tuple[int, int | None]:
    """Lowest and highest size of a symbol (None: no highest); `ranges`, as an ExportedProgram states them, go first."""
    found = ranges[symbol] if symbol in ranges else shape_env.bound_sympy(symbol)
    ends = (found.lower, found.upper)
    low, high = (int(end) if getattr(end, "is_Integer", isinstance(end, int)) else None for end in ends)
    return max(low or 0, 0), None if high is None or high >= 2**62 else high


@cache
def loads_directories() -> bool:
    """Whether AOTInductor's package loader takes an unpacked package (torch 2.13) beside a `.pt2` file."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            package_loader(folder)
        except RuntimeError as error:
            return "zip" not in str(error)
    return True


def package_loader(path: str, *, device_index: int = -1, runners: int = 1) -> Any:
    """AOTInductor's loader of the model in a package; opens its library. `.boxed_run(list of tensors)` runs it."""
    return torch._C._aoti.AOTIModelPackageLoader(path, "model", False, runners, device_index)


def refined_shapes(message: str, shapes: Any) -> Any:
    """dynamic_shapes with the ranges and multiples that torch.export's error suggests.

    None where it suggests nothing, or where it would make a dynamic dimension static.
    """
    if "Suggested fixes:" not in message:
        return None
    fixes = message.split("Suggested fixes:")[1].split("\n\n")[0]
    from torch.export import Dim
    from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
    from torch.utils import _pytree as pytree

    try:
        refined = refine_dynamic_shapes_from_suggested_fixes(f"Suggested fixes:{fixes.rstrip()}\n", shapes)
    except Exception:  # the suggestion is one that torch itself can not read
        return None
    leaves = pytree.tree_leaves(refined)
    dynamic = sum(isinstance(leaf, (Dim, type(Dim("probe")))) for leaf in leaves)
    before = sum(isinstance(leaf, (Dim, type(Dim("probe")))) for leaf in pytree.tree_leaves(shapes))
    return refined if dynamic == before and not any(isinstance(leaf, int) for leaf in leaves) else None


def mark_dynamic(tensor: torch.Tensor, dims: frozenset[int]) -> None:
    """Asks Dynamo to keep these dimensions symbolic where it can; sizes 0 and 1 stay what they are."""
    from torch._dynamo import maybe_mark_dynamic

    for dim in sorted(dims):
        maybe_mark_dynamic(tensor, dim)
