"""Recognises attention that sees a part of a map, however the part was cut out, and reads the map in place instead.

    r = roll(x, [-3, -3]);  t = partition(r)                       y = linear(x, W, b)
    q, k, v = heads(linear(t, W, b))                         ->    q, k, v = heads(y)
    a = scaled_dot_product_attention(q, k, v, bias + mask)         a = local_attention(q, k, v, table, window=[7, 7],
    z = roll(reverse(linear(a, P, c)), [3, 3])                          stride=[7, 7], shift=[3, 3], border="mask")
                                                                   z = linear(a, P, c)

Windows, shifted windows, grids, halos, neighborhoods and sliding masks over sequences are found by following element
numbers (match/positions.py), so it does not matter how they are written. What is added to the scores is taken apart by
its values: it must depend on the distance of two tokens alone and hide all that the pattern hides, or be a product of
the query with one embedding for each distance along an axis. Never changes which keys a query sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn import ops
from compiled_attn.ir import _torch
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.ops.local_geometry import axes_of
from compiled_attn.passes.choose_attention import SDPA, Call, read
from compiled_attn.passes.match.positions import Numbering, moved, moves
from compiled_attn.passes.match.rebuild import Builder, End, end_of, head_values
from compiled_attn.passes.match.table import Added, AxisLogits, added_by, axis_logits, bias_table
from compiled_attn.passes.match.tokens import OVER_CHANNELS, Origin, Tokens, origin_of, tokens_of
from compiled_attn.passes.match.windows import Groups, Pattern, grids, patterns, rolled

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
RULE = "local_attention"
OVER_MAP = "every query sees the whole map"


@dataclass(frozen=True)
class Factors:
    """q, k, v of an attention; groups [B, H, W] says which group is which picture's, head's and window's."""

    q: Tokens
    k: Tokens
    v: Tokens
    groups: torch.Tensor

    def shared(self, part: Tokens) -> torch.Tensor:
        """The head of k or v that each head of q meets, [H]."""
        return part.head[self.groups[0, :, 0]]


@dataclass(frozen=True)
class Found:
    """A match. table: the bias and what it is made from.  logits: what depends on the query, axis by axis.

    rolls: how far the map has to be rolled along each axis to follow the pattern; () for not at all.
    """

    call: Call
    factors: Factors
    pattern: Pattern
    table: torch.Tensor | None
    made_from: tuple[str, ...]
    logits: list[AxisLogits] | None
    end: End
    numbering: Numbering
    condition: str
    rolls: tuple[int, ...] = ()


def match(program: Program, node: fx.Node) -> Found | str | None:
    """The pattern of an attention; a sentence where it is nearly one; None where it is plain attention."""
    call = read(node)
    if isinstance(call, str):
        return None
    numbering = Numbering.of(program, [call.q, call.k, call.v])
    if numbering is None:
        return _unknown_sizes(call)
    q, k = origin_of(call.q, numbering), origin_of(call.k, numbering)
    if isinstance(q, Origin) and isinstance(k, Origin) and q.tokens == call.q.meta["val"].shape[2] == k.tokens:
        early = _of_whole_pictures(call, numbering)
        if early is not None:
            return early or None
    factors = factors_of(call, q, k, numbering)
    if not isinstance(factors, Factors):
        return factors
    lengths = [x.meta["val"].shape[2] for x in (call.q, call.k)]
    shape = (*call_groups(call, numbering), *lengths)
    added = added_by(call.mask, numbering, factors.q, shape)
    if isinstance(added, str):
        return added
    visible = added.visible(shape)
    if call.causal:
        visible = visible & torch.ones(lengths, dtype=torch.bool).tril()
    alike = visible[factors.groups[0, 0]]
    if any(not torch.equal(visible[heads], alike) for picture in factors.groups for heads in picture):
        return "its mask differs between heads or pictures"
    first = factors.groups[0, 0]
    return chosen(node, call, factors, added, Groups(factors.q.spot[first], factors.k.spot[first], alike), numbering)


def _unknown_sizes(call: Call) -> str | None:
    groups, _, *sizes = call.q.meta["val"].shape
    if all(isinstance(n, int) for n in sizes):
        symbols = set() if isinstance(groups, int) else _torch.expression(groups).free_symbols
        if len(symbols) < 2:
            return None
        named = ", ".join(sorted(str(s) for s in symbols))
        return f"its groups are counted by the symbols {named}, where their tokens lie is found by numbers"
    if call.mask is None:
        return None
    return f"its {sizes[0]} tokens are a symbol, what a mask over them hides is found by numbers"


