"""What every Program keeps: well-formed graph, shapes that its ops give, known ops, provenance, symbols left free."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import VerifyError
from compiled_attn.ir.notes import user_line
from compiled_attn.ir.op import NAMESPACE, op_of
from compiled_attn.ir.program import Program, fake_call
from compiled_attn.ir.text import type_text

# Namespaces of ops that may stand in a Program beside torch's operators on symbolic ints.
KNOWN = ("aten", NAMESPACE, "prims", "torchvision", "_operator", "math", "torch", "builtins", "mkldnn", "higher_order")


def verify(program: Program, before: Program | None = None, *, after: str = "capture") -> None:
    """Raises VerifyError where a rule is broken.

    before: the program that a pass (`after`) started from; then symbols that it left free must still be free, and
    every node must say where it comes from if all nodes of `before` did.
    """
    try:
        program.graph.lint()
    except Exception as error:
        raise VerifyError(f"the graph after {after} is malformed", facts=str(error), do="mend the pass") from error
    _signature(program, after)
    for node in program.graph.nodes:
        if node.op == "call_function":
            _known(node, after)
            _shape(program, node, after)
            if before is not None and "nn_module_stack" not in node.meta and not _is_symbol(node):
                raise VerifyError(
                    f"node {node.name} does not say where it comes from",
                    where=str(node.format_node()),
                    facts=f"made by {after} without provenance",
                    do="make it with Edit.call(..., like=node)",
                )
    if before is not None:
        _symbols(before, program, after)


def _signature(program: Program, after: str) -> None:
    names = [n.name for n in program.placeholders]
    listed = [s.arg.name for s in program.signature.input_specs]
    if names != listed:
        odd = next((a, b) for a, b in zip([*names, "nothing"], [*listed, "nothing"], strict=False) if a != b)
        raise VerifyError(
            f"the inputs after {after} are not those of the signature",
            facts=f"placeholder {odd[0]}, signature {odd[1]}",
            do="finish edits with Edit.finish",
        )


def _known(node: fx.Node, after: str) -> None:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace = target.namespace
        if namespace == NAMESPACE and op_of(target) is None:
            raise VerifyError(f"{target} is not in the vocabulary", where=user_line(node), do="define it in ops/")
        return  # an op that a user or another library registered has a fake rule, asked below
    if isinstance(target, torch._ops.HigherOrderOperator):
        return
    module = getattr(target, "__module__", "")
    if module.split(".")[0] not in KNOWN:
        raise VerifyError(
            f"{target} stands in the graph after {after}",
            where=user_line(node) or str(node.format_node()),
            facts="only ATen, vocabulary ops and arithmetic on sizes may",
            do="replace it by ops",
        )


def _shape(program: Program, node: fx.Node, after: str) -> None:
    if _has_fresh_symbols(node) or isinstance(node.target, torch._ops.HigherOrderOperator):
        return  # asking again would make new symbols
    try:
        with _torch.without_guards(program.shape_env):
            found = fake_call(program.fake_mode, node.target, node.args, node.kwargs)
    except Exception as error:
        raise VerifyError(
            f"node {node.name} after {after} can not be given a shape",
            where=user_line(node) or str(node.format_node()),
            facts=str(error).split("\n")[0],
            do="mend the pass that made it",
        ) from error
    for want, got in zip(pytree.tree_leaves(node.meta.get("val")), pytree.tree_leaves(found), strict=False):
        if type_text(want) != type_text(got) and not _equal(want, got):
            raise VerifyError(
                f"node {node.name} after {after} says one shape and its op gives another",
                where=user_line(node) or str(node.format_node()),
                facts=f"it says {type_text(want)}, the op gives {type_text(got)}",
                do="call Edit.propagate after shapes change",
            )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.dim() == b.dim()
        return same and all(_torch.statically_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))
    if isinstance(a, (int, torch.SymInt)) and isinstance(b, (int, torch.SymInt)):
        return _torch.statically_true(a == b)
    return type(a) is type(b)


def _has_fresh_symbols(node: fx.Node) -> bool:
    reads_data = node.target in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
    return reads_data or bool(node.meta.get("unbacked_bindings"))


def _is_symbol(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def _symbols(before: Program, program: Program, after: str) -> None:
    pinned = _torch.specialised(program.shape_env)
    after_by_name = {n.name: n for n in program.inputs}
    for old in before.inputs:
        new = after_by_name.get(old.name)
        if new is None or not isinstance(old.meta["val"], torch.Tensor):
            continue
        for i, (x, y) in enumerate(zip(old.meta["val"].shape, new.meta["val"].shape, strict=True)):
            declared, now = _torch.declared(x), _torch.expression(y)
            names = {str(s) for s in getattr(declared, "free_symbols", ())}
            if names and (isinstance(now, int) or names & pinned.keys()):
                value = now if isinstance(now, int) else pinned[next(iter(names & pinned.keys()))]
                raise VerifyError(
                    f"{after} fixed dimension {i} of input {old.name}, which was symbolic",
                    facts=f"{declared} before, {value} after",
                    do="never branch on a symbolic size in a pass",
                )
