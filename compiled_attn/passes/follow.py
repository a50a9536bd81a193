"""Follows the token axis through a graph, as sharding is propagated, and rewrites what is sized or indexed by it.

Every dimension of a value on the way of the tokens is described by its parts: `[B*H, N, D]` is `((B, H), (N,), (D,))`,
where the part B is the batch and the part N is a token axis: some fixed entries, then the patches, then some fixed
entries. After a reorganization the patches of that axis are fewer, so

    view(x, [b, 197, 3, 6, 64])   ->  view(x, [b, 140, 3, 6, 64])          sizes follow the axis
    slice(x, 1, 1, 197)           ->  slice(x, 1, 1, end)                  the fixed entries stay where they are
    add(scores, bias[1, H, N, N]) ->  add(scores, gather(bias, kept patches))    a table is gathered with the tokens

A table is any value indexed by token that was not reorganized itself: a bias, a mask, a rotary table, positions. The
fused token stands for no position, so a table gets a neutral entry for it: 0 where it is added, True in a boolean
attention mask, 1 where it is multiplied, and the identity (cosine 1, sine 0) in a rotary table. Never guesses: an op
with no rule, a patch taken by its number, or a split of the patches into rows and columns raises `Lost`.
The rules by op are in follow_rules.py.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.program import Edit
from compiled_attn.passes.value_numbers import Numbers

aten = torch.ops.aten
Size = Any  # an int, or a sympy expression where the size is symbolic
END = sys.maxsize


class Lost(Exception):
    """The tokens can not be followed through `node`, and because of what."""

    def __init__(self, node: fx.Node, because: str) -> None:
        super().__init__(f"{node}: {because}")
        self.node, self.because = node, because


@dataclass(frozen=True)
class Tokens:
    """A token axis: `before` fixed entries, the patches that are left after `stage` reorganizations, `after` fixed."""

    stage: int
    before: int
    after: int


@dataclass(frozen=True)
class Part:
    """A factor of a dimension: its size before any reorganization and what it counts (None: something else).

    packed: the pictures, whose tokens lie behind one another now (follow_packed.py), so that this factor is 1.
    """

    size: Size
    role: Tokens | Literal["batch", "packed"] | None = None


Dim = tuple[Part, ...]
Tags = tuple[Dim, ...]


@dataclass
class Stage:
    """A reorganization in the graph. tokens: select_tokens' first result [B, M, C].  fused: whether its last is fused.

    positions: the original patch numbers [B, M - prefix]; the fused token has the number of patches, `count`.
    total: M, an int or the node that holds it.  anchor: last node made for it.  index: see Follow.full_index.
    """

    tokens: fx.Node
    positions: fx.Node
    fused: bool
    prefix: int
    total: int | fx.Node
    count: int | fx.Node
    anchor: fx.Node
    index: dict[int, fx.Node] = field(default_factory=dict)

    @property
    def size(self) -> Size:
        return _torch.expression(self.tokens.meta["val"].shape[1])


def plain(size: Size) -> Dim:
    return (Part(size),)


def tokens_in(dim: Dim) -> Tokens | None:
    """The token axis among a dimension's parts."""
    return next((p.role for p in dim if isinstance(p.role, Tokens)), None)


def batch_in(dim: Dim) -> bool:
    return any(p.role in ("batch", "packed") for p in dim)


def latest(tags: Tags | None) -> int:
    """The highest stage among the token axes of a value; -1 where it has none."""
    found = [t.stage for t in map(tokens_in, tags or ()) if t is not None]
    return max(found, default=-1)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every allowed value; asks nothing of the ShapeEnv."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0)


