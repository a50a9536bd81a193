"""The one module that reaches private parts of torch. Imports of them are lazy; features are probed, not versions.

Contract tests in tests/ir/test_torch.py hold each function to what it promises on the installed torch.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from compiled_attn.ir.errors import LowerError

P = ParamSpec("P")
R = TypeVar("R")


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


def python_dispatcher() -> Any:
    """A context in which composite ops run by their Python decompositions, which take symbolic sizes."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def symbolic_argument(name: str, value: Any) -> Any:
    """torch.export's argument record for a SymInt, SymFloat or SymBool output of a graph."""
    from torch.export import graph_signature as sig

    if isinstance(value, (torch.SymInt, int)):
        return sig.SymIntArgument(name)
    if isinstance(value, (torch.SymFloat, float)):
        return sig.SymFloatArgument(name)
    return sig.SymBoolArgument(name)


def quiet_module(exported: torch.export.ExportedProgram, *, guards: bool = True) -> Any:
    """`exported.module()` without its warnings; runs the graph in eager mode. guards: checks the inputs' shapes."""
    import inspect

    can_skip = "check_guards" in inspect.signature(exported.module).parameters
    choice = {"check_guards": False} if can_skip and not guards else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return exported.module(**choice)


def export_verifiers(mode: str) -> list[Any]:
    """torch.export's checkers for a program's mode: the training form may hold in-place ops."""
    from torch._export.verifier import TrainingIRVerifier, Verifier

    return [TrainingIRVerifier if mode == "train" else Verifier]


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


_ONE_BUILD = threading.RLock()


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """The function, entered by one thread at a time with all others of this kind.

    torch.export keeps its state in globals, and what stands in for torch's functions here is seen by every thread.
    """

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _ONE_BUILD:
            return function(*args, **kwargs)

    return alone


@one_at_a_time
def aoti_package(exported: torch.export.ExportedProgram, path: str, options: dict[str, Any]) -> str:
    """Compiles an exported program with AOTInductor into a `.pt2` at `path`; returns the path.

    Where weights are frozen, tensor constants become buffers of `exported`: each reader of a constant has its own
    get_attr node, and torch's freezing deletes the tensor with the first of them that it folds (2.13).
    """
    import torch._inductor

    if options.get("freezing"):
        for spec in exported.graph_signature.input_specs:
            if spec.kind is InputKind.CONSTANT_TENSOR:
                spec.kind, spec.persistent = InputKind.BUFFER, False
    with _objects_side_by_side(), convolutions_of_any_batch(), bounded_sizes(exported):
        return torch._inductor.aoti_compile_and_package(exported, package_path=path, inductor_configs=options)


@contextmanager
def bounded_sizes(exported: torch.export.ExportedProgram) -> Iterator[None]:
    """Sizes that have no upper bound are held to 2^40 meanwhile.

    A size that depends on data bounds those below it by the largest integer, and Inductor can not write a product of
    that as an assertion (torch 2.13).
    """
    from torch.utils._sympy.value_ranges import ValueRanges

    ranges = getattr(fake_mode_of(exported.graph).shape_env, "var_to_range", {})
    with patch.dict(ranges, {s: ValueRanges(r.lower, 2**40) for s, r in ranges.items() if r.upper > 2**40}):
        yield


@contextmanager
def _objects_side_by_side() -> Iterator[None]:
    """AOTInductor compiles its wrapper and its kernels one after the other; here the wrapper's compiler runs beside."""
    from torch._inductor.cpp_builder import CppBuilder

    build = CppBuilder.build
    waiting: list[Future[None]] = []

    def wait() -> None:
        while waiting:
            waiting.pop().result()

    def beside(self: Any) -> None:
        if getattr(self, "_name", "").endswith(".wrapper") and getattr(self._build_option, "_compile_only", False):
            waiting.append(pool.submit(build, self))
            return
        if not getattr(self._build_option, "_compile_only", False):
            wait()  # what is linked must be there
        build(self)

    with ThreadPoolExecutor(1) as pool, patch.object(CppBuilder, "build", beside):
        yield
        wait()


