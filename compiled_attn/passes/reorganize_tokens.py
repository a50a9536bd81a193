"""Keeps, behind some attention blocks, the patches that the class token attends to, and fuses the rest into one token.

    x1 = add(x, attention(q, k, v))                a, row = attention_with_class_row(q, k, v)
    y  = add(x1, mlp(norm(x1)))              ->    x1, kept = select_tokens(add(x, a), row[:, prefix:], K, fuse=True)
                                                   y  = add(x1, mlp(norm(x1)))         tokens are fewer from here on

"Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", Liang et al., ICLR 2022,
section 3, on any captured Vision Transformer: no class is swapped, no weight is new. The axis of the tokens is followed
through the rest of the graph (follow.py), and whatever is indexed by token, a relative bias, a mask, a rotary table,
positions, is gathered per picture; the fused token has bias 0, is never masked, and is not rotated.

Never does: change a program in which anything downstream can not be followed. A PassError then names the node.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes, place
from compiled_attn.ir.op import NAMESPACE
from compiled_attn.ir.program import Program
from compiled_attn.passes.follow import END, Follow, Lost, Stage, tokens_in
from compiled_attn.passes.token_scores import Cursor, attention_score, token_norms
from compiled_attn.passes.token_stages import check_dense, check_score, checked_trunk, refusal, with_outputs
from compiled_attn.passes.trunk import Block, depends, find_trunk, sources_of, user_inputs

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten


@dataclass(frozen=True)
class ReorganizeTokens:
    """Token reorganization in the blocks `at` (counted from 0 along the trunk's self-attention blocks).

    keep_rate: share of the patches that each stage keeps, in (0, 1]; a tuple gives one per stage. Of n patches
        ceil(keep_rate * n) stay: in Python's floats where n is fixed, as the paper's code has it, and exactly, by
        integers, where n is symbolic. Where all stay, nothing happens.
    fuse: the patches that go are summed, weighted by their scores, into one token, which is an ordinary token later on.
    score: how patches are ranked; s sums to at most 1 over the patches.
        "class": mean over heads of the softmax attention of row 0, the class token, to each patch (the paper).
        "mean-query": the same for the mean over all tokens of the queries (and of the bias' rows), softmax(scale *
            mean_i(q_i) . k_j): for models with no class token, costs H N D.
        "key-norm": mean over heads of |k_j|, over the sum of all patches.  "token-norm": |x_j| behind the attention,
            over the sum of all patches.
    prefix: tokens in front that are never dropped; None finds them: those that do not depend on the picture.
    """

    keep_rate: float | tuple[float, ...] = 0.7
    at: tuple[int, ...] = (3, 6, 9)
    fuse: bool = True
    score: str = "class"
    prefix: int | None = None

    name: ClassVar[str] = "reorganize-tokens"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", tuple(self.at))
        if not isinstance(self.keep_rate, (int, float)):
            object.__setattr__(self, "keep_rate", tuple(self.keep_rate))
        if not all(0 < r <= 1 for r in self.rates):
            raise PassError(
                f"keep_rate {self.keep_rate} is no share",
                facts="the share of patches that stay is above 0 and at most 1",
                do="choose for example 0.7",
            )
        if len(self.rates) != len(self.at) or list(self.at) != sorted(set(self.at)) or min(self.at, default=0) < 0:
            raise PassError(
                f"at={self.at} does not fit keep_rate={self.keep_rate}",
                facts="blocks are counted from 0, in rising order, with one rate for all or one for each",
                do="for example at=(3, 6, 9), keep_rate=(0.7, 0.7, 0.5)",
            )
        check_score(self.score)

    @property
    def rates(self) -> tuple[float, ...]:
        rate = self.keep_rate
        return rate if isinstance(rate, tuple) else (float(rate),) * len(self.at)

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        edit = program.edit()
        check_dense(self, edit)
        trunk = checked_trunk(self, find_trunk(program, edit.graph, edit, self.prefix))
        first = trunk.blocks[0].before
        data = depends(edit.graph, user_inputs(program, edit.graph) & (sources_of(first) | {first}))
        follow = Follow(edit, data)
        follow.seed(first, trunk.blocks[0].axis, trunk.tokens)
        rates = dict(zip([trunk.blocks[i].attention for i in self.at], self.rates, strict=True))
        ends = {b.after: b for b in trunk.blocks if b.attention in rates}
        scores: dict[fx.Node, fx.Node | None] = {}
        started = False
        try:
            for node in list(edit.graph.nodes):
                started = started or node is first
                if not started:
                    continue
                follow.visit(node)
                if node in rates and self._keeps_fewer(follow, node, rates[node], notes):
                    scores[node] = attention_score(follow, node, self.score)
                block = ends.get(node)
                if block is not None and block.attention in scores:
                    self._select(follow, block, scores[block.attention], rates[block.attention], notes)
        except Lost as lost:
            notes.miss(lost.node, self.name, lost.because)
            raise refusal(self, lost) from lost
        return edit.finish(self.name) if follow.stages else program

    def _keeps_fewer(self, follow: Follow, attention: fx.Node, rate: float, notes: Notes) -> bool:
        """Whether a stage drops anything; where the number of patches is fixed and all stay, it is a miss."""
        keys = follow.of(attention.args[1])
        if keys is None or tokens_in(keys[-2]) is None:
            raise Lost(attention, "its keys are not the tokens")
        patches = follow.patches(keys[-2])
        if rate == 1 or (isinstance(patches, int) and kept(patches, rate) == patches):
            notes.miss(attention, self.name, f"keep_rate {rate} keeps all {patches} patches")
            return False
        return True

    def _select(self, follow: Follow, block: Block, score: fx.Node | None, rate: float, notes: Notes) -> None:
        """Inserts select_tokens behind `block.after` and hands every later reader the tokens that are left."""
        old = block.after
        tags = follow.of(old)
        axis = tokens_in(tags[block.axis]) if tags is not None else None
        if tags is None or axis is None:
            raise Lost(old, "the tokens behind the attention are not those in front of it")
        readers = list(old.users)
        here = Cursor(follow.edit, old)
        x = here(aten.transpose.int, old, 0, 1) if block.axis == 0 else old
        whole = x
        if axis.after:
            x = here(aten.slice.Tensor, x, 1, 0, -axis.after)
        if score is None:
            score = token_norms(here, whole, axis)
        patches = follow.patches(tags[block.axis])
        count: Any = patches if isinstance(patches, int) else here(operator.add, here.size(x, 1), -axis.before)
        keep: Any = kept(patches, rate) if isinstance(patches, int) else kept_nodes(here, count, rate)
        if self.fuse and isinstance(keep, fx.Node):
            why = f"{self.name}: keep_rate {rate} keeps every patch of so small a picture, and then nothing is fused"
            here(aten._assert_scalar.default, here(operator.lt, keep, count), why)
        op = getattr(torch.ops, NAMESPACE).select_tokens.default
        chosen = here(op, x, score, keep, prefix=axis.before, fuse=self.fuse)
        tokens = here(operator.getitem, chosen, 0)
        index = here(operator.getitem, chosen, 1)
        stages = follow.stages
        number = stages[0].count if stages else count
        positions = compose(here, stages[-1].positions if stages else None, index, number if self.fuse else None)
        total = here.size(tokens, 1)
        stream = tokens
        if axis.after:
            stream = here(aten.cat.default, [tokens, here(aten.slice.Tensor, whole, 1, -axis.after, END)], 1)
        if block.axis == 0:
            stream = here(aten.transpose.int, stream, 0, 1)
        stage = Stage(tokens, positions, self.fuse, axis.before, total, number, here.node)
        follow.begin_stage(stage, old, stream)
        for reader in readers:
            reader.replace_input_with(old, stream)
        left = _torch.expression(index.meta["val"].shape[1]) + int(self.fuse)
        notes.did(block.attention, self.name, f"{patches} -> {left} tokens", f"approximate, keep_rate {rate}")


def kept(patches: int, rate: float) -> int:
    """How many of a fixed number of patches stay, as the paper's code computes it."""
    return math.ceil(rate * patches)


def kept_nodes(here: Cursor, patches: fx.Node, rate: float) -> fx.Node:
    """How many of a symbolic number of patches stay: the ceiling of the exact product, by integers."""
    share = Fraction(str(rate))
    product = here(operator.mul, patches, share.numerator)
    return here(operator.floordiv, here(operator.add, product, share.denominator - 1), share.denominator)


def compose(here: Cursor, before: fx.Node | None, index: fx.Node, fused: int | fx.Node | None) -> fx.Node:
    """Original patch numbers [B, K(+1)] of the tokens that `index` chose among those at `before`.

    fused: the number of patches, which stands for the fused token; None where none is made.
    """
    value = index if before is None else here(aten.gather.default, before, 1, index)
    if fused is None:
        return value
    options = {"dtype": torch.int64, "device": index.meta["val"].device}
    last = here(aten.full.default, [here.size(index, 0), 1], fused, **options)
    return here(aten.cat.default, [value, last], 1)


def with_kept_patches(program: Program) -> Program:
    """The program with a second output: `(out, [kept patches of each stage])`.

    Kept patches are int64 [B, K], the numbers of the patches in the picture (row-major), ascending per picture; a fused
    token that a later stage keeps has the number of patches, n. Raises PassError where no tokens are reorganized.
    """
    edit = program.edit()
    op = getattr(torch.ops, NAMESPACE).select_tokens.default
    found = [n for n in edit.graph.nodes if n.op == "call_function" and n.target is op]
    if not found:
        raise PassError(
            "this program keeps every patch",
            facts="kept patches are those of select_tokens, and there is none in it",
            do="run ReorganizeTokens before",
        )
    positions: fx.Node | None = None
    count: int | fx.Node | None = None
    outputs = []
    for i, node in enumerate(found):
        if i and found[i - 1] not in sources_of(node):
            raise PassError(
                "the reorganizations of this program do not follow each other",
                where=f"{place(found[i - 1])}, {place(node)}",
                facts="the second does not depend on the first",
                do="ask for the kept patches of one stream of tokens",
            )
        here = Cursor(edit, node)
        index = here(operator.getitem, node, 1)
        count = here.size(node.args[1], 1) if count is None else count
        fused = bool(node.kwargs.get("fuse", False))
        positions = compose(here, positions, index, count if fused else None)
        own = here(aten.slice.Tensor, positions, 1, 0, -1) if fused else positions
        outputs.append(here(operator.getitem, here(aten.sort.default, own, 1), 0))
    return with_outputs(program, edit, outputs)