def quotient(a: Size, b: Size) -> Size | None:
    """The size a / b where b divides a for every allowed value, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    found = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    if sympy.denom(found) != 1:
        return None
    return int(found) if found.is_Integer else found


def is_size(value: Any) -> bool:
    return isinstance(value, (int, sympy.Expr)) or (isinstance(value, float) and value.is_integer())


def product(sizes: list[Size]) -> Size:
    out: Size = 1
    for size in sizes:
        out = out * size
    return out


class Follow:
    """Tags of the values of a draft, in the order of its graph. `visit` each node once.

    data: nodes whose numbers depend on the inputs that the tokens are made of.
    """

    def __init__(self, edit: Edit, data: set[fx.Node]) -> None:
        self.edit, self.graph, self.data = edit, edit.graph, data
        self.old: dict[fx.Node, Any] = {n: n.meta.get("val") for n in edit.graph.nodes}
        self.tags: dict[fx.Node, Tags | list[Tags | None]] = {}
        self.stages: list[Stage] = []
        self.origin: fx.Node | None = None
        self.gathered: dict[Any, fx.Node] = {}
        self.numbers = Numbers()
        self.summed: dict[fx.Node, Size] = {}  # sums over tokens that were reorganized -> how many tokens it was before
        self._roles: dict[int, float] | None = None

    def seed(self, node: fx.Node, axis: int, tokens: Tokens) -> None:
        """`node` [B, N, C] or [N, B, C] holds the tokens; axis: which dimension counts them."""
        sizes = self.shape(node)
        roles = {axis: tokens, 1 - axis: "batch"}
        self.tags[node] = tuple((Part(s, roles.get(d)),) for d, s in enumerate(sizes))  # type: ignore[arg-type]
        self.origin = self.origin or node

    def shape(self, node: Any) -> tuple[Size, ...]:
        """Sizes of a value before any reorganization."""
        value = self.old[node] if node in self.old else node.meta["val"]
        return tuple(_torch.expression(s) for s in value.shape)

    def of(self, node: Any) -> Tags | None:
        """Tags of a tensor value; None where nothing is known about it."""
        found = self.tags.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, tuple) else None

    def stage_of(self, node: fx.Node) -> int:
        found = self.tags.get(node)
        if isinstance(found, list):
            return max((latest(t) for t in found), default=-1)
        return latest(found)

    def visit(self, node: fx.Node) -> None:
        """Tags `node`, and rewrites it where its tokens are fewer now. Raises Lost."""
        if node.op != "call_function" or node in self.tags:
            return
        stage = max((self.stage_of(a) for a in node.all_input_nodes), default=-1)
        if stage < 0:
            self._check_count(node)
            return
        try:
            found = self._rule(node)
        except Lost:
            if stage > 0:
                raise
            return
        if found is not None:
            self.tags[node] = found
        if stage > 0:
            self._renew(node, found)

    def new_size(self, dim: Dim) -> Size:
        """Size of a dimension after the reorganizations that its parts have been through."""
        return product([self._part_size(p) for p in dim])

    def size_argument(self, node: fx.Node, dim: Dim) -> int | fx.Node | None:
        """What to write as the size of `dim` in front of `node`: an int, a node, or None where only -1 can say it."""
        size = self.new_size(dim)
        if isinstance(size, int):
            return size
        tokens = tokens_in(dim)
        if tokens is None or len([p for p in dim if not (isinstance(p.size, int) and p.size == 1)]) != 1:
            return None
        stage = self.stages[tokens.stage - 1]
        extra = tokens.before + tokens.after - stage.prefix
        return self._plus(stage.total, extra, node)

    def sizes(self, tensor: fx.Node, like: fx.Node) -> list[int | fx.Node]:
        """Sizes of a tensor as arguments: ints, and sym_size nodes where symbolic."""
        out: list[int | fx.Node] = []
        for d, size in enumerate(tensor.meta["val"].shape):
            fixed = not _torch.is_symbolic(size)
            out.append(int(size) if fixed else self.edit.call(aten.sym_size.int, (tensor, d), like=like))
        return out

    def bring(self, node: fx.Node, table: fx.Node, out: Tags, neutral: Callable[[], Any]) -> fx.Node:
        """`table`, aligned from the right with a value tagged `out`, gathered to the tokens that `out` still has.

        neutral: gives the entry of a fused token, or raises Lost.
        """
        rank = len(out)
        offset = rank - len(self.shape(table))
        wanted = {
            d: tokens
            for d in range(offset, rank)
            if (tokens := tokens_in(out[d])) is not None
            and tokens.stage > 0
            and not same(self.shape(table)[d - offset], 1)
            and not self._follows(table, d - offset, tokens)
        }
        if not wanted:
            return table
        for d, tokens in wanted.items():
            self._check_table(node, table, d - offset, out[d], tokens)
        batch = next((d for d in range(rank) if batch_in(out[d])), None)
        if batch is None:
            raise Lost(node, "it combines a per-token table with a value whose batch dimension is not known")
        fill = neutral() if any(self.stages[t.stage - 1].fused for t in wanted.values()) else None
        key = (self.numbers(table), tuple(wanted.items()), rank, batch, out[batch], fill)
        if key not in self.gathered:
            with self.graph.inserting_before(node):
                self.gathered[key] = self._gather(node, table, out, wanted, batch, offset, fill)
            tags = self.gathered[key].meta["val"].dim()
            self.tags[self.gathered[key]] = tuple(
                out[rank - tags + i]
                if (rank - tags + i) in wanted or rank - tags + i == batch
                else plain(_torch.expression(s))
                for i, s in enumerate(self.gathered[key].meta["val"].shape)
            )
        return self.gathered[key]

    def begin_stage(self, stage: Stage, old: fx.Node, stream: fx.Node) -> None:
        """A reorganization has been inserted: `stream` holds what is left of the tokens of `old`."""
        self.stages.append(stage)
        number = len(self.stages)
        self.substitute(old, stream, replace=False)
        self.tags[stream] = tuple(
            tuple(
                Part(p.size, Tokens(number, p.role.before, p.role.after)) if isinstance(p.role, Tokens) else p
                for p in dim
            )
            for dim in self.of(old) or ()
        )

    def substitute(self, old: fx.Node, new: fx.Node, *, replace: bool = True) -> None:
        """`new` has the tags, the former sizes and the dependence of `old`, and its readers unless told otherwise."""
        self.tags[new], self.old[new] = self.tags[old], self.old[old]
        if old in self.data:
            self.data.add(new)
        if replace:
            self.edit.replace(old, new)
            self.graph.erase_node(old)

    def patches(self, dim: Dim) -> Size:
        """How many patches a dimension that is a token axis stands for now."""
        tokens = tokens_in(dim)
        return self.new_size(dim) - (tokens.before + tokens.after if tokens is not None else 0)

    def batch_source(self) -> fx.Node:
        """A value whose first dimension is the batch."""
        if self.origin is None:
            raise ValueError("nothing was seeded")
        return self.origin

    def multiplier_neutral(self, node: fx.Node, table: fx.Node) -> float:
        """Entry of the fused token in a table that `node` multiplies with: 1, or 0 for the sine of a rotary table."""
        from compiled_attn.passes.rotary import role_of

        return role_of(self, node, table)

    def _rule(self, node: fx.Node) -> Any:
        from compiled_attn.passes.follow_rules import rule_for

        return rule_for(node)(self, node)

    def _renew(self, node: fx.Node, found: Any) -> None:
        try:
            node.meta["val"] = self.edit.value(node.target, node.args, node.kwargs)
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise Lost(node, f"with fewer tokens it can not be computed: {first}") from error
        leaves = node.meta["val"] if isinstance(found, list) else [node.meta["val"]]
        for value, tags in zip(leaves, found if isinstance(found, list) else [found], strict=True):
            if tags is None or not isinstance(value, torch.Tensor):
                continue
            want = [self.new_size(d) for d in tags]
            got = [_torch.expression(s) for s in value.shape]
            if len(want) != len(got) or not all(same(a, b) for a, b in zip(want, got, strict=True)):
                raise Lost(node, f"its sizes come out as {got} where the tokens say {want}")

    def _part_size(self, part: Part) -> Size:
        tokens = part.role
        if not isinstance(tokens, Tokens) or tokens.stage == 0:
            return part.size
        stage = self.stages[tokens.stage - 1]
        return stage.size - stage.prefix + tokens.before + tokens.after

    def _plus(self, value: int | fx.Node, extra: int, node: fx.Node) -> int | fx.Node:
        if isinstance(value, int):
            return value + extra
        if extra == 0:
            return value
        with self.graph.inserting_before(node):
            return self.edit.call(operator.add, (value, extra), like=node)

    def _check_count(self, node: fx.Node) -> None:
        """Refuses a sum over tokens that is then scaled by the old number of tokens."""
        for count in [self.summed[a] for a in node.all_input_nodes if a in self.summed]:
            for value in node.args:
                if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.SymInt):
                    value = _torch.expression(value.meta["val"])
                written = isinstance(value, (int, float)) and isinstance(count, int)
                if (written and abs(value * count - 1) < 1e-9) or (is_size(value) and same(value, count)):
                    raise Lost(node, f"it scales a sum over tokens by their old number, {count}")

    def _follows(self, table: fx.Node, d: int, tokens: Tokens) -> bool:
        own = self.of(table)
        return own is not None and tokens_in(own[d]) == tokens

    def _check_table(self, node: fx.Node, table: fx.Node, d: int, dim: Dim, tokens: Tokens) -> None:
        own = self.of(table)
        mine = tokens_in(own[d]) if own is not None else None
        if len(dim) != 1:
            raise Lost(node, f"{table} meets a dimension in which tokens and others are merged")
        if mine is not None and (mine.stage > 0 or (mine.before, mine.after) != (tokens.before, tokens.after)):
            raise Lost(node, f"{table} has tokens of another stage or layout")
        if tokens.after:
            raise Lost(node, "a per-token table meets tokens that have fixed ones behind the patches")
        if not same(self.shape(table)[d], dim[0].size):
            raise Lost(node, f"{table} has {self.shape(table)[d]} entries where there were {dim[0].size} tokens")
        fused = self.stages[tokens.stage - 1].fused
        if fused and table in self.data and table.meta["val"].is_floating_point():
            raise Lost(node, f"{table} holds values of tokens from before the reorganization; a fused token has none")

    def _gather(
        self, node: fx.Node, table: fx.Node, out: Tags, wanted: dict[int, Tokens], batch: int, offset: int, fill: Any
    ) -> fx.Node:
        call = self.edit.call
        parts = out[batch]
        value = table
        for _ in range(max(0, offset - batch)):
            value = call(aten.unsqueeze.default, (value, 0), like=node)
        offset = min(offset, batch)
        at = batch - offset  # dimension of `value` that is, or will be, the batch
        inner = next(i for i, p in enumerate(parts) if p.role == "batch")
        count = self.batch_size(node)
        if len(parts) > 1:
            own = value.meta["val"].shape[at]
            sizes = self.sizes(value, node)
            if same(_torch.expression(own), 1):
                split: list[Any] = [1] * len(parts)
            else:
                split = [count if i == inner else p.size for i, p in enumerate(parts)]
            if not all(isinstance(s, (int, fx.Node)) for s in split):
                raise Lost(node, "a per-token table meets a batch merged with another symbolic dimension")
            value = call(aten.reshape.default, (value, [*sizes[:at], *split, *sizes[at + 1 :]]), like=node)
        shift = len(parts) - 1
        first = at + inner
        full: list[Any] = [-1] * value.meta["val"].dim()
        full[first] = count
        value = call(aten.expand.default, (value, full), like=node)
        for d, tokens in wanted.items():
            dim = d - offset + (shift if d > batch else 0)
            stage = self.stages[tokens.stage - 1]
            if stage.fused:
                shape = self.sizes(value, node)
                shape[dim] = 1
                options = {"dtype": value.meta["val"].dtype, "device": value.meta["val"].device}
                entry = call(aten.full.default, (shape, fill), options, like=node)
                value = call(aten.cat.default, ([value, entry], dim), like=node)
            index = self.full_index(stage, tokens.before)
            for extra in range(value.meta["val"].dim()):
                if extra not in (first, dim):
                    index = call(aten.unsqueeze.default, (index, extra), like=node)
            if dim < first:
                index = call(aten.transpose.int, (index, dim, first), like=node)
            shape = self.sizes(value, node)
            shape[dim] = -1
            index = call(aten.expand.default, (index, shape), like=node)
            value = call(aten.gather.default, (value, dim, index), like=node)
        if shift:
            sizes = self.sizes(value, node)
            spread = [s if i == inner else p.size for i, (p, s) in enumerate(zip(parts, sizes[at:], strict=False))]
            value = call(
                aten.expand.default,
                (value, [*[-1] * at, *spread, *[-1] * (value.meta["val"].dim() - at - len(parts))]),
                like=node,
            )
            value = call(aten.reshape.default, (value, [*sizes[:at], -1, *sizes[at + len(parts) :]]), like=node)
        return value

    def batch_size(self, like: fx.Node) -> int | fx.Node:
        tokens = self.stages[0].tokens
        size = tokens.meta["val"].shape[0]
        return self.edit.call(aten.sym_size.int, (tokens, 0), like=like) if _torch.is_symbolic(size) else int(size)

    def full_index(self, stage: Stage, before: int) -> fx.Node:
        """[B, before + patches left] int64: positions in an original axis with `before` fixed entries in front.

        The fused token's position is the length of that axis, where tables get one more entry.
        """
        if before not in stage.index:
            value = stage.positions
            if before:
                front = self._after(stage, aten.arange.default, (before,), {"device": value.meta["val"].device})
                front = self._after(stage, aten.unsqueeze.default, (front, 0))
                front = self._after(stage, aten.expand.default, (front, [self._count_after(stage), -1]))
                moved = self._after(stage, aten.add.Tensor, (value, before))
                value = self._after(stage, aten.cat.default, ([front, moved], 1))
            stage.index[before] = value
        return stage.index[before]

    def _after(self, stage: Stage, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        with self.graph.inserting_after(stage.anchor):
            stage.anchor = self.edit.call(target, args, kwargs, like=stage.tokens)
        return stage.anchor

    def _count_after(self, stage: Stage) -> int | fx.Node:
        size = stage.tokens.meta["val"].shape[0]
        return self._after(stage, aten.sym_size.int, (stage.tokens, 0)) if _torch.is_symbolic(size) else int(size)