@contextmanager
def convolutions_of_any_batch() -> Iterator[None]:
    """torch picks the kernel of a 1x1 convolution by its batch, which would bound a symbolic batch to 15.

    Here it picks by the sizes of the example; the choice serves only to foretell the memory format of a fake result.
    """
    pick = torch._C._select_conv_backend

    def at_hand(size: Any) -> Any:
        return size.node.hint if isinstance(size, torch.SymInt) else size

    def by_the_example(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes, strides = [at_hand(s) for s in x.shape], [at_hand(s) for s in x.stride()]
        if None in (*sizes, *strides):  # the data decides it: there is no example
            return pick(x, *args, **kwargs)
        return pick(torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device), *args, **kwargs)

    with patch.object(torch._C, "_select_conv_backend", by_the_example):
        yield


def inductor_state() -> str:
    """Digest of Inductor's whole configuration, as far as it can change generated code."""
    from torch._inductor import config

    told = {**config.save_config_portable(), "aot_inductor.metadata": None}  # a build leaves its metadata there
    return hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()


def size_hints(shape_env: Any) -> str:
    """The sizes that the symbols stood for at capture; heuristics may read them."""
    name = "backed_var_to_val" if hasattr(shape_env, "backed_var_to_val") else "var_to_val"  # the latter until 2.12
    found = getattr(shape_env, name, {})
    return str(sorted((str(k), str(v)) for k, v in found.items()))


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
            found: Any
            found, signature = aot_export_module(module, fakes, trace_joint=False, pre_dispatch=True)
            return found, {str(k): str(v) for k, v in signature.user_inputs_to_mutate.items()}
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


def ranges_of_made_sizes(shape_env: Any) -> dict[Any, Any]:
    """Symbol -> values of the sizes that data decide, passes' own among them; torch reads no saved program without."""
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    ranges = getattr(shape_env, "var_to_range", {})
    return {symbol: values for symbol, values in ranges.items() if symbol_is_type(symbol, SymT.UNBACKED_INT)}


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


