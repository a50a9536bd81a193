"""What a Program's contract says about its calls, and the same as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import ContractError
from compiled_attn.ir.program import Program
from compiled_attn.runtime import expr as ex
from compiled_attn.runtime.call import describe as tensor_text
from compiled_attn.runtime.call import range_text, strides_of
from compiled_attn.runtime.contract import (
    Call,
    ConstantSpec,
    Contract,
    PassRecord,
    Range,
    SizeSpec,
    TensorSpec,
    determined,
)
from compiled_attn.runtime.expr import Expr

if TYPE_CHECKING:
    from compiled_attn.runtime.build import Build


def call_of(program: Program, *, dynamic_shapes: Any = None) -> Call:
    """How a program is called. dynamic_shapes: where given, its names of dimensions take the place of torch's symbols.

    Raises ContractError where the program can not be called through a contract: hidden state, an input that is a
    symbolic number, a pytree that can not be written down, a size that has no integer form.
    """
    _no_hidden_state(program)
    values = {n.name: n.meta.get("val") for n in program.graph.nodes}
    mutated = set(program.signature.user_inputs_to_mutate.values())
    given = [s.arg for s in program.signature.input_specs if s.kind == InputKind.USER_INPUT]
    results = [s.arg for s in program.signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    positional, arguments = _arguments(program)
    inputs = tuple(_input(a, values, mutated) for a in given)
    names = _output_names(program.out_spec, len(results))
    outputs = tuple(_output(n, a, values) for n, a in zip(names, results, strict=True))
    call = Call(
        arguments=arguments,
        positional=positional,
        inputs=inputs,
        outputs=outputs,
        symbols={},
        guards=(),
        in_tree=_tree_text(program.in_spec),
        out_tree=_tree_text(program.out_spec),
    )
    return _named(_with_symbols(call, program), dynamic_shapes)


def passes_of(build: Build) -> tuple[PassRecord, ...]:
    """The passes that changed the program, with the options of those that the user named."""
    named = {p.name: p for p in build.settings.passes}
    records = []
    for record in build.records:
        if record.changed:
            options = vars(named[record.name]) if record.name in named else {}
            records.append(PassRecord(record.name, {k: _option(v) for k, v in options.items()}))
    return tuple(records)


def text(contract: Contract) -> str:
    """A contract for people, one fact a line."""
    call, target = contract.call, contract.target
    lines = [f"input    {i.name:<20} {_leaf_text(i)}" for i in call.inputs]
    lines += [f"output   {o.name:<20} {_leaf_text(o)}" for o in call.outputs]
    lines += [
        f"size     {k:<20} {range_text(r)}" + ("" if r.bound else ", by the data") for k, r in call.symbols.items()
    ]
    lines += [f"guard    {ex.text(g)}" for g in call.guards]
    lines += [
        f"pass     {p.name:<20} " + ", ".join(f"{k}={v!r}" for k, v in p.options.items()) for p in contract.passes
    ]
    lines += [f"target   {target.name:<20} {target.device}, {target.platform} {target.machine}, {' '.join(target.isa)}"]
    lines += [f"origin   {target.origin}"]
    lines += [f"version  {k:<20} {v}" for k, v in contract.versions.items()]
    lines += [f"member   {m.size:>12} B  {m.sha256[:16]}  {m.name}" for m in contract.members]
    return "\n".join(line.rstrip() for line in lines)


def _leaf_text(leaf: TensorSpec | ConstantSpec | SizeSpec) -> str:
    if isinstance(leaf, TensorSpec):
        plain = leaf.order == tuple(range(len(leaf.order)))
        return (
            tensor_text(leaf) + ("" if plain else f", memory order {leaf.order}") + (", state" if leaf.mutated else "")
        )
    return f"always {leaf.value!r}" if isinstance(leaf, ConstantSpec) else f"size {ex.text(leaf.value)}"


def _no_hidden_state(program: Program) -> None:
    hidden = sorted(program.signature.buffers_to_mutate.values())
    if hidden:
        raise ContractError(
            f"the model writes into its buffer {hidden[0]}",
            facts="an artifact has no hidden state, or two users of one artifact would mix",
            do="make it an input of forward that forward writes into, or put the model into eval mode",
        )


def _arguments(program: Program) -> tuple[int, tuple[str, ...]]:
    """Number of positional arguments, and all names of arguments, in the pytree's order."""
    args, kwargs = pytree.tree_unflatten([0] * program.in_spec.num_leaves, program.in_spec)
    named = list(program.call_graph[0].signature.forward_arg_names or [])[: len(args)]
    named += [f"arg{i}" for i in range(len(named), len(args))]
    return len(args), (*named, *kwargs)


