"""A Program as a plain GraphModule for AOTAutograd: its tensors are arguments, its mutation is in place."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from compiled_attn.ir.program import Program, copy_graph

INSIDE = (InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ)
SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")  # makes two modules one state
MUTATIONS = (OutputKind.USER_INPUT_MUTATION, OutputKind.BUFFER_MUTATION)


def flat_module(program: Program, *, inside: bool = True) -> fx.GraphModule:
    """The program's graph on flat arguments: parameters, buffers and user inputs in the signature's order.

    inside: constants become attributes; otherwise they stay arguments, see `constant_arguments`.
    New values of mutated inputs and buffers are written by `copy_`; the outputs are the user's alone, a flat tuple.
    """
    graph, _ = copy_graph(program.graph)
    constants: dict[str, Any] = {}
    by_name = {n.name: n for n in graph.nodes}
    for spec in program.signature.input_specs:
        if spec.kind not in INSIDE or not inside:
            continue
        node = by_name[spec.arg.name]
        name = "constant_" + node.name
        constants[name] = program.constants[spec.target or ""]
        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            attribute = graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default:  # what it views may have been replaced, in another memory order
            node.target = torch.ops.aten.reshape.default
    output = next(n for n in graph.nodes if n.op == "output")
    placeholder_of = {s.target: s.arg.name for s in program.signature.input_specs if s.kind == InputKind.BUFFER}
    written: dict[object, fx.Node] = {}
    kept: list[object] = []
    for made, value in zip(program.signature.output_specs, output.args[0], strict=True):
        if made.kind not in MUTATIONS:
            kept.append(value)
            continue
        name = str(made.target if made.kind == OutputKind.USER_INPUT_MUTATION else placeholder_of[made.target])
        with graph.inserting_before(output):
            written[value] = graph.call_function(torch.ops.aten.copy_.default, (by_name[name], value))
        written[value].meta = dict(value.meta)
    output.args = (tuple(written.get(v, v) for v in kept),)
    bodies = {str(n.target) for n in graph.nodes if n.op == "get_attr" and n.target not in constants}
    return fx.GraphModule({**constants, **{k: attrgetter(k)(program.graph_module) for k in bodies}}, graph)


def tensor_arguments(program: Program) -> tuple[str, ...]:
    """Names of the parameters and buffers that `flat_module` takes before the user's inputs, in order."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    return tuple(s.target or "" for s in program.signature.input_specs if s.kind in kinds)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def kind_of(leaf: Any, free: frozenset[int] = frozenset()) -> Any:
    """What of a flat input must be the same for a capture to serve it; `free`: dimensions of any size."""
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, leaf.device, tuple(None if d in free else n for d, n in enumerate(leaf.shape))
    return type(leaf), leaf


def constant_arguments(program: Program) -> list[Any]:
    """What the constant placeholders of `flat_module(program, inside=False)` take, in order."""
    return [program.constants[s.target or ""] for s in program.signature.input_specs if s.kind in INSIDE]