def _of_whole_pictures(call: Call, numbering: Numbering) -> str | None:
    """Where each group holds all tokens: "" for plain attention, a sentence for a near miss, None to look closer."""
    if call.mask is None:
        return ""
    if numbering.constant(call.mask) is not None:
        return None
    mask: Any = call.mask
    while moves(mask) and mask.meta["val"].shape[-2] != 1:
        mask = moved(mask)[0]
    rows = mask.meta["val"].shape[-2] if mask.meta["val"].dim() > 1 else 1
    return "" if isinstance(rows, int) and rows == 1 else "which keys a query sees depends on the input, by its mask"


def call_groups(call: Call, numbering: Numbering) -> tuple[int, int]:
    sizes = [numbering.size(n) for n in call.q.meta["val"].shape[:2]]
    return sizes[0] or 0, sizes[1] or 0


def factors_of(call: Call, q: Origin | str, k: Origin | str, numbering: Numbering) -> Factors | str | None:
    """Where the tokens of q, k and v stand in the map."""
    v = origin_of(call.v, numbering)
    for name, origin in (("queries", q), ("keys", k), ("values", v)):
        if isinstance(origin, str):
            return f"its {name} are out of reach: {origin}"
    keys = tokens_of(k)  # type: ignore[arg-type]
    if isinstance(keys, str):
        return f"its keys are out of reach: {keys}"
    queries, values = tokens_of(q, keys), tokens_of(v, keys)  # type: ignore[arg-type]
    for name, part in (("queries", queries), ("values", values)):
        if isinstance(part, str):
            return f"its {name} are out of reach: {part}"
    for part in (queries, keys, values):
        for step in part.steps:  # type: ignore[union-attr]
            for operand in step.all_input_nodes:
                constant = numbering.constant(operand)
                if constant is not None and head_values(operand, step, part, numbering) is None:  # type: ignore[arg-type]
                    return f"{operand.name} in {step.name} differs between tokens"
    return _joined(queries, keys, values)  # type: ignore[arg-type]


def _joined(q: Tokens, k: Tokens, v: Tokens) -> Factors | str | None:
    """Sorts groups by picture, head and window; a sentence where q, k and v do not fit each other.

    None where a picture has one group with some of its tokens as queries, as the class token's.
    """
    heads, pictures = len(q.channels), int(q.batch.max()) + 1
    owner = q.batch * heads + q.head
    if len(owner) % (heads * pictures) or bool((owner.bincount(minlength=heads * pictures).diff() != 0).any()):
        return "its heads have different numbers of groups"
    groups = owner.argsort(stable=True).view(pictures, heads, -1)
    for part in (q, k, v):
        if not torch.equal(part.spot[groups], part.spot[groups[0, 0]].expand(*groups.shape, -1)):
            return "its heads or pictures are cut into different groups"
    if not torch.equal(k.batch, q.batch) or not torch.equal(v.batch, q.batch) or not torch.equal(k.spot, v.spot):
        return "its keys and values are of other pictures or tokens than each other or its queries"
    for part in (k, v):
        if not bool((part.head[groups] == part.head[groups[:1, :, :1]]).all()):
            return "its groups of one head take keys of several heads"
    places = q.spot[groups[0, 0]].flatten().sort().values
    if not torch.equal(places, torch.arange(math.prod(q.spatial))):
        if groups.shape[2] == 1:
            return None
        return f"its groups do not hold each of the {math.prod(q.spatial)} queries once"
    return Factors(q, k, v, groups)