def _input(argument: Any, values: Mapping[str, Any], mutated: set[str]) -> TensorSpec | ConstantSpec:
    if isinstance(argument, TensorArgument):
        return _tensor(argument.name, values[argument.name], argument.name in mutated, is_input=True)
    if isinstance(argument, ConstantArgument) and _plain(argument.value):
        return ConstantSpec(argument.name, argument.value)
    raise ContractError(
        f"input {argument.name} can not be in a contract",
        facts="inputs are tensors, or constants that the export fixes (numbers, strings, None)",
        do="pass it as a tensor, or leave it out of dynamic_shapes so that the export fixes it",
    )


def _output(name: str, argument: Any, values: Mapping[str, Any]) -> TensorSpec | ConstantSpec | SizeSpec:
    if isinstance(argument, ConstantArgument) and _plain(argument.value):
        return ConstantSpec(name, argument.value)
    value = values.get(getattr(argument, "name", ""))
    if isinstance(value, torch.Tensor):
        return _tensor(name, value, False)
    if isinstance(value, (int, torch.SymInt)):
        return SizeSpec(name, _size(value, name))
    raise ContractError(
        f"output {name} can not be in a contract",
        facts=f"outputs are tensors, sizes and constants; this one is a {type(argument).__name__}",
        do="return a tensor instead",
    )


def _plain(value: Any) -> bool:
    finite = not isinstance(value, float) or math.isfinite(value)
    return isinstance(value, (int, float, bool, str, type(None))) and finite


def _tensor(name: str, value: torch.Tensor, mutated: bool, *, is_input: bool = False) -> TensorSpec:
    shape = tuple(_size(n, name) for n in value.shape)
    order = _order(value, shape, name) if is_input else tuple(range(len(shape)))
    return TensorSpec(name, str(value.dtype)[6:], shape, order, value.device.type, mutated)


def _size(value: Any, name: str) -> Expr:
    try:
        return ex.from_sympy(_torch.expression(value))
    except ValueError as error:
        raise ContractError(
            f"a size of {name} has no integer form",
            facts=f"it is {value}: {error}",
            do="make this dimension static, or compute its size with +, *, //, %, min and max",
        ) from None


def _order(value: torch.Tensor, shape: tuple[Expr, ...], name: str) -> tuple[int, ...]:
    """The order in memory of an input's dimensions, outermost first. Raises ContractError where memory is not dense."""
    symbols = sorted(set().union(*map(ex.symbols_of, shape)))
    numbers = [{s: 6 + 5 * i + k for i, s in enumerate(symbols)} for k in (0, 1)]  # any two different assignments
    plain = tuple(range(len(shape)))
    try:
        strides = [_size(s, name) for s in value.stride()]
        at = [([ex.evaluate(n, v) for n in shape], [ex.evaluate(s, v) for s in strides]) for v in numbers]
    except ex.Undefined:
        return plain
    for order in (plain, tuple(sorted(plain, key=lambda d: (-at[0][1][d], d)))):
        if all(_dense(sizes, steps, order) for sizes, steps in at):
            return order
    raise ContractError(
        f"input {name} is not dense in memory",
        facts=f"sizes {tuple(value.shape)}, strides {value.stride()}",
        do=f"export with {name}.contiguous() as the example input; calls may then pass any memory order",
    )


def _dense(sizes: Sequence[int], steps: Sequence[int], order: Sequence[int]) -> bool:
    return all(n == 1 or a == b for n, a, b in zip(sizes, steps, strides_of(sizes, order), strict=True))


def _with_symbols(call: Call, program: Program) -> Call:
    """The call with ranges for every symbol in it, and the conditions that tracing relied on."""
    env = program.shape_env
    bound = determined(call)
    leaves = [*call.inputs, *call.outputs]
    sizes = [e for leaf in leaves if isinstance(leaf, TensorSpec) for e in leaf.shape]
    sizes += [leaf.value for leaf in leaves if isinstance(leaf, SizeSpec)]
    used = set().union(*map(ex.symbols_of, sizes))
    known = {str(s): s for s in [*program.ranges, *(env.var_to_range if env is not None else {})]}
    symbols = {
        name: Range(*_torch.symbol_range(env, known[name], program.ranges), bound=name in bound)
        for name in sorted(used)
    }
    guards = []
    for condition in _torch.shape_conditions(env):
        try:
            guard = ex.from_sympy(condition)
        except ValueError:
            continue
        if isinstance(guard, tuple) and guard[0] in ex.CONDITIONS and ex.symbols_of(guard) <= bound:
            guards.append(guard)
    return _replaced(call, symbols, tuple(guards), {})


