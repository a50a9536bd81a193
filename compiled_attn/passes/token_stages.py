"""What the passes that leave out tokens behind some blocks share: checks of the trunk, and their words."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import fx
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import place, user_line
from compiled_attn.ir.op import NAMESPACE
from compiled_attn.ir.program import Edit, Program
from compiled_attn.passes.follow import Lost
from compiled_attn.passes.token_scores import SCORES
from compiled_attn.passes.trunk import Trunk


class Staged(Protocol):
    """A pass with stages behind the blocks `at`, which ranks patches by `score`."""

    @property
    def name(self) -> str: ...

    @property
    def at(self) -> tuple[int, ...]: ...

    @property
    def score(self) -> str: ...


def check_score(score: str) -> None:
    if score not in SCORES:
        raise PassError(f"unknown score {score!r}", facts=f"scores are {', '.join(SCORES)}", do="choose one of them")


def check_dense(item: Staged, edit: Edit) -> None:
    """Raises PassError where tokens were left out by a pass before."""
    ops = getattr(torch.ops, NAMESPACE)
    already = (ops.select_tokens.default, ops.pack_tokens.default)
    found = next((n for n in edit.graph.nodes if n.op == "call_function" and n.target in already), None)
    if found is not None:
        raise PassError(
            f"{item.name} meets a program whose tokens are reorganized already",
            where=place(found),
            facts="stages are counted along one dense trunk",
            do="give all stages to one pass: at=(3, 6, 9)",
        )


def checked_trunk(item: Staged, trunk: Trunk | None) -> Trunk:
    """The trunk, where it has the blocks and the class token that the pass asks for. Raises PassError."""
    if trunk is None:
        raise PassError(
            f"{item.name} finds no self-attention over tokens [B, N, C] in this program",
            facts="it looks for scaled_dot_product_attention whose queries, keys and values are made of one "
            "residual stream of tokens; windows, maps of rows and columns, and attention not raised are none",
            do="run raise-attention before, and read its misses",
        )
    count = len(trunk.blocks)
    if max(item.at, default=-1) >= count:
        raise PassError(
            f"{item.name} has no block {max(item.at)}",
            where=place(trunk.blocks[-1].attention),
            facts=f"at={item.at}, and the program has {count} self-attention blocks, counted from 0",
            do=f"choose blocks below {count}",
        )
    if item.score == "class" and trunk.tokens.before == 0:
        raise PassError(
            f"{item.name} finds no class token",
            where=place(trunk.blocks[0].before),
            facts='score="class" ranks patches by the attention of the first token, and every token in front '
            "depends on the picture",
            do='choose score="mean-query", "key-norm" or "token-norm", or say how many tokens stand in front (prefix=)',
        )
    return trunk


def refusal(item: Staged, lost: Lost) -> PassError:
    """The error of a pass that can not follow the tokens."""
    node = lost.node
    return PassError(
        f"{item.name} can not follow the tokens through {place(node)}",
        where="; ".join(p for p in (user_line(node), str(node.format_node())) if p),
        facts=lost.because,
        do="leave out tokens only behind the blocks whose tokens are read elsewhere (at=), or leave the pass out",
    )


def with_outputs(program: Program, edit: Edit, extra: list[fx.Node]) -> Program:
    """The draft's program with a list of tensors as a second output."""
    output = next(n for n in edit.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], *extra),)
    arguments = [TensorArgument(n.name) for n in extra]
    specs = [OutputSpec(OutputKind.USER_OUTPUT, a, None) for a in arguments]
    entry = program.call_graph[0]
    inner = pytree.tree_unflatten([0] * program.out_spec.num_leaves, program.out_spec)
    signature = replace(
        entry.signature,
        outputs=[*entry.signature.outputs, *arguments],
        out_spec=pytree.tree_structure((inner, [0] * len(extra))),
    )
    edit.program = replace(
        program,
        signature=replace(program.signature, output_specs=[*program.signature.output_specs, *specs]),
        call_graph=(replace(entry, signature=signature), *program.call_graph[1:]),
    )
    return edit.finish("kept-tokens")
