"""A Program of what Dynamo hands to a backend: parameters, buffers and symbolic sizes all come in as user inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import CaptureError

if TYPE_CHECKING:
    from compiled_attn.ir.program import Program

ALIASED = "an output is a view of an input that the graph writes into"


def from_dynamo(module: fx.GraphModule, example_inputs: list[Any]) -> Program:
    """The Program of a Dynamo graph; symbols and guards stay those of Dynamo's own ShapeEnv.

    Where no input wants a gradient (or gradients are off) the program is functional, mode "inference"; else it keeps
    the in-place ops and the grad-mode switches, mode "train", and AOTAutograd functionalises it.
    Raises CaptureError where an input is neither a tensor nor a symbolic size, or an output aliases mutated state.
    """
    from compiled_attn.ir.program import Program

    train = wants_gradients(example_inputs)
    fakes = _torch.dynamo_inputs(module)
    for node, fake in zip((n for n in module.graph.nodes if n.op == "placeholder"), fakes, strict=True):
        if not isinstance(fake, (torch.Tensor, torch.SymInt, torch.SymFloat, int, float)):
            raise CaptureError(
                f"a Dynamo graph takes a {type(fake).__name__}",
                where=str(node.target),
                facts="a Program takes tensors and symbolic sizes",
                do="nothing; this part of the model goes to Inductor unchanged",
            )
    if any("checkpoint" in str(node.target) for node in module.graph.nodes if node.op == "call_function"):
        raise CaptureError(
            "the graph holds activation checkpointing",
            facts="a Program does not say what is computed again in the backward pass",
            do="nothing; this part of the model goes to Inductor unchanged",
        )
    traced, mutated = _torch.dynamo_aten(module, fakes, functional=not train)
    graph = traced.graph
    for node in graph.nodes:
        node.meta.setdefault("nn_module_stack", {})  # Dynamo leaves it out at the top level
        if node.op == "placeholder":
            node.meta["val"] = _torch.settled(node.meta["val"])  # what tracing pinned, no pass did
    output = next(n for n in graph.nodes if n.op == "output")
    values = list(output.args[0])
    if any(_views_of(v, set(values[: len(mutated)])) for v in values[len(mutated) :]):
        facts = "a functional form would return a copy"
        raise CaptureError(ALIASED, facts=facts, do="nothing; this part of the model goes to Inductor unchanged")
    constants, lifted = _lift(traced)
    inputs = [n for n in graph.nodes if n.op == "placeholder"][len(lifted) :]
    input_specs = lifted + [InputSpec(InputKind.USER_INPUT, _argument(n), None) for n in inputs]
    kinds = [OutputKind.USER_INPUT_MUTATION] * len(mutated) + [OutputKind.USER_OUTPUT] * (len(values) - len(mutated))
    targets = [*mutated.values(), *([None] * (len(values) - len(mutated)))]
    output_specs = [OutputSpec(k, _argument(v), t) for k, v, t in zip(kinds, values, targets, strict=True)]
    in_spec = pytree.tree_structure(((0,) * len(inputs), {}))
    out_spec = pytree.tree_structure((0,) * (len(values) - len(mutated)))
    return Program(
        graph_module=traced,
        signature=ExportGraphSignature(input_specs, output_specs),
        state={},
        constants=constants,
        ranges={},
        call_graph=(_torch.module_call(in_spec, out_spec),),
        example_inputs=(tuple(example_inputs), {}),
        mode="train" if train else "inference",
    )


def wants_gradients(example_inputs: list[Any]) -> bool:
    """Whether Dynamo's graph will be asked for gradients: they are on, and an input or a parameter requires one."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)


def _lift(module: fx.GraphModule) -> tuple[dict[str, Any], list[InputSpec]]:
    """Tensors that the graph reads as attributes become placeholders in front: name -> tensor, and their records."""
    constants: dict[str, Any] = {}
    specs: list[InputSpec] = []
    graph = module.graph
    first = next(iter(graph.nodes))
    placed: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        name = str(node.target)
        value = getattr(module, name, None)
        if not isinstance(value, torch.Tensor):
            continue  # the body of a higher-order op
        if name not in placed:
            with graph.inserting_before(first):
                placed[name] = graph.placeholder("c_" + name.strip("_"))
            placed[name].meta["val"] = _torch.fake_mode_of(graph).from_tensor(value.detach(), static_shapes=True)
            constants[name] = value.detach()
            specs.append(InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(placed[name].name), name))
        node.replace_all_uses_with(placed[name])
        graph.erase_node(node)
    module.recompile()
    return constants, specs


def _argument(value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return ConstantArgument(name="", value=value)
    fake = value.meta.get("val")
    return TensorArgument(value.name) if isinstance(fake, torch.Tensor) else _torch.symbolic_argument(value.name, fake)


def _views_of(value: Any, written: set[fx.Node]) -> bool:
    """Whether an output is made of a written value by views alone, at least one of them."""
    while isinstance(value, fx.Node) and value not in written:
        target = value.target
        views = isinstance(target, torch._ops.OpOverload) and any(
            a.alias_info is not None and not a.alias_info.is_write for a in target._schema.arguments
        )
        if not views:
            return False
        value = value.args[0]
        if value in written:
            return True
    return False