def _named(call: Call, dynamic_shapes: Any) -> Call:
    """The call with torch's symbols (`s77`) renamed to the user's names of dimensions (`batch`)."""
    names: dict[str, str] = {}
    tensors = {t.name: t for t in call.tensors}
    for argument, dims in _declared(call, dynamic_shapes):
        spec = tensors.get(argument)
        for dim, label in dims.items() if spec is not None else ():
            symbol = spec.shape[dim] if spec is not None and -len(spec.shape) <= dim < len(spec.shape) else None
            if isinstance(symbol, str) and label not in names.values() and label not in call.symbols:
                names.setdefault(symbol, label)
    return _replaced(call, call.symbols, call.guards, names)


def _declared(call: Call, dynamic_shapes: Any) -> list[tuple[str, dict[int, str]]]:
    """(argument, {dimension: name}) of the tensors that are arguments themselves."""
    if isinstance(dynamic_shapes, Mapping):
        pairs = list(dynamic_shapes.items())
    else:
        pairs = list(zip(call.arguments, dynamic_shapes or (), strict=False))
    found = []
    for argument, dims in pairs:
        items = (
            dims.items() if isinstance(dims, Mapping) else enumerate(dims if isinstance(dims, (list, tuple)) else ())
        )
        labels = {d: _label(v) for d, v in items if isinstance(d, int)}
        found.append((argument, {d: label for d, label in labels.items() if label}))
    return found


def _label(declared: Any) -> str:
    name = declared if isinstance(declared, str) else getattr(declared, "__name__", "")
    return name if isinstance(name, str) and ex.SYMBOL.match(name) else ""


def _replaced(call: Call, symbols: Mapping[str, Range], guards: tuple[Expr, ...], names: Mapping[str, str]) -> Call:
    def leaf(spec: Any) -> Any:
        if isinstance(spec, TensorSpec):
            shape = tuple(ex.renamed(e, names) for e in spec.shape)
            return TensorSpec(spec.name, spec.dtype, shape, spec.order, spec.device, spec.mutated)
        return SizeSpec(spec.name, ex.renamed(spec.value, names)) if isinstance(spec, SizeSpec) else spec

    return Call(
        arguments=call.arguments,
        positional=call.positional,
        inputs=tuple(map(leaf, call.inputs)),
        outputs=tuple(map(leaf, call.outputs)),
        symbols={names.get(k, k): v for k, v in symbols.items()},
        guards=tuple(ex.renamed(g, names) for g in guards),
        in_tree=call.in_tree,
        out_tree=call.out_tree,
    )


def _tree_text(spec: Any) -> str:
    try:
        return pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ContractError(
            "the structure of the model's inputs or outputs can not be written down",
            facts=str(error).splitlines()[0],
            do="register the container with a serialized_type_name (torch.utils._pytree.register_pytree_node)",
        ) from None


def _output_names(spec: Any, count: int) -> list[str]:
    """A name for each flat output: its path in the result (`logits`, `hidden.0`), or `output`, `output.0`, ..."""
    markers = [object() for _ in range(count)]
    try:
        paths = dict(_paths(pytree.tree_unflatten(markers, spec), ""))
    except (TypeError, ValueError):
        paths = {}
    if [id(m) for m in markers] != list(paths) or len(set(paths.values())) != count:
        return [f"output.{i}" for i in range(count)] if count != 1 else ["output"]
    return [path.removeprefix(".") or "output" for path in paths.values()]


def _paths(value: Any, path: str) -> list[tuple[int, str]]:
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, (list, tuple)):
        items = ((i if path else f"output.{i}", v) for i, v in enumerate(value))
    else:
        return [(id(value), path)]
    return [found for key, v in items for found in _paths(v, f"{path}.{''.join(_letters(str(key)))}")]


def _letters(key: str) -> list[str]:
    return [c if c.isascii() and (c.isalnum() or c in "_.") else "_" for c in key]


def _option(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_option(v) for v in value]
    return value if _plain(value) else repr(value)
