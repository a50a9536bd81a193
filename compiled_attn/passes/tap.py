"""Makes values inside a program outputs of it: what modules give and take, and attention probabilities.

    v1 = linear(x, head.weight)  # head               v1 = linear(x, head.weight)  # head
    return (v1,)                                ->    return ((v1,), {"head": v1})

Modules are found by the path that every node carries. Never changes a value of the program; a module that computes
nothing in this program (Identity, a dropout that is off) has no value to tap and is an error that says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx
from torch.export.graph_signature import ExportGraphSignature, OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
Values = Mapping[str, Sequence[fx.Node]]


def module_calls(node: fx.Node) -> list[tuple[str, str]]:
    """(key of the call, path of the module) of every module that a node was made in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, entry[0]) for key, entry in stack.items() if isinstance(entry, tuple) and entry[0]]


def outputs_of(program: Program) -> dict[str, list[fx.Node]]:
    """Module path -> the tensors computed in it that are read outside of it, in the graph's order."""
    found: dict[str, list[fx.Node]] = {}
    for node in _tensors(program):
        for key, path in module_calls(node):
            if any(key not in dict(module_calls(user)) for user in node.users):
                found.setdefault(path, []).append(node)
    return found


def inputs_of(program: Program) -> dict[str, list[fx.Node]]:
    """Module path -> the tensors computed outside of it, or inputs of the user, that it reads, in the graph's order."""
    given = set(program.inputs)
    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node not in given and not _is_tensor(node):
            continue
        inside = dict(module_calls(node))
        for key, path in dict.fromkeys(c for user in node.users for c in module_calls(user)):
            if key not in inside and node not in found.setdefault(path, []):
                found[path].append(node)
    return found


@dataclass(frozen=True)
class TapModules:
    """Outputs (`layer4`) and inputs (`layer4:input`) of modules become outputs of the program."""

    taps: tuple[str, ...]
    name: ClassVar[str] = "tap-modules"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        if not self.taps:
            return program
        tables = {"output": outputs_of(program), "input": inputs_of(program)}
        chosen: dict[str, list[fx.Node]] = {}
        for tap in self.taps:
            path, what = split(tap)
            for found in matching(path, tables[what], tap):
                chosen[found if what == "output" else f"{found}:input"] = tables[what][found]
        for name in chosen:
            notes.did(name, self.name, "an output of the program")
        return with_taps(program, {k: len(v) for k, v in chosen.items()}, lambda e: _same(e, chosen), self.name)


