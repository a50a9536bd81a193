"""The one module that reaches private parts of torch. Imports of them are lazy; features are probed, not versions.

Contract tests in tests/ir/test_torch.py hold each function to what it promises on the installed torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def statically_true(condition: Any) -> bool:
    """Whether a (symbolic) condition holds for every allowed value; never adds a guard, never reads a hint."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def specialised(shape_env: Any) -> dict[str, int]:
    """Symbols of a ShapeEnv that have been pinned to one value: name -> value."""
    if shape_env is None:
        return {}
    return {str(s): int(v) for s, v in shape_env.replacements.items() if getattr(v, "is_Integer", False)}


def guard_count(shape_env: Any) -> int:
    """Number of guards a ShapeEnv holds; grows when code branched on a symbolic value."""
    return 0 if shape_env is None else len(shape_env.guards)


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
