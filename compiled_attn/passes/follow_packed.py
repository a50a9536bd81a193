"""Follows tokens whose number per picture depends on the data: from the first stage on they lie packed, [1, T, C].

    x  [B, N, C]                        tokens, place, begins = pack_tokens(x, keep);  x [1, T, C]
    linear, norms, MLP, reshapes   ->   as they are, with 1 for the pictures and T for the tokens
    scaled_dot_product_attention   ->   ragged_attention within each picture; with a bias or mask, by place
    x[:, 0], x[:, 1:], x.mean(1)   ->   rows picked, rows left out, sums on a canvas [B, N, C], all by `begins`
    a table [N, ...] by position   ->   index_select by the positions that are left
    an output [B, N, C]            ->   unpack_tokens onto zeros

One batch of T rows stands for the B pictures, so that the rules of follow_rules.py hold for all that works token by
token. An op that mixes tokens in another way raises `Lost`. Attention with a bias or mask: packed_pairs.py.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.op import NAMESPACE
from compiled_attn.passes.follow import END, Follow, Lost, Part, Size, Stage, Tags, Tokens, plain, same, tokens_in
from compiled_attn.passes.follow_layout import argument, dimension, tags_of
from compiled_attn.passes.follow_rules import rule_name
from compiled_attn.passes.packed_pairs import attention_by_place, check_pairs
from compiled_attn.passes.packed_slices import cat, no_pictures, select, slice_, split
from compiled_attn.passes.token_scores import Cursor

aten = torch.ops.aten


@dataclass(kw_only=True)
class Packed(Stage):
    """A stage that packs. tokens [1, T, C]; positions [T] in the original axis, fixed tokens included; total: T.

    place [T]: picture * N + position.  begins [B + 1].  kept [B, N]: which positions are left.  rows [T]: those of the
    stage before, None at the first.  full: N.  after: fixed tokens behind.  longest: a bound on a picture's tokens.
    """

    place: fx.Node
    begins: fx.Node
    kept: fx.Node
    rows: fx.Node | None
    full: int | fx.Node
    after: int
    longest: int | fx.Node
    cuts: dict[int, Cut] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """The packed rows without the first `count` of each picture. rows: their numbers; None where all stay.

    positions, place: as the stage's, in an axis that is shorter by `count`.
    """

    count: int
    rows: fx.Node | None
    positions: fx.Node
    place: fx.Node
    begins: fx.Node
    total: int | fx.Node
    full: int | fx.Node


class FollowPacked(Follow):
    """As Follow; every stage is a Packed."""

    def begin_packed(self, stage: Packed, old: fx.Node, stream: fx.Node) -> None:
        """`stream` [1, T, C] holds what is left of the tokens of `old`."""
        self.begin_stage(stage, old, stream)
        self.tags[stream] = tuple(
            tuple(Part(p.size, "packed") if p.role == "batch" else p for p in dim) for dim in self.of(stream) or ()
        )

    def packed(self, node: Any) -> bool:
        """Whether the tokens of a value are packed."""
        return any(t is not None and t.stage > 0 for t in map(tokens_in, self.of(node) or ()))

    def visit(self, node: fx.Node) -> None:
        if node.op == "call_function" and node not in self.tags and any(map(self.packed, node.all_input_nodes)):
            rule = RULES.get(rule_name(node))
            if rule is not None and rule(self, node):
                return
        super().visit(node)

    def put(self, node: fx.Node, new: fx.Node, tags: Tags) -> None:
        """`new` stands for `node` from here on."""
        self.tags[node] = tags
        self.substitute(node, new)

    def unpack_outputs(self) -> None:
        """Outputs [1, T, C] become [B, N, C], with zeros where a token was left out. Raises Lost."""
        output = next(n for n in self.graph.nodes if n.op == "output")
        for node in [a for a in output.all_input_nodes if self.packed(a)]:
            here = Cursor(self.edit, node)
            _, cut = self.pictures_first(node, node)
            output.replace_input_with(node, self.canvas(here, node, cut, 0.0))

    def stage_at(self, tokens: Tokens) -> Packed:
        found = self.stages[tokens.stage - 1]
        if not isinstance(found, Packed):
            raise TypeError(f"stage {tokens.stage} is not packed")
        return found

    def pictures_first(self, node: fx.Node, value: Any) -> tuple[Tokens, Cut]:
        """The token axis of a packed value [1, T, ...]. Raises Lost, at `node`, where it lies otherwise."""
        tags = tags_of(self, value)
        tokens = tokens_in(tags[1]) if len(tags) > 1 and len(tags[1]) == 1 else None
        if tokens is None or len(tags[0]) != 1 or tags[0][0].role != "packed":
            raise Lost(node, "pictures and tokens are not its first two dimensions")
        return tokens, self.cut(tokens, node)

    def cut(self, tokens: Tokens, node: fx.Node) -> Cut:
        """The rows that a token axis with fewer fixed tokens in front than the stage's consists of."""
        stage = self.stage_at(tokens)
        count = stage.prefix - tokens.before
        if tokens.after != stage.after or count < 0:
            raise Lost(node, "its fixed tokens behind the patches are not those that were packed")
        if count not in stage.cuts:
            stage.cuts[count] = self._cut(stage, count)
        return stage.cuts[count]

    def _cut(self, stage: Packed, count: int) -> Cut:
        if count == 0:
            return Cut(0, None, stage.positions, stage.place, stage.begins, stage.total, stage.full)
        here = Cursor(self.edit, stage.anchor, stage.tokens)
        device = {"device": stage.begins.meta["val"].device}
        ends = here.size(stage.begins, 0)
        begins = here(
            aten.sub.Tensor, stage.begins, here(aten.mul.Tensor, here(aten.arange.default, ends, **device), count)
        )
        gone = here(operator.mul, here(operator.add, ends, -1), count) if isinstance(ends, fx.Node) else 0
        gone = gone if isinstance(ends, fx.Node) else (ends - 1) * count
        total = here(operator.sub, stage.total, gone)
        row = here(aten.arange.default, total, **device)
        later = here(aten.slice.Tensor, begins, 0, 1, END)
        behind = here(aten.ge.Tensor, here(aten.unsqueeze.default, row, 1), here(aten.unsqueeze.default, later, 0))
        picture = here(aten.sum.dim_IntList, behind, [1])
        rows = here(aten.add.Tensor, row, here(aten.mul.Tensor, here(aten.add.Tensor, picture, 1), count))
        positions = here(aten.sub.Tensor, here(aten.index_select.default, stage.positions, 0, rows), count)
        full = here(operator.sub, stage.full, count) if isinstance(stage.full, fx.Node) else stage.full - count
        place = here(aten.add.Tensor, here(aten.mul.Tensor, picture, full), positions)
        stage.anchor = here.node
        return Cut(count, rows, positions, place, begins, total, full)

    def canvas(self, here: Cursor, value: fx.Node, cut: Cut, fill: float) -> fx.Node:
        """A packed value [1, T, C] put back to its places in [B, N, C] of `fill`."""
        if value.meta["val"].dim() != 3:
            raise Lost(value, f"packed tokens of {value.meta['val'].dim()} dimensions can not be put back")
        kinds = {"dtype": value.meta["val"].dtype, "device": value.meta["val"].device}
        shape = [self.pictures(here, cut), cut.full, here.size(value, 2)]
        blank = here(aten.full.default, shape, fill, **kinds)
        return here(_op("unpack_tokens"), here(aten.select.int, value, 0, 0), cut.place, blank)

    def pictures(self, here: Cursor, cut: Cut) -> int | fx.Node:
        """B."""
        ends = here.size(cut.begins, 0)
        return here(operator.add, ends, -1) if isinstance(ends, fx.Node) else ends - 1

    def size_argument(self, node: fx.Node, dim: tuple[Part, ...]) -> int | fx.Node | None:
        size = self.new_size(dim)
        if isinstance(size, int):
            return size
        tokens = tokens_in(dim)
        others = [p for p in dim if p.role != tokens and not same(self._part_size(p), 1)]
        if tokens is None or others:
            return None
        return self.cut(tokens, node).total

    def bring(self, node: fx.Node, table: fx.Node, out: Tags, neutral: Callable[[], Any]) -> fx.Node:
        """A table by position, [..., N, ...], at the positions that `out` still has; pairs of tokens raise Lost."""
        del neutral
        shape = self.shape(table)
        offset = len(out) - len(shape)
        wanted = {
            d - offset: tokens
            for d in range(max(0, offset), len(out))
            if (tokens := tokens_in(out[d])) is not None
            and tokens.stage > 0
            and not same(shape[d - offset], 1)
            and not self._follows(table, d - offset, tokens)
        }
        if not wanted:
            return table
        if len(wanted) > 1:
            raise Lost(node, f"{table} holds a value for each pair of tokens, and packed tokens have no such pairs")
        ((d, tokens),) = wanted.items()
        key = (self.numbers(table), d, tokens)
        if key not in self.gathered:
            with self.graph.inserting_before(node):
                self.gathered[key] = self._brought(node, table, d, tokens, out[d + offset])
        return self.gathered[key]

    def _brought(self, node: fx.Node, table: fx.Node, d: int, tokens: Tokens, dim: tuple[Part, ...]) -> fx.Node:
        own, shape = tags_of(self, table), self.shape(table)
        if len(dim) != 1 or len(own[d]) != 1:
            raise Lost(node, f"{table} meets a dimension in which tokens and others are merged")
        if not same(shape[d], dim[0].size):
            raise Lost(node, f"{table} has {shape[d]} entries where there were {dim[0].size} tokens")
        mine = tokens_in(own[d])
        if mine is not None and (mine.before, mine.after) != (tokens.before, tokens.after):
            raise Lost(node, f"{table} has tokens of another layout")
        cut = self.cut(tokens, node)
        pictures = [i for i, t in enumerate(own) if any(p.role == "batch" for p in t) and not same(shape[i], 1)]
        tags = list(own)
        tags[d] = dim
        if mine is not None and mine.stage > 0:
            if cut.count:
                raise Lost(node, f"{table} holds tokens of an earlier stage without its first ones")
            new = table
            for stage in self.stages[mine.stage : tokens.stage]:
                new = self.edit.call(aten.index_select.default, (new, d, stage.rows), like=node)  # type: ignore[attr-defined]
        elif pictures:
            if pictures != [0] or d != 1 or len(own[0]) != 1:
                raise Lost(node, f"{table} has an entry for each token of each picture, which are not in front")
            flat = self.edit.call(aten.flatten.using_ints, (table, 0, 1), like=node)
            rows = self.edit.call(aten.index_select.default, (flat, 0, cut.place), like=node)
            new = self.edit.call(aten.unsqueeze.default, (rows, 0), like=node)
            tags[0] = (Part(own[0][0].size, "packed"),)
        else:
            new = self.edit.call(aten.index_select.default, (table, d, cut.positions), like=node)
        self.tags[new], self.old[new] = tuple(tags), self.old.get(table, table.meta["val"])
        if table in self.data:
            self.data.add(new)
        return new

    def _part_size(self, part: Part) -> Size:
        tokens = part.role
        if tokens == "packed":
            return 1
        if not isinstance(tokens, Tokens) or tokens.stage == 0:
            return part.size
        stage = self.stage_at(tokens)
        total = stage.tokens.meta["val"].shape[1]
        pictures = stage.begins.meta["val"].shape[0] - 1
        return _torch.expression(total - pictures * (stage.prefix - tokens.before))


