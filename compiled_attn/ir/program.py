"""`Program`: a captured model that passes rewrite. Frozen; a pass copies the graph and shares the constants.

The graph is flat, as torch.export writes it: parameters, buffers and constants are placeholders, then come the user's
inputs; the outputs are first the new values of mutated state, then the user's outputs. `signature` (torch.export's own
record) says which placeholder and which output is what.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import PassError

LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ)
PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "from_node")


@dataclass(frozen=True)
class Program:
    """A model as a graph of ATen and vocabulary ops.

    state: parameters and buffers by qualified name.  constants: other tensors and objects by name.
    ranges: symbol -> allowed values.  call_graph: torch.export's module call graph, which holds the pytree specs.
    mode: "inference" (functional) or "train" (as export gives it).  history: names of the passes that changed it.
    origin: for each name in `state` that a pass made, the names it was made from.
    """

    graph_module: fx.GraphModule
    signature: ExportGraphSignature
    state: Mapping[str, torch.Tensor]
    constants: Mapping[str, Any]
    ranges: Mapping[Any, Any]
    call_graph: tuple[Any, ...]
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]]
    mode: str = "inference"
    history: tuple[str, ...] = ()
    origin: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def from_export(cls, exported: torch.export.ExportedProgram, *, mode: str = "inference") -> Program:
        """The Program of an exported program (its graph is copied, its tensors are shared)."""
        module = _torch.graph_module_like(exported.graph_module, copy_graph(exported.graph)[0])
        return cls(
            graph_module=module,
            signature=copy.deepcopy(exported.graph_signature),
            state=dict(exported.state_dict),
            constants=dict(exported.constants),
            ranges=dict(exported.range_constraints),
            call_graph=tuple(exported.module_call_graph),
            example_inputs=exported.example_inputs or ((), {}),
            mode=mode,
        )

    @classmethod
    def from_dynamo(cls, module: fx.GraphModule, example_inputs: list[Any]) -> Program:
        """The Program of a graph that Dynamo handed to a backend; every input of it is a user input."""
        from compiled_attn.ir.from_dynamo import from_dynamo

        return from_dynamo(module, example_inputs)

    def to_exported(self) -> torch.export.ExportedProgram:
        """An ExportedProgram of the same graph, for saving, packaging and ONNX."""
        graph, _ = copy_graph(self.graph)
        return torch.export.ExportedProgram(
            root=dict(self.graph_module.named_children()),
            graph=graph,
            graph_signature=copy.deepcopy(self.signature),
            state_dict=dict(self.state),
            range_constraints={**_torch.ranges_of_made_sizes(self.shape_env), **self.ranges},
            module_call_graph=list(self.call_graph),
            example_inputs=self.example_inputs,
            constants=dict(self.constants),
            verifiers=_torch.export_verifiers(self.mode),
        )

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def in_spec(self) -> pytree.TreeSpec:
        """Structure of (args, kwargs)."""
        return self.call_graph[0].signature.in_spec

    @property
    def out_spec(self) -> pytree.TreeSpec:
        return self.call_graph[0].signature.out_spec

    @property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def inputs(self) -> list[fx.Node]:
        """Placeholders of the user's inputs, in flat order."""
        names = {s.arg.name for s in self.signature.input_specs if s.kind == InputKind.USER_INPUT}
        return [n for n in self.placeholders if n.name in names]

    @property
    def fake_mode(self) -> Any:
        """The FakeTensorMode in which every node's meta["val"] lives."""
        return _torch.fake_mode_of(self.graph)

    @property
    def shape_env(self) -> Any:
        """The ShapeEnv of the symbolic dimensions, or None where every shape is static."""
        mode = self.fake_mode
        return None if mode is None else mode.shape_env

    def tensor_of(self, node: fx.Node) -> torch.Tensor | None:
        """The parameter, buffer or constant behind a placeholder; None for a user's input or any other node."""
        for spec in self.signature.input_specs:
            if node.op == "placeholder" and spec.arg.name == node.name and spec.kind in LIFTED:
                name = spec.target or ""
                found = self.state[name] if name in self.state else self.constants.get(name)
                return found if isinstance(found, torch.Tensor) else None
        return None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Placeholder name -> tensor, for every parameter, buffer and constant that the graph takes."""
        found = {}
        for spec in self.signature.input_specs:
            if spec.kind in LIFTED:
                name = spec.target or ""
                value = self.state[name] if name in self.state else self.constants.get(name)
                if isinstance(value, torch.Tensor):
                    found[spec.arg.name] = value
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph node by node in eager mode; same arguments and result as the captured model."""
        from_export = bool(self.call_graph[0].signature.inputs)  # guards of Dynamo are Dynamo's to check
        return _torch.quiet_module(self.to_exported(), guards=from_export)(*args, **kwargs)

    def edit(self) -> Edit:
        """A mutable draft of this program for a pass to change."""
        return Edit(self)

    def __str__(self) -> str:
        from compiled_attn.ir.text import program_text

        return program_text(self)

    def __repr__(self) -> str:
        return f"Program({len(self.graph.nodes)} nodes, mode={self.mode!r}, history={self.history})"


