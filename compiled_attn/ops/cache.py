"""Caches of keys and values in slots: a fixed number of places per key head, written, freed and attended to.

Letters: B batch, H query heads, G key heads (each shared by H / G query heads), S slots, T new tokens, D head width, Dv
value width. `positions` [B, G, S] int64 say which token of the text a slot holds, -1 a free one; each head keeps its
own tokens, and their order in memory means nothing. `at` [B, G, T] says which slot a new row goes to, -1 to none.
"""

import torch

from compiled_attn.ir.errors import OpError
from compiled_attn.ir.op import Cost, by_vjp, define, no_gradient
from compiled_attn.ops.ragged import want_whole
from compiled_attn.ops.rules import bytes_of, want_equal, want_floating, want_rank, widened

Tensor = torch.Tensor


# cache_append: slots with new rows written where `at` says


def append_reference(slots: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    append_shape(slots, rows, at)
    out = slots.clone(memory_format=torch.contiguous_format)
    for b in range(at.shape[0]):
        for g in range(at.shape[1]):
            row = (at[b, g] >= 0).nonzero().squeeze(1)
            slot = at[b, g, row]
            if slot.unique().numel() != slot.numel() or bool((slot >= slots.shape[2]).any()):
                raise OpError(
                    "cache_append: two rows go to one slot, or one to none there is",
                    facts=f"at[{b}, {g}] is {at[b, g].tolist()}, there are {slots.shape[2]} slots",
                    do="give every row a slot of its own, or -1",
                )
            out[b, g, slot] = rows[b, g, row]
    return out


def append_shape(slots: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    op = "cache_append"
    if slots.dim() not in (3, 4):
        want_rank(op, "slots", slots, "BGSD")
    want_rank(op, "rows", rows, "BGTD"[: slots.dim()])
    want_rank(op, "at", at, "BGT")
    want_whole(op, "at", at)
    for i, what in enumerate(("the batch size", "the number of key heads")):
        want_equal(op, what, "slots", slots.shape[i], "rows", rows.shape[i])
        want_equal(op, what, "slots", slots.shape[i], "at", at.shape[i])
    want_equal(op, "the number of new tokens", "rows", rows.shape[2], "at", at.shape[2])
    if slots.dim() == 4:
        want_equal(op, "the head width", "slots", slots.shape[3], "rows", rows.shape[3])
    if slots.dtype != rows.dtype:
        raise OpError(
            f"{op}: slots and rows disagree on the element type",
            facts=f"slots holds {slots.dtype}, rows holds {rows.dtype}",
            do="convert one to the other's type",
        )
    return slots.new_empty(slots.shape)


def append_cost(slots: Tensor, rows: Tensor, at: Tensor) -> Cost:
    """One comparison a row; counted as if slots were copied, as the op is functional. In place, only rows move."""
    return Cost(at.numel(), bytes_of(rows, at) + 2 * bytes_of(slots))


def append_decomposition(slots: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """One row: index_put, which Inductor does in place. Several: each slot asks which row it gets."""
    if isinstance(rows.shape[2], int) and rows.shape[2] == 1:
        return _one_row(slots, rows, at)
    count = slots.shape[2]
    row = torch.arange(rows.shape[2], device=at.device).expand(at.shape)
    asked = torch.where(at < 0, count, at)  # rows without a slot go to one behind the last
    source = at.new_full((at.shape[0], at.shape[1], count + 1), -1).scatter(2, asked, row)[:, :, :count]
    index, given = source.clamp(min=0), source >= 0
    if slots.dim() == 4:
        index = index.unsqueeze(3).expand(slots.shape)
        given = given.unsqueeze(3)
    return torch.where(given, rows.gather(2, index), slots).clone(memory_format=torch.contiguous_format)


def _one_row(slots: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    slot, given = at.clamp(min=0), at >= 0
    index = slot
    if slots.dim() == 4:
        index = index.unsqueeze(3).expand(rows.shape)
        given = given.unsqueeze(3)
    row = torch.where(given, rows, slots.gather(2, index))
    batch = torch.arange(slots.shape[0], device=at.device).view(-1, 1, 1)
    head = torch.arange(slots.shape[1], device=at.device).view(1, -1, 1)
    return slots.contiguous().index_put((batch, head, slot), row)


cache_append = define(
    "cache_append",
    "(Tensor slots, Tensor rows, Tensor at) -> Tensor",
    reference=append_reference,
    shape=append_shape,
    gradient=by_vjp(append_decomposition),
    cost=append_cost,
    decomposition=append_decomposition,
)


# cache_evict: positions, with all but the `budget` live slots of highest priority set free


def evict_reference(positions: Tensor, priority: Tensor, budget: int) -> Tensor:
    """Of equal priorities the later position stays; NaN counts as the lowest."""
    evict_shape(positions, priority, budget)
    out = torch.full_like(positions, -1, memory_format=torch.contiguous_format)
    known = priority.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    for b in range(positions.shape[0]):
        for g in range(positions.shape[1]):
            live = [s for s in range(positions.shape[2]) if positions[b, g, s] >= 0]
            live.sort(key=lambda s: (known[b, g, s].item(), positions[b, g, s].item()), reverse=True)
            for s in live[:budget]:
                out[b, g, s] = positions[b, g, s]
    return out


def evict_shape(positions: Tensor, priority: Tensor, budget: int) -> Tensor:
    op = "cache_evict"
    want_rank(op, "positions", positions, "BGS")
    want_rank(op, "priority", priority, "BGS")
    want_whole(op, "positions", positions)
    want_floating(op, "priority", priority)
    for i, what in enumerate(("the batch size", "the number of key heads", "the number of slots")):
        want_equal(op, what, "positions", positions.shape[i], "priority", priority.shape[i])
    if budget < 1:
        raise OpError(f"{op}: a budget of {budget}", facts="a query sees at least itself", do="keep 1 slot or more")
    return positions.new_empty(positions.shape)


def evict_cost(positions: Tensor, priority: Tensor, budget: int) -> Cost:
    """Two comparisons a pair of slots; where one slot goes, one a slot."""
    batch, heads, slots = positions.shape
    others = 1 if _one_goes(positions, budget) else slots
    return Cost(2 * batch * heads * slots * others, bytes_of(priority) + 2 * bytes_of(positions))


def evict_decomposition(positions: Tensor, priority: Tensor, budget: int) -> Tensor:
    """Comparisons and sums only, no sort. Where one slot more than the budget is there, the lowest goes."""
    live = positions >= 0
    known = priority.masked_fill(priority.isnan(), float("-inf"))
    if _one_goes(positions, budget):
        lowest = known.masked_fill(~live, float("inf")).amin(2, keepdim=True)
        oldest = positions.masked_fill(~live | (known > lowest), torch.iinfo(torch.int64).max).amin(2, keepdim=True)
        full = live.sum(2, keepdim=True) > budget
        return positions.masked_fill(full & (positions == oldest), -1)
    mine, other = known.unsqueeze(3), known.unsqueeze(2)  # [B, G, S, 1], [B, G, 1, S]
    later = positions.unsqueeze(2) > positions.unsqueeze(3)
    before = live.unsqueeze(2) & ((other > mine) | ((other == mine) & later))
    return positions.masked_fill(before.sum(3) >= budget, -1).contiguous()


def _one_goes(positions: Tensor, budget: int) -> bool:
    return isinstance(positions.shape[2], int) and positions.shape[2] == budget + 1


cache_evict = define(
    "cache_evict",
    "(Tensor positions, Tensor priority, int budget) -> Tensor",
    reference=evict_reference,
    shape=evict_shape,
    gradient=no_gradient("because positions are whole numbers, and which slots stay is no smooth function"),
    cost=evict_cost,
    decomposition=evict_decomposition,
)


# cached_attention: softmax(scale * q k^T) v over live slots that are not later, and the attention that each slot got


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, queries: Tensor, *, scale: float, window: int = 0, tail: int = 0
) -> tuple[Tensor, Tensor]:
    """queries [B, T]: positions of the queries, -1 where there is none; such a query gets zeros.

    window: a query sees the last `window` positions, itself included; 0: all.
    Second output, mass [B, G, S], at least float32: probabilities summed over the query heads that share a key head and
    over the queries, or over those of the last `tail` positions of their row.
    """
    attend_shape(q, k, v, positions, queries, scale=scale, window=window, tail=tail)
    wide, share = widened(q.dtype), q.shape[1] // k.shape[1]
    keys, values = (t.to(wide).repeat_interleave(share, dim=1) for t in (k, v))
    scores = torch.einsum("bhtd,bhsd->bhts", q.to(wide), keys) * scale
    seen = visible(positions, queries, window).repeat_interleave(share, dim=1)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(3)
    weights = torch.where(seen.any(3, keepdim=True), weights, 0.0)
    out = tokens_first(torch.einsum("bhts,bhse->bhte", weights, values).to(q.dtype))
    counted = weights * observed(queries, tail)[:, None, :, None]
    return out, counted.sum(2).unflatten(1, (k.shape[1], share)).sum(2)


def tokens_first(out: Tensor) -> Tensor:
    """[B, H, T, Dv] with [B, T, H, Dv] in memory; a clone, since sizes of 1 leave `contiguous` any strides."""
    return out.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def visible(positions: Tensor, queries: Tensor, window: int) -> Tensor:
    """[B, G, T, S]: whether a query sees a slot."""
    slot, query = positions.unsqueeze(2), queries[:, None, :, None]
    seen = (slot >= 0) & (slot <= query)
    return seen & (query - slot < window) if window else seen


def observed(queries: Tensor, tail: int) -> Tensor:
    """[B, T]: whether a query's attention counts."""
    there = queries >= 0
    return there & (queries > queries.amax(1, keepdim=True) - tail) if tail else there


def attend_shape(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, queries: Tensor, *, scale: float, window: int = 0, tail: int = 0
) -> tuple[Tensor, Tensor]:
    del scale
    op = "cached_attention"
    want_rank(op, "queries", queries, "BT")
    want_rank(op, "positions", positions, "BGS")
    want_whole(op, "queries", queries)
    want_whole(op, "positions", positions)
    for name, tensor, letters in (("q", q, "BHTD"), ("k", k, "BGSD"), ("v", v, "BGSE")):
        want_rank(op, name, tensor, letters)
        want_floating(op, name, tensor)
        want_equal(op, "the batch size", "q", q.shape[0], name, tensor.shape[0])
        if tensor.dtype != q.dtype:
            raise OpError(
                f"{op}: q and {name} disagree on the element type",
                facts=f"q holds {q.dtype}, {name} holds {tensor.dtype}",
                do="convert one to the other's type",
            )
    want_equal(op, "the batch size", "q", q.shape[0], "positions", positions.shape[0])
    want_equal(op, "the batch size", "q", q.shape[0], "queries", queries.shape[0])
    want_equal(op, "the number of queries", "q", q.shape[2], "queries", queries.shape[1])
    want_equal(op, "the head width", "q", q.shape[3], "k", k.shape[3])
    for name, tensor in (("v", v), ("positions", positions)):
        want_equal(op, "the number of key heads", "k", k.shape[1], name, tensor.shape[1])
        want_equal(op, "the number of slots", "k", k.shape[2], name, tensor.shape[2])
    if isinstance(q.shape[1], int) and isinstance(k.shape[1], int) and q.shape[1] % k.shape[1]:
        raise OpError(
            f"{op}: {k.shape[1]} key heads can not be shared by {q.shape[1]} query heads",
            facts=f"{q.shape[1]} is no multiple of {k.shape[1]}",
            do="give every key head the same number of query heads",
        )
    if window < 0 or tail < 0:
        raise OpError(
            f"{op}: a window or tail below zero", facts=f"window={window}, tail={tail}", do="give 0 for no limit"
        )
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)
    return out, q.new_empty(positions.shape, dtype=widened(q.dtype))


def attend_cost(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, queries: Tensor, *, scale: float, window: int = 0, tail: int = 0
) -> Cost:
    """Two products over all slots, free ones included; keys and values are read once for all heads that share them."""
    del scale, window, tail
    batch, heads, count, width = q.shape
    flops = 2 * batch * heads * count * k.shape[2] * (width + v.shape[3])
    out = batch * heads * count * v.shape[3] * q.element_size() + positions.numel() * widened(q.dtype).itemsize
    return Cost(flops, bytes_of(q, k, v, positions, queries) + out)


def attend_decomposition(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, queries: Tensor, *, scale: float, window: int = 0, tail: int = 0
) -> tuple[Tensor, Tensor]:
    """One softmax for both outputs; query heads of a group are rows of one product, so that no key is repeated."""
    wide, groups, share = widened(q.dtype), k.shape[1], q.shape[1] // k.shape[1]
    count, slots = q.shape[2], k.shape[2]
    rows = q.to(wide).reshape(q.shape[0], groups, share * count, q.shape[3])
    scores = (rows @ k.to(wide).transpose(2, 3)).view(q.shape[0], groups, share, count, slots) * scale
    seen = visible(positions, queries, window).unsqueeze(2)  # [B, G, 1, T, S]
    blind = ~seen.any(4, keepdim=True)
    weights = scores.masked_fill(~(seen | blind), float("-inf")).softmax(4).masked_fill(blind, 0.0)
    out = weights.view(q.shape[0], groups, share * count, slots) @ v.to(wide)
    out = out.view(q.shape[0], groups * share, count, v.shape[3]).to(q.dtype)
    mass = (weights * observed(queries, tail)[:, None, None, :, None]).sum((2, 3))
    return tokens_first(out), mass


cached_attention = define(
    "cached_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor queries, *, float scale, int window=0, int tail=0)"
    " -> (Tensor, Tensor)",
    reference=attend_reference,
    shape=attend_shape,
    gradient=by_vjp(attend_decomposition),
    cost=attend_cost,
    decomposition=attend_decomposition,
)