def chosen(
    node: fx.Node, call: Call, factors: Factors, added: Added, groups: Groups, numbering: Numbering
) -> Found | str | None:
    """The first pattern that the groups follow, with a table or logits that fit it."""
    if groups.whole and bool(groups.visible.all()):
        if len(factors.q.spatial) < 2:
            return None
        size = " x ".join(str(n) for n in factors.q.spatial)
        kept = "" if call.mask is None else ", which keeps its bias"
        return f"{OVER_MAP} of {size}: plain attention{kept}"
    if _over_all_keys(groups, factors):
        return None
    reason = ""
    for queries, keys in _maps(factors):
        for pattern, rolls in _patterns(groups, queries, keys, factors):
            entries = tuple(a.offsets for a in axes_of(len(queries), **pattern.options))
            table = bias_table(added, pattern, factors.groups, entries)
            logits = axis_logits(added, pattern, factors.groups, entries)
            if isinstance(table, str) or isinstance(logits, str):
                reason = reason or next(x for x in (table, logits) if isinstance(x, str))
                continue
            end = end_of(node, numbering, places_of(node, call, factors, numbering), _sizes(node, factors, queries))
            if end is None or not all(numbering.grows(n) for n in (call.q, call.k, end.node)):
                return "its result is not put back into the map behind it"
            condition = added.condition(groups.visible, factors.groups)
            return Found(call, factors, pattern, table, added.names, logits, end, numbering, condition, rolls)
    if reason:
        return reason
    one = len(groups.queries) == 1 and bool(groups.visible.all())  # its queries share their keys, wherever they lie
    if one or (groups.whole and call.causal) or _all_earlier(groups):
        return None
    if any(next(patterns(groups, q, k, lenient=True), None) for q, k in _maps(factors)):
        joined = "its windows join opposite borders of the map and nothing hides that"
        return joined if call.mask is None else "its mask lets tokens of different windows see each other"
    sizes = f"{groups.queries.shape[1]} queries and {groups.keys.shape[1]} keys"
    return f"its {len(groups.queries)} groups of {sizes} follow no pattern of windows, halos or neighborhoods"


def _over_all_keys(groups: Groups, factors: Factors) -> bool:
    """Whether every query sees all of another map, such as a pooled one."""
    whole = len(groups.queries) == 1 and bool(groups.visible.all()) and bool((groups.keys >= 0).all())
    return whole and groups.keys.shape[1] == math.prod(factors.k.spatial)


def _patterns(
    groups: Groups, queries: tuple[int, ...], keys: tuple[int, ...], factors: Factors
) -> Iterator[tuple[Pattern, tuple[int, ...]]]:
    """The patterns of the groups, with how far the map has to be rolled first."""
    for pattern in patterns(groups, queries, keys):
        yield pattern, ()
    if queries != keys or queries != factors.q.spatial or factors.k.spatial != queries:
        return
    found = rolled(groups, queries)
    if found is not None:
        for pattern in patterns(found[0], queries, keys):
            yield pattern, found[1]


def _all_earlier(groups: Groups) -> bool:
    visible = groups.visible[0]
    return groups.whole and bool(visible[-1].all()) and torch.equal(visible, torch.ones_like(visible).tril())