@dataclass(frozen=True)
class TapProbabilities:
    """Softmax probabilities [B, H, N, M] of attention, computed beside the fused op where attention was raised."""

    taps: tuple[str, ...]
    name: ClassVar[str] = "tap-probabilities"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        table: dict[str, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and (is_attention(node) or node.target in SOFTMAX):
                for _, path in module_calls(node):
                    table.setdefault(path, []).append(node)
        for path, nodes in table.items():
            fused = [n for n in nodes if is_attention(n)]
            table[path] = fused or nodes
        chosen: dict[str, list[fx.Node]] = {}
        for tap in self.taps:
            for found in matching(split(tap)[0], table, tap):
                chosen[f"{found}:probabilities"] = table[found]
                raised = is_attention(table[found][0])
                notes.did(
                    found, self.name, "computed beside the fused attention" if raised else "a softmax of the model"
                )

        def make(edit: Edit) -> dict[str, list[fx.Node]]:
            return {k: [probabilities(edit, edit.node_of[n]) for n in nodes] for k, nodes in chosen.items()}

        return with_taps(program, {k: len(v) for k, v in chosen.items()}, make, self.name)


def split(tap: str) -> tuple[str, str]:
    """(pattern of the path, what to take there). Raises PassError for an unknown kind."""
    path, _, what = tap.partition(":")
    if what not in ("", "input", "output", "probabilities") or not path:
        raise PassError(
            f"{tap!r} is not a tap",
            where="taps",
            facts=f"after the colon stands {what!r}; known are input, output and probabilities",
            do="write 'path', 'path:input' or 'path:probabilities'",
        )
    return path, what or "output"


def matching(pattern: str, table: Mapping[str, Any], tap: str) -> list[str]:
    """The paths that a pattern matches. Raises PassError where there are none, with those that come close."""
    found = [path for path in table if fnmatchcase(path, pattern)]
    if found:
        return found
    close = difflib.get_close_matches(pattern, table, n=4, cutoff=0.5) or list(table)[:6]
    raise PassError(
        f"no module for the tap {tap!r}",
        where=f"taps, {tap!r}",
        facts=f"it matches none of the {len(table)} paths that compute something; close: {', '.join(close) or 'none'}",
        do="use one of these, or a wildcard such as 'blocks.*'; a module that computes nothing can not be tapped",
    )


def pair(program: Program) -> Program:
    """The program with `(out, {})` as its result, for `with_taps` to fill."""
    return _respecified(program, pytree.treespec_tuple([program.out_spec, pytree.tree_structure({})]), 0)


def with_taps(program: Program, counts: Mapping[str, int], make: Callable[[Edit], Values], name: str) -> Program:
    """The program, whose result is `(out, taps)`, with more taps: a tensor each, or a tuple where `counts` says so.

    make: the nodes of the edit behind each name.
    """
    out_spec, old = program.out_spec.children()
    template = pytree.tree_unflatten([0] * old.num_leaves, old)
    for key, count in counts.items():
        template[key] = 0 if count == 1 else (0,) * count
    taps_spec = pytree.tree_structure(template)
    total = sum(counts.values())
    edit = _respecified(program, pytree.treespec_tuple([out_spec, taps_spec]), total).edit()
    output = next(n for n in edit.graph.nodes if n.op == "output")
    with edit.graph.inserting_before(output):
        values = make(edit)
        present = list(output.args[0])
        for key in counts:
            for node in values[key]:
                again = node in present or node.op == "placeholder"
                present.append(edit.call(aten.clone.default, (node,), like=_source(node)) if again else node)
    output.args = (tuple(present),)
    return edit.finish(name)


def is_attention(node: fx.Node) -> bool:
    """Whether a node is attention as one op: torch's, or one of the vocabulary's."""
    name = getattr(node.target, "_schema", None)
    return name is not None and name.name in (
        "aten::scaled_dot_product_attention",
        "compiled_attn::attention",
        "compiled_attn::attention_with_class_row",
    )


def probabilities(edit: Edit, node: fx.Node) -> fx.Node:
    """softmax(q k^T * scale, capped, + bias) of an attention node, [B, H, N, M]; of a softmax, itself."""
    if node.target in SOFTMAX:
        return node
    given = _arguments(node)
    q, k, bias = given["q"], given["k"], given["bias"]

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return edit.call(target, args, kwargs, like=node)

    if given["groups"]:
        heads = q.meta["val"].shape[-3] // k.meta["val"].shape[-3]
        k = call(aten.repeat_interleave.self_int, k, heads, -3)
    scores = call(aten.matmul.default, q, call(aten.transpose.int, k, -2, -1))
    scores = call(aten.mul.Tensor, scores, given["scale"])
    if given["softcap"]:
        scores = call(aten.tanh.default, call(aten.div.Tensor, scores, given["softcap"]))
        scores = call(aten.mul.Tensor, scores, given["softcap"])
    if isinstance(bias, fx.Node) and bias.meta["val"].dtype == torch.bool:
        scores = call(aten.masked_fill.Scalar, scores, call(aten.logical_not.default, bias), float("-inf"))
    elif isinstance(bias, fx.Node):
        scores = call(aten.add.Tensor, scores, bias)
    if given["causal"]:
        seen = call(aten.tril.default, call(aten.ones_like.default, scores, dtype=torch.bool))
        scores = call(aten.masked_fill.Scalar, scores, call(aten.logical_not.default, seen), float("-inf"))
    return call(aten.softmax.int, scores, -1)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """q, k, bias, scale, causal, softcap and groups (fewer key heads than query heads) of an attention node."""
    target: Any = node.target
    schema = target._schema
    names = [a.name for a in schema.arguments]
    given: dict[str, Any] = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k = given[names[0]], given[names[1]]
    scale = given.get("scale")
    if scale is None:
        scale = float(int(q.meta["val"].shape[-1])) ** -0.5
    bias = given.get("attn_mask", given.get("bias"))
    causal = given.get("is_causal", given.get("causal", False))
    found = {"q": q, "k": k, "bias": bias, "scale": scale, "causal": causal}
    return {**found, "softcap": given.get("softcap", 0.0), "groups": given.get("enable_gqa", False)}


def _respecified(program: Program, out_spec: Any, more: int) -> Program:
    """The program with another structure of its result and room for `more` outputs, not yet in the graph."""
    signature = program.signature
    extra = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(""), None) for _ in range(more)]
    whole = program.call_graph[0]
    return replace(
        program,
        signature=ExportGraphSignature(list(signature.input_specs), [*signature.output_specs, *extra]),
        call_graph=(_torch.module_call_like(whole, out_spec), *program.call_graph[1:]),
    )


def _same(edit: Edit, chosen: Values) -> dict[str, list[fx.Node]]:
    """The chosen nodes in the edit, so that gradients reach them; a copy where a later op writes into one."""
    found = {k: [edit.node_of[n] for n in nodes] for k, nodes in chosen.items()}
    for nodes in found.values():
        for i, node in enumerate(nodes):
            if _is_written(node):
                with edit.graph.inserting_after(node):
                    nodes[i] = edit.call(aten.clone.default, (node,), like=_source(node))
    return found


def _is_written(node: fx.Node) -> bool:
    """Whether an op of the training form writes into a node's memory, by itself or by a view of it."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        for argument, value in zip(schema.arguments if schema is not None else (), user.args, strict=False):
            alias = argument.alias_info if value is node else None
            if alias is not None and (alias.is_write or _is_written(user)):
                return True
    return False


def _source(node: fx.Node) -> fx.Node:
    return next(iter(node.users)) if node.op == "placeholder" else node


def _tensors(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if _is_tensor(n)]


def _is_tensor(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
