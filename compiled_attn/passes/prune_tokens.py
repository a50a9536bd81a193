"""Keeps, behind some attention blocks, as many patches of each picture as its own scores ask for; the others go.

    x1 = add(x, attention(q, k, v))                a, row = attention_with_class_row(q, k, v);  x1 = add(x, a)
    y  = add(x1, mlp(norm(x1)))              ->    t, place, begins = pack_tokens(x1, keep(row));  x2 = t[None]
    z  = add(y, attention(q2, k2, v2))             y = add(x2, mlp(norm(x2)));  z = add(y, ragged_attention(q2, ...))

Pictures keep different numbers of tokens, so from the first stage on the tokens of all pictures lie packed, one
data-dependent size T for the batch, from B * (prefix + keep_at_least) to B * N: norms and linear maps run on T rows,
attention within each picture. At the end the class token is picked, tokens are averaged, or put back to their places
with zeros where one was left out (follow_packed.py). Batches of pictures that keep other numbers need no new capture.

Never does: change a program in which anything downstream can not be followed. A PassError then names the node.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.op import NAMESPACE
from compiled_attn.ir.program import Program
from compiled_attn.passes.follow import END, Lost, tokens_in
from compiled_attn.passes.follow_packed import FollowPacked, Packed
from compiled_attn.passes.packed_scores import packed_norms, packed_score
from compiled_attn.passes.token_scores import Cursor, attention_score, token_norms
from compiled_attn.passes.token_stages import check_dense, check_score, checked_trunk, refusal, with_outputs
from compiled_attn.passes.trunk import Block, depends, find_trunk, sources_of, user_inputs

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten


@dataclass(frozen=True)
class PruneTokens:
    """Token pruning in the blocks `at` (counted from 0 along the trunk's self-attention blocks).

    threshold: patches whose score is at least this stay; scores of a picture sum to at most 1 over its patches.
    mass: instead, the fewest patches stay whose scores, the greatest first, sum to this share of the picture's.
        A tuple gives one value for each stage. Equal scores: the patch further in front stays.
    keep_at_least, keep_at_most: bounds on the patches that a picture keeps at every stage, by their rank.
    score, prefix: as for ReorganizeTokens. Scores of later stages are those among the tokens that are left.
    """

    threshold: float | tuple[float, ...] | None = None
    mass: float | tuple[float, ...] | None = None
    at: tuple[int, ...] = (3, 6, 9)
    keep_at_least: int = 1
    keep_at_most: int | None = None
    score: str = "class"
    prefix: int | None = None

    name: ClassVar[str] = "prune-tokens"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", tuple(self.at))
        for option in ("threshold", "mass"):
            if isinstance(getattr(self, option), (list, tuple)):
                object.__setattr__(self, option, tuple(getattr(self, option)))
        if (self.threshold is None) == (self.mass is None):
            raise PassError(
                "prune-tokens takes a threshold or a mass",
                facts=f"threshold={self.threshold}, mass={self.mass}",
                do="give one of the two, for example mass=0.9",
            )
        if not all(0 <= v <= 1 for v in self.limits):
            raise PassError(
                f"{self.kind} {self.limits} is no share",
                facts="scores of a picture sum to at most 1, so that a threshold or a mass is from 0 to 1",
                do="choose for example threshold=0.003 or mass=0.9",
            )
        if len(self.limits) != len(self.at) or list(self.at) != sorted(set(self.at)) or min(self.at, default=0) < 0:
            raise PassError(
                f"at={self.at} does not fit {self.kind}={self.limits}",
                facts="blocks are counted from 0, in rising order, with one value for all or one for each",
                do="for example at=(3, 6, 9), mass=(0.95, 0.9, 0.9)",
            )
        if self.keep_at_least < 1 or (self.keep_at_most is not None and self.keep_at_most < self.keep_at_least):
            raise PassError(
                f"no number of patches is at least {self.keep_at_least} and at most {self.keep_at_most}",
                facts="a picture keeps one patch or more",
                do="choose 1 <= keep_at_least <= keep_at_most",
            )
        check_score(self.score)

    @property
    def kind(self) -> str:
        return "mass" if self.threshold is None else "threshold"

    @property
    def limits(self) -> tuple[float, ...]:
        value = self.mass if self.threshold is None else self.threshold
        return value if isinstance(value, tuple) else (float(value or 0.0),) * len(self.at)

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        edit = program.edit()
        check_dense(self, edit)
        trunk = checked_trunk(self, find_trunk(program, edit.graph, edit, self.prefix))
        first = trunk.blocks[0].before
        data = depends(edit.graph, user_inputs(program, edit.graph) & (sources_of(first) | {first}))
        follow = FollowPacked(edit, data)
        follow.seed(first, trunk.blocks[0].axis, trunk.tokens)
        stages = {trunk.blocks[i].attention: (trunk.blocks[i], v) for i, v in zip(self.at, self.limits, strict=True)}
        ends = {block.after: (block, value) for block, value in stages.values()}
        scores: dict[fx.Node, fx.Node | None] = {}
        started = False
        try:
            for node in list(edit.graph.nodes):
                started = started or node is first
                if not started:
                    continue
                if node in stages and follow.stages:
                    scores[stages[node][0].after] = packed_score(follow, node, self.score)
                follow.visit(node)
                if node in stages and not follow.stages:
                    scores[stages[node][0].after] = attention_score(follow, node, self.score)
                if node in ends:
                    self._prune(follow, ends[node][0], scores[node], ends[node][1], notes)
            follow.unpack_outputs()
        except Lost as lost:
            notes.miss(lost.node, self.name, lost.because)
            raise refusal(self, lost) from lost
        return edit.finish(self.name) if follow.stages else program

    def _prune(self, follow: FollowPacked, block: Block, score: fx.Node | None, limit: float, notes: Notes) -> None:
        """Inserts pack_tokens behind `block.after` and hands every later reader the tokens that are left."""
        old = block.after
        tags = follow.of(old)
        tokens = tokens_in(tags[block.axis]) if tags is not None else None
        if tags is None or tokens is None or block.axis != 1:
            raise Lost(old, "the tokens behind the attention are not those in front of it, or not [B, N, C]")
        readers = list(old.users)
        here = Cursor(follow.edit, old)
        before = follow.stages[-1] if follow.stages else None
        if score is None:
            score = packed_norms(follow, here, old) if before else token_norms(here, old, tokens)
        last = before if isinstance(before, Packed) else None
        keep = self._keep(here, score, last, tokens.before, tokens.after, limit)  # [B, N]
        if last is None:
            packed = here(_op("pack_tokens"), old, keep)
            place, begins, rows = here(operator.getitem, packed, 1), here(operator.getitem, packed, 2), None
            full = here.size(old, 1)
        else:
            flat = here(aten.index_select.default, here(aten.reshape.default, keep, [-1]), 0, last.place)
            packed = here(_op("pack_tokens"), old, here(aten.unsqueeze.default, flat, 0))
            rows = here(operator.getitem, packed, 1)
            place = here(aten.index_select.default, last.place, 0, rows)
            counts = here(aten.cumsum.default, here(aten.sum.dim_IntList, keep, [1]), 0)
            kinds = {"dtype": torch.int64, "device": counts.meta["val"].device}
            begins = here(aten.cat.default, [here(aten.zeros.default, [1], **kinds), counts])
            full = last.full
        stream = here(aten.unsqueeze.default, here(operator.getitem, packed, 0), 0)
        longest: Any = full
        if self.keep_at_most is not None:
            bound = tokens.before + self.keep_at_most + tokens.after
            longest = min(bound, full) if isinstance(full, int) else bound
        stage = Packed(
            tokens=stream,
            positions=here(aten.remainder.Scalar if isinstance(full, int) else aten.remainder.Tensor, place, full),
            fused=False,
            prefix=tokens.before,
            total=here.size(stream, 1),
            count=full,
            anchor=here.node,
            place=place,
            begins=begins,
            kept=keep,
            rows=rows,
            full=full,
            after=tokens.after,
            longest=longest,
        )
        follow.begin_packed(stage, old, stream)
        for reader in readers:
            reader.replace_input_with(old, stream)
        most = "all" if self.keep_at_most is None else self.keep_at_most
        what = f"each picture keeps {self.keep_at_least} to {most} patches"
        notes.did(block.attention, self.name, what, f"approximate, {self.kind} {limit:g}")

    def _keep(
        self, here: Cursor, score: fx.Node, last: Packed | None, front: int, behind: int, limit: float
    ) -> fx.Node:
        """Which tokens stay, [B, N]: the fixed ones, and by `score` [B, n] among the patches that are left."""
        present = None
        score = here(aten.nan_to_num.default, score, -1.0)
        if last is not None:
            present = here(aten.slice.Tensor, last.kept, 1, front, -behind if behind else END)
            gone = here(aten.logical_not.default, present)
            score = here(aten.masked_fill.Scalar, score, gone, -2.0)
        ahead = _ahead(here, score)  # [B, n, n]: whether j goes before i
        rank = here(aten.sum.dim_IntList, ahead, [2])
        if self.threshold is not None:
            keep = here(aten.ge.Scalar, score, limit)
        else:
            each = here(aten.clamp_min.default, score, 0.0)
            other = here(aten.unsqueeze.default, each, 1)
            none = here(aten.scalar_tensor.default, 0.0, dtype=torch.float32, device=score.meta["val"].device)
            above = here(aten.sum.dim_IntList, here(aten.where.self, ahead, other, none), [2])
            wanted = here(aten.mul.Tensor, here(aten.sum.dim_IntList, each, [1], True), limit)
            keep = here(aten.lt.Tensor, above, wanted)
        keep = here(aten.logical_or.default, keep, here(aten.lt.Scalar, rank, self.keep_at_least))
        if self.keep_at_most is not None:
            keep = here(aten.logical_and.default, keep, here(aten.lt.Scalar, rank, self.keep_at_most))
        if present is not None:
            keep = here(aten.logical_and.default, keep, present)
        kinds = {"dtype": torch.bool, "device": keep.meta["val"].device}
        fixed = [
            here(aten.full.default, [here.size(keep, 0), n], True, **kinds) if n else None for n in (front, behind)
        ]
        return here(aten.cat.default, [part for part in (fixed[0], keep, fixed[1]) if part is not None], 1)


def _ahead(here: Cursor, score: fx.Node) -> fx.Node:
    """[B, n, n]: whether patch j goes before patch i: a greater score, or an equal one further in front."""
    mine, other = here(aten.unsqueeze.default, score, 2), here(aten.unsqueeze.default, score, 1)
    place = here(aten.arange.default, here.size(score, 1), device=score.meta["val"].device)
    column = here(aten.unsqueeze.default, place, 1)
    earlier = here(aten.lt.Tensor, here(aten.unsqueeze.default, place, 0), column)
    tie = here(aten.logical_and.default, here(aten.eq.Tensor, other, mine), earlier)
    return here(aten.logical_or.default, here(aten.gt.Tensor, other, mine), tie)


def _op(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def with_kept_masks(program: Program) -> Program:
    """The program with a second output: `(out, [which tokens stay at each stage])`, each bool [B, N].

    Raises PassError where no tokens are pruned.
    """
    edit = program.edit()
    found = [n for n in edit.graph.nodes if n.op == "call_function" and n.target is _op("pack_tokens")]
    if not found:
        raise PassError(
            "this program keeps every token",
            facts="kept tokens are those of pack_tokens, and there is none in it",
            do="run PruneTokens before",
        )
    source: Any = found[0].args[0]
    place: fx.Node | None = None
    outputs = []
    for node in found:
        here = Cursor(edit, node)
        rows = here(operator.getitem, node, 1)
        place = rows if place is None else here(aten.index_select.default, place, 0, rows)
        kinds = {"dtype": torch.bool, "device": place.meta["val"].device}
        batch, count = here.size(source, 0), here.size(source, 1)
        total = count * batch if isinstance(batch, int) and isinstance(count, int) else here(operator.mul, batch, count)
        blank = here(aten.full.default, [total], False, **kinds)
        mark = here(aten.index_fill.int_Scalar, blank, 0, place, 1)
        outputs.append(here(aten.reshape.default, mark, [-1, count]))
    return with_outputs(program, edit, outputs)