def _maps(factors: Factors) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Sizes of the queries' map and of the keys'."""
    q, k = factors.q.spatial, factors.k.spatial
    if len(q) == len(k) and (len(q) > 1 or q != k):
        yield q, k
    elif q == k:
        for grid in grids(math.prod(q), []):
            yield grid, grid


def _sizes(node: fx.Node, factors: Factors, queries: tuple[int, ...]) -> tuple[int, ...]:
    """[B, *spatial, H, width] of the result."""
    pictures, heads, _ = factors.groups.shape
    return pictures, *queries, heads, node.meta["val"].shape[3]


def places_of(node: fx.Node, call: Call, factors: Factors, numbering: Numbering) -> torch.Tensor:
    """The number of each element of the result in [B, *spatial, H, width]."""
    pictures, heads, windows = factors.groups.shape
    width, n = node.meta["val"].shape[3], factors.q.spot.shape[1]
    picture, head = torch.arange(pictures).view(-1, 1, 1, 1), torch.arange(heads).view(1, -1, 1, 1)
    spot = factors.q.spot[factors.groups[0, 0]].view(1, 1, windows, n)
    token = (picture * math.prod(factors.q.spatial) + spot) * heads + head  # [B, H, W, n]
    by_group = torch.empty(pictures * heads * windows, n, dtype=torch.long)
    by_group[factors.groups.flatten()] = token.flatten(0, 2)
    return (by_group.unsqueeze(2) * width + torch.arange(width)).view(*call_groups(call, numbering), n, width)


def write(edit: Edit, node: fx.Node, found: Found) -> None:
    """Puts q, k and v on the map, the op between them, and the projection at the end."""
    like = edit.node_of[node]
    with edit.graph.inserting_before(edit.node_of[found.end.node]):
        builder = Builder(edit, like, found.numbering, found.rolls)
        factors, pattern = found.factors, found.pattern
        q = builder.on_map(factors.q, pattern.queries)
        k, v = (builder.on_map(part, pattern.keys) for part in (factors.k, factors.v))
        k, v = (_repeated(builder, x, factors.shared(part)) for x, part in ((k, factors.k), (v, factors.v)))
        bias = None
        if found.table is not None:
            value = found.table.to(q.meta["val"].dtype)
            bias = edit.constant(f"{node.name}_bias", value, made_from=found.made_from)
        logits = builder.logits(found.logits, pattern.queries) if found.logits else None
        options = {**pattern.options, "scale": found.call.scale}
        options |= {"softcap": found.call.softcap} if found.call.softcap else {}
        out = builder.call(ops.local_attention.overload, q, k, v, bias, logits, **options)
        out = builder.rolled(out, [-n for n in found.rolls])
        shape, order = list(found.end.shape), list(found.end.order)
        if found.end.linear is not None:
            *sizes, heads, width = out.meta["val"].shape
            out = builder.call(aten.reshape.default, out, [-1, *sizes[1:], heads * width])
            old = edit.node_of[found.end.linear]
            out = edit.call(old.target, (out, *old.args[1:]), dict(old.kwargs), like=old)
        if list(out.meta["val"].shape[1:]) != shape[1:]:
            out = builder.call(aten.reshape.default, out, shape)
        if order != sorted(order):
            out = builder.call(aten.permute.default, out, order)
    edit.replace(edit.node_of[found.end.node], out)


def _repeated(builder: Builder, x: fx.Node, shared: torch.Tensor) -> fx.Node:
    """Heads that several heads of q share, once for each."""
    if torch.equal(shared, torch.arange(x.meta["val"].shape[-2])):
        return x
    index = builder.edit.constant(f"{builder.like.name}_heads", shared)
    return builder.call(aten.index_select.default, x, x.meta["val"].dim() - 2, index)


def plain(because: str) -> bool:
    """Whether a sentence says that an attention is over everything, and so no near miss of a local one."""
    return OVER_MAP in because or OVER_CHANNELS in because


def said(found: Found) -> str:
    """A match in words."""
    options, causal = found.pattern.options, found.pattern.options.get("causal")
    words = [f"window {' x '.join(str(n) for n in options['window'])}"]
    for name in ("stride", "dilation", "shift", "block"):
        values = options.get(name)
        if (
            values
            and any(v != (0 if name == "shift" else 1) for v in values)
            and (name, values) != ("block", options["stride"])
        ):
            words.append(f"{name} {' x '.join(str(n) for n in values)}")
    words.append("causal" if causal and any(causal) else f"border {options['border']}")
    words += [f"on the map rolled by {' x '.join(str(n) for n in found.rolls)}"] if found.rolls else []
    words += [f"{options['sinks']} sinks"] if options.get("sinks") else []
    words += ["bias by distance"] if found.table is not None else []
    words += ["logits of the query"] if found.logits else []
    words += [f"capped at {found.call.softcap:g}"] if found.call.softcap else []
    return ", ".join(words)


@dataclass(frozen=True)
class RaiseLocalAttention:
    """Local patterns become local_attention; plain attention is left, and near misses say why."""

    name: ClassVar[str] = "raise-local-attention"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        if program.mode != "inference":
            return program
        edit = None
        for node in program.graph.nodes:
            if node.op != "call_function" or node.target not in (SDPA, ops.attention.overload):
                continue
            if node.kwargs.get("softcap") and target.kind == "cuda":
                notes.miss(
                    node,
                    RULE,
                    f"its scores are capped at {node.kwargs['softcap']:g}, no kernel of windows bends them on a GPU",
                )
                continue
            found = match(program, node)
            if isinstance(found, str):
                notes.miss(node, RULE, found)
            if not isinstance(found, Found):
                continue
            edit = edit or program.edit()
            write(edit, node, found)
            notes.did(node, RULE, said(found), found.condition)
        if edit is None:
            return program
        for node in edit.graph.nodes:
            if node.target is aten.view.default:  # what it views may now lie in another memory order
                node.target = aten.reshape.default
        return edit.finish(self.name)