def give_weights(loader: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Tensors by name for a package built without its weights; it reads them where they are, and keeps none alive."""
    loader.load_constants(tensors, False, True, True)  # in use at once, all of them, the caller's own


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


def size_bounds(size: Any, ranges: Any) -> tuple[int, int | None]:
    """Lowest and highest value of a size from the declared `ranges` of its symbols (None: no highest); never a hint."""
    from torch.utils._sympy.value_ranges import bound_sympy

    if isinstance(size, int):
        return size, size
    found = bound_sympy(expression(size), dict(ranges))
    low, high = (int(end) if getattr(end, "is_Integer", False) else None for end in (found.lower, found.upper))
    return max(low or 0, 0), None if high is None or high >= 2**62 else high


class CppView:
    """A tensor as a C++ template's source sees it.

    pointer: expression of its first element, `ctype*` (inputs const).  sizes, strides: expressions, in elements.
    """

    def __init__(self, kernel: Any, node: Any, pointer: str) -> None:
        from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP

        layout = node.get_layout()
        self.dtype: torch.dtype = layout.dtype
        self.ctype: str = DTYPE_TO_CPP[layout.dtype]
        offset = _cpp_expression(kernel, layout.offset)
        self.pointer = pointer if offset == "0L" else f"({pointer} + {offset})"
        self.sizes = tuple(_cpp_expression(kernel, s) for s in layout.size)
        self.strides = tuple(_cpp_expression(kernel, s) for s in layout.stride)


def _cpp_expression(kernel: Any, expr: Any) -> str:
    import sympy
    from torch._inductor.codegen.cpp_utils import cexpr_index

    return cexpr_index(kernel.rename_indexing(sympy.sympify(expr)))


def _announced(name: str) -> str:
    """The C++ line by which a kernel shows in torch's profiler, where Inductor is asked for that; else nothing."""
    from torch._inductor import config
    from torch._inductor.virtualized import V

    if not config.cpp.enable_kernel_profile or not V.graph.cpp_wrapper:
        return ""
    return f'torch::aot_inductor::RAIIAtenRecordFunctionHandle record("{name}", nullptr);\n'


@cache
def _cpp_template_class() -> Any:
    """A CppTemplate whose source is what a plain function writes around the kernel's declaration."""
    from torch._inductor.codegen.cpp import get_export_declaration
    from torch._inductor.codegen.cpp_template import CppTemplate
    from torch._inductor.virtualized import V

    class InlinedHeader(CppTemplate):
        def __init__(
            self,
            name: str,
            inputs: dict[str, Any],
            layout: Any,
            source: Callable[..., tuple[str, str]],
            scalars: dict[str, Any],
        ) -> None:
            super().__init__(name, list(inputs.values()), layout, num_threads=1)
            self.named_inputs = inputs
            self.source = source
            self.scalars = scalars

        def render(
            self, kernel: Any = None, template_buffer_node: Any = None, epilogue_nodes: Any = None, **_: Any
        ) -> Any:
            if epilogue_nodes:
                raise RuntimeError(f"Inductor fused {epilogue_nodes} behind {self.name}, which takes no epilogue")
            outputs = template_buffer_node.outputs or [template_buffer_node]
            kept = {
                f"out_{i}": node for i, node in enumerate(outputs) if node.get_name() not in V.graph.removed_buffers
            }
            others = [node.get_layout().offset for node in self.named_inputs.values()] + list(self.scalars.values())
            declaration = kernel.def_kernel(inputs=self.named_inputs, outputs=kept, extra_sizevars=others)
            views: dict[str, Any] = {name: _cpp_expression(kernel, value) for name, value in self.scalars.items()}
            for name, node in self.named_inputs.items():
                views[name] = CppView(kernel, node, kernel.args.input_buffers[node.get_name()])
            for i in range(len(outputs)):
                node = kept.get(f"out_{i}")
                views[f"out_{i}"] = None if node is None else CppView(kernel, node, f"out_{i}")
            header, body = self.source(views)
            code = self.header()
            code.splice(header)
            body = _announced(f"cpp_{self.name}") + body
            code.writeline(f'extern "C" {get_export_declaration()}')
            code.writeline(declaration)
            with code.indent():
                code.splice("{\n" + body + "\n}")
            return code.getvalue()

    return InlinedHeader


def cpp_template(
    name: str,
    inputs: dict[str, Any],
    outputs: list[tuple[torch.dtype, list[Any], list[Any]]],
    source: Callable[[dict[str, Any]], tuple[str, str]],
    scalars: dict[str, Any] | None = None,
    strided: frozenset[str] = frozenset(),
) -> tuple[Any, ...]:
    """Inside a lowering: one kernel that fills `outputs`, each (dtype, sizes, strides); returns Inductor's values.

    inputs: name -> Inductor value; read in place where its last dimension is dense, else copied; those in `strided` are
    read in place by any strides.
    source: CppViews by name (`out_0`, `out_1`, ...; None for an output that nothing reads) and the expressions of
    `scalars`, which may be symbolic -> header text, statements.
    Nothing is fused behind the kernel. Several outputs leave as the buffers of a multi-output template, each with its
    own layout, which Inductor allocates and the kernel fills.
    """
    from torch._inductor import ir
    from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
    from torch._inductor.utils import Placeholder
    from torch._inductor.virtualized import V

    nodes = {k: _in_place(v, dense_last=k not in strided) for k, v in inputs.items()}
    device = next(iter(nodes.values())).get_device()
    layouts = [ir.FixedLayout(device, dtype, sizes, strides) for dtype, sizes, strides in outputs]
    template = _cpp_template_class()(name, nodes, layouts[0], source, scalars or {})

    def make_kernel_render(template_node: Any, *_: Any, epilogue_nodes: Any = None, **__: Any) -> tuple[Any, Any]:
        kernel = CppTemplateKernel(kernel_name=str(Placeholder.KERNEL_NAME), num_threads=1)

        def render() -> str:
            return kernel.render(template, template_buffer_node=template_node, epilogue_nodes=epilogue_nodes)

        return kernel, render

    buffer = ir.CppTemplateBuffer(layouts[0], list(nodes.values()), make_kernel_render, template, None)
    V.graph.no_fuse_buffer_names.add(buffer.get_name())
    if len(layouts) == 1:
        return (ir.TensorBox.create(buffer),)
    parts: list[Any] = [ir.MultiOutput(layout, buffer, [(list, i)]) for i, layout in enumerate(layouts)]
    buffer.layout = ir.MultiOutputLayout(device=device)
    buffer.outputs = parts
    V.graph.no_fuse_buffer_names.update(part.get_name() for part in parts)
    return tuple(ir.TensorBox.create(part) for part in parts)


def _in_place(value: Any, *, dense_last: bool = True) -> Any:
    """An Inductor value as a buffer or a strided view of one; with `dense_last`, its last dimension is (or has one)."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    def unwrapped(x: Any) -> Any:
        view = getattr(x, "data", x)
        if isinstance(view, ir.BaseView):  # freezing it otherwise, torch may ask for sizes that the data decides
            view.realize()
            base: Any = view.unwrap_view()
            if isinstance(getattr(base, "layout", None), ir.FlexibleLayout):
                order = _order_below(view)
                base.freeze_layout() if order is None else base.freeze_layout_with_stride_order(order)
        found: Any = ir.InputsKernel.unwrap_storage_for_input(ir.ExternKernel.realize_input(x))
        if isinstance(found.layout, ir.FlexibleLayout):
            found.freeze_layout()
        return found

    node = unwrapped(value)
    base = V.graph.get_dtype(node.get_name())
    known = V.graph.sizevars.statically_known_equals
    dense = not dense_last or known(node.get_stride()[-1], 1) or known(node.get_size()[-1], 1)
    return node if dense and base == node.get_dtype() else unwrapped(ir.ExternKernel.copy_input(value))


def _order_below(view: Any) -> list[int] | None:
    """Ranks of the strides with which what lies below a view is dense when the view's permutation is; None without one.

    A map whose layout nobody has chosen yet is else written channels first, and turned when it is read channels last.
    """
    from torch._inductor import ir

    while isinstance(view.data, ir.BaseView):
        view = view.data
    if not isinstance(view, ir.PermuteView):
        return None
    dims = list(view.dims)
    return [len(dims) - 1 - dims.index(d) for d in range(len(dims))]


_given: dict[Any, Any] = {}  # overload -> the lowering that register_inductor_lowering left with Inductor


def register_inductor_lowering(overload: Any, lowering: Callable[..., Any]) -> None:
    """Inductor lowers `overload` by `lowering(*args, **kwargs)` from now on; None from it means Inductor's fallback.

    Takes the place of the fallback that Inductor gives an operator it meets without a lowering, and of what that asks
    of the inputs: plain torch.compile may have seen the operator before.
    """
    from torch._inductor import lowering as inductor

    if overload in _given and inductor.lowerings.get(overload) is _given[overload]:
        return
    otherwise = inductor.fallback_handler(overload, add_to_fallback_set=False)

    def lowered(*args: Any, **kwargs: Any) -> Any:
        found = lowering(*args, **kwargs)
        return otherwise(*args, **kwargs) if found is None else found

    for asked in (inductor.fallbacks, inductor.needs_realized_inputs):
        asked.discard(overload)
    inductor._maybe_layout_constraints.pop(overload, None)
    inductor.register_lowering(overload, type_promotion_kind=None)(lowered)
    _given[overload] = inductor.lowerings[overload]


def inductor_copy(value: Any) -> Any:
    """Inside a lowering: a copy in a buffer of its own, for what is written into later on.

    A template of several outputs may read no buffer that a later kernel mutates: Inductor's scheduler then makes that
    kernel a user of the template's own buffer, which it asserts to have outputs only (torch 2.13).
    """
    from torch._inductor import ir

    return ir.ExternKernel.copy_input(value)


def inductor_expand(value: Any, sizes: list[Any]) -> Any:
    """Inside a lowering: a value broadcast to `sizes` as a view."""
    from torch._inductor.lowering import expand

    return expand(value, sizes)


def inductor_channels_last(value: Any) -> Any:
    """Inside a lowering: a map [B, C, Y, X] as a view [B, Y, X, C], laid out (copied where it is not) with C dense."""
    from torch._inductor import ir
    from torch._inductor.lowering import permute

    laid_out: Any = ir.ExternKernel.require_channels_last(value)
    return permute(laid_out if isinstance(laid_out, ir.TensorBox) else ir.TensorBox.create(laid_out), [0, 2, 3, 1])


def inductor_contiguous(value: Any) -> Any:
    """Inside a lowering: a value whose memory is dense and in order, copied where it is not."""
    from torch._inductor import ir

    return ir.ExternKernel.require_contiguous(value)


@contextmanager
def without_guards(shape_env: Any) -> Iterator[None]:
    """Shapes asked for in the block leave no guard and fix no symbol (bicubic upsampling's shape rule does both)."""
    if shape_env is None:
        yield
        return
    with shape_env.suppress_guards():
        yield


def symbolic_max(*expressions: Any) -> Any:
    """The greatest of sympy expressions and numbers, as an expression."""
    import sympy

    return sympy.Max(*expressions)


def cpu_options(march: str, vector_bits: int) -> dict[str, Any]:
    """Inductor's options for code that another CPU than this machine's runs; torch before 2.13 can not be told."""
    from torch._inductor import config

    if not hasattr(config.cpp, "march"):
        raise LowerError(
            f"this torch builds CPU code for the machine it runs on, not for -march={march}",
            facts=f"torch {torch.__version__} has no option for it; torch 2.13 has",
            do="build with torch 2.13, or on such a machine with target='cpu'",
        )
    return {"cpp.march": march, "cpp.simdlen": vector_bits}


def module_call_like(entry: Any, out_spec: Any) -> Any:
    """A copy of torch.export's record of the whole call, with another structure of the result."""
    from dataclasses import replace

    return replace(entry, signature=replace(entry.signature, out_spec=out_spec))


def triton_launches(graph: fx.Graph) -> list[tuple[Any, dict[str, Any]]]:
    """The Triton kernels that a traced graph launches, in order, each with its arguments.

    A launch that sets warps or stages appears as an autotuner of one configuration around the kernel.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    nodes = [node for node in graph.nodes if str(node.target).startswith("triton_kernel_wrapper")]
    return [(kernel_side_table.get_kernel(node.kwargs["kernel_idx"]), dict(node.kwargs["kwargs"])) for node in nodes]


def symbolic_fakes(args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Fake copies of the tensors among `args`, each size above 1 a symbol, equal sizes the same; and their ShapeEnv."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * value.dim())
        return mode.from_tensor(value, symbolic_context=context)

    return shape_env, tuple(fake(a) for a in args)


def inductor_lowering(overload: Any) -> Any:
    """What Inductor lowers `overload` by, or None."""
    from torch._inductor.lowering import lowerings

    return lowerings.get(overload)


def compile_and_read(model: Any, *args: Any, dynamic: bool = True, **options: Any) -> tuple[Any, str]:
    """`model` compiled by torch.compile and called once; and the code that Inductor wrote.

    dynamic: with symbolic sizes.  options: Inductor's.
    """
    from torch._inductor.utils import run_and_get_code

    compiled = torch.compile(model, dynamic=dynamic, options=options or None)
    _, code = run_and_get_code(compiled, *args)
    return compiled, "\n".join(code)


def fix_dynamo_floats(module: fx.GraphModule) -> None:
    """Makes Dynamo begin again with the floats that modules hold (a scale, an epsilon) as constants, guarded.

    Under dynamic=True they come as inputs, and a graph whose scale is an input can not be matched. Floats that are
    arguments of the compiled function stay inputs. Raises Dynamo's own restart where there is one to fix.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState

    fresh = False
    for node in module.graph.find_nodes(op="placeholder"):
        memo = getattr(node.meta.get("example_value"), "item_memo", None)
        source = getattr(getattr(node, "_dynamo_source", None), "name", "")
        name = source() if callable(source) else source
        if not isinstance(memo, torch.SymFloat) or not re.search(r"\.\w+$", name):
            continue
        symbol = getattr(memo.node._expr, "name", "")
        if symbol and not TensorifyState.should_specialize(symbol):
            TensorifyState.specialize(symbol)
            fresh = True
    if fresh:
        raise TensorifyScalarRestartAnalysis


def settled(value: Any) -> Any:
    """A fake tensor whose sizes that its ShapeEnv has pinned to one number are that number; others as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    pinned = [isinstance(n, torch.SymInt) and n.node.maybe_as_int() is not None for n in value.shape]
    if not any(pinned):
        return value

    def number(size: Any) -> Any:
        known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
        return size if known is None else known

    mode: Any = value
    with mode.fake_mode:
        return torch.empty_strided(
            [number(n) for n in value.shape],
            [number(n) for n in value.stride()],
            dtype=value.dtype,
            device=value.device,
            requires_grad=value.requires_grad,
        )


def cpp_function(source: str, options: dict[str, Any] | None = None) -> Callable[..., None]:
    """`kernel` of a C++ source with C linkage, compiled as Inductor compiles its own; ints are passed as 64-bit.

    options: of Inductor, as `cpu_options` gives them.
    """
    import ctypes

    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache

    with config.patch(options or {}):
        function = CppCodeCache.load(source).kernel

    def call(*arguments: int) -> None:
        function(*(ctypes.c_int64(a) for a in arguments))

    return call


def fresh_sizes(shape_env: Any, value: Any) -> dict[Any, Any] | None:
    """Symbols of sizes that only the data decides and that `value` brings in -> where in it; None where there are none.

    Each is told once: asked again, it is an old one.
    """
    from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings

    found: dict[Any, Any] | None = compute_unbacked_bindings(shape_env, value)
    return found or None