def _op(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


# Rules: True where the node was replaced, False where the common rule holds.


def attention(f: FollowPacked, node: fx.Node) -> bool:
    """[1, H, T, D] or [H, T, D] -> ragged_attention over rows [T, H, D]."""
    q, k, v = node.args[:3]
    tags = [tags_of(f, x) for x in (q, k, v)]
    tokens = tokens_in(tags[0][-2])
    if tokens is None or any(len(t[-2]) != 1 or tokens_in(t[-2]) != tokens for t in tags):
        raise Lost(node, "its queries and keys are not the packed tokens")
    for position, option in ((4, "dropout_p"), (6, "enable_gqa")):
        if argument(node, position, option, None):
            raise Lost(node, f"{option}={argument(node, position, option, None)} has no form over packed tokens")
    mask = argument(node, 3, "attn_mask", None)
    if mask is not None:
        check_pairs(f, node, mask)
    here = Cursor(f.edit, node)
    rows = [rows_of(f, here, node, x) for x in (q, k, v)]
    cut, stage = f.cut(tokens, node), f.stage_at(tokens)
    scale = argument(node, 7, "scale", None)
    scale = 1.0 / math.sqrt(int(rows[0].meta["val"].shape[2])) if scale is None else scale
    if mask is not None:
        out = attention_by_place(f, here, rows, mask, cut, stage, scale)
    else:
        options = {"scale": scale, "causal": bool(argument(node, 5, "is_causal", False)), "longest": stage.longest}
        out = here(_op("ragged_attention"), *rows, cut.begins, cut.begins, **options)
    out = here(aten.transpose.int, out, 0, 1)
    if len(tags[0]) == 4:
        out = here(aten.unsqueeze.default, out, 0)
    f.put(node, out, (*tags[0][:-1], tags[2][-1]))
    return True


def rows_of(f: FollowPacked, here: Cursor, node: fx.Node, x: Any) -> fx.Node:
    """[1, H, T, D] or [H, T, D] as [T, H, D]."""
    tags = tags_of(f, x)
    if len(tags) not in (3, 4) or not any(p.role == "packed" for p in tags[0]):
        raise Lost(node, "its first dimension is not the pictures")
    if len(tags) == 4 and len(tags[0]) != 1:
        raise Lost(node, "its pictures are merged with others")
    return here(aten.transpose.int, here(aten.select.int, x, 0, 0) if len(tags) == 4 else x, 0, 1)


def reduction(f: FollowPacked, node: fx.Node) -> bool:
    """mean, sum, amax over the tokens of each picture, on a canvas."""
    x: Any = node.args[0]
    tags = tags_of(f, x)
    given = argument(node, 1, "dim", None)
    every = given is None or given == []
    dims = range(len(tags)) if every else given if isinstance(given, (list, tuple)) else [given]
    taken = {dimension(d, len(tags)) for d in dims}
    no_pictures(node, tags, taken)
    if not any(tokens_in(tags[d]) for d in taken):
        return False
    name = rule_name(node)
    if taken != {1} or name not in ("mean", "sum", "amax"):
        raise Lost(node, f"{name} over packed tokens is known over the tokens alone, for mean, sum and amax")
    _, cut = f.pictures_first(node, x)
    here = Cursor(f.edit, node)
    spread = f.canvas(here, x, cut, -math.inf if name == "amax" else 0.0)
    keep = bool(argument(node, 2, "keepdim", False))
    if name == "amax":
        out = here(aten.amax.default, spread, [1], keep)
    else:
        out = here(aten.sum.dim_IntList, spread, [1], keep)
    if name == "mean":
        ends = here(aten.slice.Tensor, cut.begins, 0, 1, END)
        count = here(aten.sub.Tensor, ends, here(aten.slice.Tensor, cut.begins, 0, 0, -1))
        for _ in range(1 + keep):
            count = here(aten.unsqueeze.default, count, 1)
        out = here(aten.div.Tensor, out, count)
    f.put(node, out, ((Part(tags[0][0].size, "batch"),), *([plain(1)] if keep else []), *tags[2:]))
    return True


def token_count(f: FollowPacked, node: fx.Node) -> bool:
    """The number of pictures is asked of the tokens before they were packed."""
    tags = tags_of(f, node.args[0])
    dim = tags[dimension(node.args[1], len(tags))]  # type: ignore[arg-type]
    if not any(p.role == "packed" for p in dim):
        return False
    if len(dim) != 1:
        raise Lost(node, "it asks for the size of a dimension in which pictures and others are merged")
    source = f.batch_source()
    axis = next(i for i, t in enumerate(f.of(source) or ()) if any(p.role == "batch" for p in t))
    node.args = (source, axis)
    return True


def one_factor(f: FollowPacked, node: fx.Node) -> bool:
    """A product may have packed tokens in one factor alone: two would pair tokens of different pictures."""
    factors = node.args[1] if rule_name(node) == "einsum" else node.args[:2]
    if sum(f.packed(x) for x in factors) > 1:  # type: ignore[union-attr]
        raise Lost(node, "it multiplies packed tokens with packed tokens, over the borders of pictures")
    return False


def not_along_tokens(f: FollowPacked, node: fx.Node) -> bool:
    """softmax, split, roll, ...: fine on dimensions that count neither tokens nor pictures."""
    name = rule_name(node)
    tags = tags_of(f, node.args[0])
    position = 2 if name in ("split", "chunk", "roll") else 1
    given = argument(node, position, "dims" if name in ("roll", "flip") else "dim", 0)
    dims = {dimension(d, len(tags)) for d in (given if isinstance(given, (list, tuple)) else [given])}
    no_pictures(node, tags, dims)
    if any(tokens_in(tags[d]) for d in dims):
        raise Lost(node, f"{name} over packed tokens would reach over the borders of pictures")
    return False


def refused(f: FollowPacked, node: fx.Node) -> bool:
    del f
    raise Lost(node, f"{rule_name(node)} of packed tokens is not known")


RULES: dict[str, Callable[[FollowPacked, fx.Node], bool]] = {
    "scaled_dot_product_attention": attention,
    "select": select,
    "slice": slice_,
    "cat": cat,
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "any", "all", "logsumexp"), reduction),
    "sym_size": token_count,
    **dict.fromkeys(("matmul", "bmm", "mm", "einsum"), one_factor),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax"), not_along_tokens),
    "split_with_sizes": split,
    **dict.fromkeys(("split", "chunk", "unbind", "roll", "flip"), not_along_tokens),
    **dict.fromkeys(("linalg_vector_norm", "adaptive_avg_pool1d", "repeat"), refused),
    **dict.fromkeys((f"{NAMESPACE}.attention", f"{NAMESPACE}.attention_with_class_row"), refused),
}
