"""The last step before Inductor: which vocabulary ops stay, to be filled by a template, and what becomes of the others.

    a, r = attention_with_class_row(q, k, v)         stays: a C++ template accepts it
    t, i = select_tokens(x, s, 138)             ->   compiled_attn_triton::select_tokens, where a Triton one accepts it
    t, i = select_tokens(x, s, 138)             ->   else its decomposition in ATen, with a note that says why

Inductor fills the ops that stay through the lowerings that `register` gives it, and sees into the Triton launches.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch, _torch_mends, targets
from compiled_attn.ir.errors import LowerError
from compiled_attn.ir.notes import Notes, user_line
from compiled_attn.ir.op import OPS, op_of
from compiled_attn.ir.program import PROVENANCE, Edit, Program
from compiled_attn.ir.targets import Target
from compiled_attn.ops.templates import registry
from compiled_attn.passes.pack_linear import apply_linear_choices
from compiled_attn.runtime import launch, weights
from compiled_attn.runtime.package_cache import source_digest

NAME = "lower"
_lock = threading.Lock()


def register() -> None:
    """Gives Inductor the lowerings of the C++ templates, and mends it. Again is free; any thread may call it."""
    with _lock:
        _torch_mends.mend()
        for name, lowering in registry.CPP_LOWERINGS.items():
            _torch.register_inductor_lowering(OPS[name].overload, lowering)


def lower(program: Program, target: Target, notes: Notes, *, strict: bool = False) -> Program:
    """The program that Inductor is given; the same object where every op stays.

    An op that no template accepts becomes its decomposition, with a miss in `notes`; with `strict`, a LowerError. The
    few ops of registry.PLAIN always become theirs.
    """
    replaced: list[tuple[fx.Node, Callable[..., Any]]] = []
    for node in program.graph.nodes:
        op = op_of(node.target) if node.op == "call_function" else None
        if op is None:
            continue
        if op.name in registry.PLAIN:
            notes.did(node, op.name, "decomposition", registry.PLAIN[op.name])
            replaced.append((node, op.decomposition))
            continue
        args, kwargs = values_of(node)
        template, misses = registry.choose(op.name, args, kwargs, target)
        for name, because in misses:
            notes.miss(node, name, because)
        if template is not None:
            notes.did(node, op.name, template.name)
            if template.device == "cuda":
                replaced.append((node, launch.stand_in(op.name, target)))
            continue
        replaced.append((node, op.decomposition))
        if strict:
            raise LowerError(
                f"no template serves {op.name}",
                where=user_line(node) or str(node.format_node()),
                facts="; ".join(f"not {name} because {because}" for name, because in misses),
                do="change what the sentence names, choose another target, or compile with strict=False",
            )
        notes.did(node, op.name, "decomposition")
    if replaced:
        edit = program.edit()
        for node, function in replaced:
            inline(edit, edit.node_of[node], function)
        if any(node.meta.get("unbacked_bindings") for node, _ in replaced):
            edit.propagate()  # a decomposition counts by a size of its own, which what follows must have too
        program = edit.finish(NAME)
    return apply_linear_choices(program, target) if target.kind == "cpu" else program


def inductor_config(target: Target, program: Program, *, weights_beside: bool = False) -> dict[str, Any]:
    """Inductor's options for a lowered program.

    Weights that the program owns are frozen in inference, so that oneDNN packs them. Threads are asked for when the
    code runs, not when it is built; where only one thread builds, Inductor is told of two, for it would leave out what
    keeps a scalar's update to one thread of the several that may run it later. A CPU target other than this machine's
    own sets what the compiler may use.

    weights_beside: the code asks for its weights when it is loaded (runtime/weights.py). They stay as they are in the
    program, where freezing would make its own of them, other ones in each of the programs that share them.
    """
    options: dict[str, Any] = dict(weights.OPTIONS) if weights_beside else {}
    if not weights_beside and program.mode == "inference" and (program.state or program.constants):
        options["freezing"] = True
    if target.kind == "cpu":
        options["cpp.dynamic_threads"] = True
        options["cpp.threads"] = max(2, torch.get_num_threads())
        options["aot_inductor.compile_wrapper_opt_level"] = "O0"  # it only calls kernels; optimising it costs seconds
        if targets.load("cpu").march != target.march:
            options.update(_torch.cpu_options(target.march, target.vector_bits))
    return options


def jit_config(target: Target, program: Program) -> dict[str, Any]:
    """`inductor_config` for code that torch keeps in its own caches: their key takes in this library's source too.

    It stands in a field that such code does not use otherwise; our headers reach torch as text it does not look at.
    """
    return inductor_config(target, program) | {"aot_inductor.metadata": {"compiled_attn": source_digest()}}


def values_of(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments with the fake values of the nodes among them."""
    return fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])


def inline(edit: Edit, node: fx.Node, function: Callable[..., Any]) -> None:
    """Puts the ATen graph of `function` in a node's place, its provenance on every new node."""
    (leaves, spec) = pytree.tree_flatten((node.args, node.kwargs))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]

    def on_nodes(*values: Any) -> Any:
        full = list(leaves)
        for i, value in zip(at, values, strict=True):
            full[i] = value
        args, kwargs = pytree.tree_unflatten(full, spec)
        return function(*args, **kwargs)

    traced = _torch.trace(on_nodes, tuple(leaves[i].meta["val"] for i in at), edit.program.fake_mode)
    table: dict[fx.Node, Any] = {}
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    table.update(zip(placeholders, (leaves[i] for i in at), strict=True))
    with edit.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                table[inner] = _copied(edit, inner, table, node)
            elif inner.op == "get_attr":
                table[inner] = edit.constant(f"{node.name}_{inner.target}", getattr(traced, inner.target))
    _take_place(edit, node, fx.node.map_arg(traced.graph.output_node().args[0], lambda n: table[n]))


def _copied(edit: Edit, inner: fx.Node, table: dict[fx.Node, Any], like: fx.Node) -> fx.Node:
    new = edit.graph.node_copy(inner, lambda n: table[n])
    new.meta = {key: like.meta[key] for key in PROVENANCE if key in like.meta}
    new.meta["val"] = inner.meta["val"]
    return new


def _take_place(edit: Edit, node: fx.Node, result: Any) -> None:
    if isinstance(result, fx.Node):
        edit.replace(node, result)
        return
    for user in list(node.users):
        if user.target is operator.getitem:
            edit.replace(user, result[user.args[1]])