class Edit:
    """A draft of a Program: change `graph`, then `finish`. Fake values and provenance are kept by `call`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph, self.node_of = copy_graph(program.graph)
        self._new: dict[str, torch.Tensor] = {}
        self._origin: dict[str, tuple[str, ...]] = {}
        self._names: dict[str, str] = {}
        self._replaced: list[fx.Node] = []
        specs = [s for s in program.signature.input_specs if hasattr(s.arg, "name")]
        self._inputs = {s.arg.name for s in specs if s.kind not in LIFTED}
        self._targets = {s.arg.name: s.target for s in specs}
        self._tensors = program.tensors()
        self._changes = set(program.signature.buffers_to_mutate.values())

    def call(
        self, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *, like: fx.Node
    ) -> fx.Node:
        """A call_function node at the insertion point, its value computed from its arguments', provenance of `like`."""
        kwargs = kwargs or {}
        node = self.graph.call_function(target, args, kwargs)
        for key in PROVENANCE:
            if key in like.meta:
                node.meta[key] = like.meta[key]
        self._set_value(node)
        return node

    def _set_value(self, node: fx.Node) -> None:
        """Sets a call's fake value, and which sizes that data decide it brings in."""
        node.meta["val"] = self.value(node.target, node.args, node.kwargs)
        node.meta.pop("unbacked_bindings", None)
        fresh = _torch.fresh_sizes(self.program.shape_env, node.meta["val"])
        if fresh is not None:
            node.meta["unbacked_bindings"] = fresh

    def value(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Fake result of a call on nodes' fake values."""
        return fake_call(self.program.fake_mode, target, args, kwargs)

    def constant(self, name: str, tensor: torch.Tensor, *, made_from: tuple[str, ...] = ()) -> fx.Node:
        """A placeholder for a new constant tensor, kept under `made_<name>`.

        made_from: names in `state` whose change makes it stale.
        """
        name = "made_" + name.replace(".", "_")
        fresh, count = name, 0
        while fresh in self.program.state or fresh in self.program.constants or fresh in self._new:
            count += 1
            fresh = f"{name}_{count}"
        first = next(n for n in self.graph.nodes if n.op != "placeholder" or n.name in self._inputs)
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(fresh)
        mode = self.program.fake_mode
        node.meta["val"] = mode.from_tensor(tensor.detach(), static_shapes=True)
        self._new[fresh] = tensor.detach()
        self._origin[fresh] = made_from
        self._names[node.name] = fresh
        return node

    def known(self, node: fx.Node) -> tuple[str, torch.Tensor, tuple[str, ...]] | None:
        """Name, value and names in `state` it was made from, of a placeholder that stands for a tensor of the program.

        Constants that this draft made are among them. None for any other node, and for what the program changes.
        """
        if node.name in self._names:
            name = self._names[node.name]
            return name, self._new[name], self._origin[name]
        target = self._targets.get(node.name)
        value = self._tensors.get(node.name)
        if node.op != "placeholder" or target is None or value is None or target in self._changes:
            return None
        return target, value.detach(), self.program.origin.get(target, (target,))

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Every use of `old` becomes a use of `new`; `old` goes when the edit is finished."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._replaced.append(old)

    def propagate(self) -> None:
        """Recomputes every node's fake value from the placeholders', after shapes have changed."""
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._set_value(node)

    def finish(self, name: str) -> Program:
        """The new Program: dead nodes and constants without a reader are dropped, the signature is brought in line."""
        graph = self.graph
        for old in reversed(self._replaced):
            _erase_unused(old)
        graph.eliminate_dead_code()
        specs = {s.arg.name: s for s in self.program.signature.input_specs if hasattr(s.arg, "name")}
        mutated = set(self.program.signature.buffers_to_mutate.values())
        input_specs: list[InputSpec] = []
        for node in [n for n in graph.nodes if n.op == "placeholder"]:
            if node.name in self._names:
                kind, target = InputKind.CONSTANT_TENSOR, self._names[node.name]
                spec = InputSpec(kind, TensorArgument(node.name), target)
            else:
                spec = specs[node.name]
            lifted = spec.kind in LIFTED
            if lifted and not node.users and spec.target not in mutated:
                graph.erase_node(node)
                continue
            input_specs.append(spec)
        by_name = {s.target for s in input_specs if s.kind in LIFTED}
        output = next(n for n in graph.nodes if n.op == "output")
        output_specs = [
            replace(spec, arg=_argument(value))
            for spec, value in zip(self.program.signature.output_specs, output.args[0], strict=True)
        ]
        graph.lint()
        constants = {k: v for k, v in {**self.program.constants, **self._new}.items() if k in by_name}
        return replace(
            self.program,
            graph_module=_torch.graph_module_like(self.program.graph_module, graph),
            signature=ExportGraphSignature(input_specs, output_specs),
            state={k: v for k, v in self.program.state.items() if k in by_name},
            constants=constants,
            origin={k: v for k, v in {**self.program.origin, **self._origin}.items() if k in constants},
            history=(*self.program.history, name),
        )


def _erase_unused(node: fx.Node) -> None:
    """Erases a replaced node and what only it read; fx keeps dead nodes that may be random, as SDPA and dropout."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        schema = getattr(node.target, "_schema", None)
        if node._erased or node.users or node.op != "call_function" or (schema is not None and schema.is_mutable):
            continue
        waiting += node.all_input_nodes
        node.graph.erase_node(node)


def fake_call(mode: Any, target: Any, args: Any, kwargs: Any) -> Any:
    """Result of `target` on the fake values of nodes; ints and symbolic ints pass through."""

    def value(node: fx.Node) -> Any:
        if "val" not in node.meta:
            raise PassError(
                f"node {node.name} has no value",
                where=str(node.format_node()),
                do="make nodes with Edit.call, which computes it",
            )
        return node.meta["val"]

    args, kwargs = fx.node.map_arg((args, kwargs), value)
    picks = "conv" in str(target)  # torch asks whether the batch is below 16 to pick a kernel; that must bind no symbol
    with mode, torch.no_grad(), _torch.python_dispatcher(), _torch.without_guards(mode.shape_env if picks else None):
        return target(*args, **kwargs)  # as capture does: a composite op's C++ body may take no symbolic sizes


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    new = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    output = new.graph_copy(graph, table)
    new.output(output)
    last_old, last_new = list(graph.nodes)[-1], list(new.nodes)[-1]
    last_new.meta = copy.copy(last_old.meta)
    table[last_old] = last_new
    for old, fresh in table.items():
        if fresh.name != old.name:  # fx renames what shadows a builtin (`input`); the signature holds the old name
            fresh.name = old.name
    return new, table


def _argument(value: Any) -> Any:
    if isinstance(value, fx.Node):
        fake = value.meta["val"]
        if isinstance(fake, torch.Tensor):
            return TensorArgument(value.name)
        return _torch.symbolic_argument(value.name, fake)
    return ConstantArgument(name="", value=value)
