"""Local attention in one to three dimensions: windows, shifted windows, neighborhoods, halo blocks, sliding windows.

Each query at position (y, x, ...) sees the keys of its window, which local_geometry.py defines axis by axis:

    out = softmax over the window of (scale * q k + bias[head, dy + wy - 1, dx + wx - 1] + relative) v

with dy, dx the distances key - query in units of the dilation. `relative` holds logits that depend on the query
(HaloNet, BoTNet): its last dimension is one table for each axis after the other, 2 w - 1 entries each, added unscaled:
q's product with the axis's relative embeddings. With a `softcap`, s = scale * q k is bent to
softcap * tanh(s / softcap) before anything is added (Gemma 2, section 2).

Letters: B batch, H heads, Y X spatial axes (1 to 3 of them), D head width, Dv value width, w window, R = 2 w - 1
distances, G blocks, P queries of a block, K slots of a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F

from compiled_attn.ir.errors import OpError
from compiled_attn.ir.op import Cost, by_vjp, define
from compiled_attn.ops.local_geometry import BORDERS, Axis, Slots, axes_of, slots
from compiled_attn.ops.rules import bytes_of, capped, differ, want_equal, want_floating, want_softcap, widened

Tensor = torch.Tensor
Sizes = Sequence[int] | None


# local_attention: softmax over each query's window


def local_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
    *,
    window: Sequence[int],
    scale: float,
    stride: Sizes = None,
    dilation: Sizes = None,
    shift: Sizes = None,
    block: Sizes = None,
    border: str = "clamp",
    causal: Sequence[bool] | None = None,
    sinks: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Every key gathered for every query."""
    pattern = (window, stride, dilation, shift, block, border, causal, sinks)
    axes = _check(q, k, v, bias, relative, pattern, softcap)
    wide = widened(q.dtype)
    found = [slots(a, q.shape[1 + i], k.shape[1 + i], q.device, single=True) for i, a in enumerate(axes)]
    keys, values = (gathered(x.to(wide), found) for x in (k, v))  # [B, *L, H, K, D]
    scores = capped(torch.einsum("...d,...kd->...k", q.to(wide), keys) * scale, softcap)  # [B, *L, H, K]
    seen = _joined([s.seen.squeeze(1) for s in found])  # [*L, K]
    if bias is not None:
        table = bias.to(wide)
        for i, s in enumerate(found):
            table = table.index_select(1 + 2 * i, s.offset.flatten())
            table = table.unflatten(1 + 2 * i, (s.offset.shape[0], s.offset.shape[2]))
        rank = len(axes)
        order = [1 + 2 * i for i in range(rank)] + [0] + [2 + 2 * i for i in range(rank)]
        added = table.permute(order).flatten(rank + 1)  # [*L, H, K]
        scores = scores + torch.where(_tabled(found), added, 0.0)
    if relative is not None:
        scores = scores + _relative(relative.to(wide), axes, found)
    p = _softmax(scores, seen.unsqueeze(-2))
    return torch.einsum("...k,...kd->...d", p, values).to(q.dtype).contiguous()


def local_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
    *,
    window: Sequence[int],
    scale: float,
    stride: Sizes = None,
    dilation: Sizes = None,
    shift: Sizes = None,
    block: Sizes = None,
    border: str = "clamp",
    causal: Sequence[bool] | None = None,
    sinks: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    del scale
    _check(q, k, v, bias, relative, (window, stride, dilation, shift, block, border, causal, sinks), softcap)
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def local_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
    *,
    window: Sequence[int],
    scale: float,
    stride: Sizes = None,
    dilation: Sizes = None,
    shift: Sizes = None,
    block: Sizes = None,
    border: str = "clamp",
    causal: Sequence[bool] | None = None,
    sinks: int = 0,
    softcap: float = 0.0,
) -> Cost:
    """Two products with the keys of each query's window; what a border cuts off is counted."""
    del scale, softcap
    axes = axes_of(q.dim() - 3, window, stride, dilation, shift, block, border, causal, sinks)
    keys = math.prod(_seen_at_most(a, k.shape[1 + i]) for i, a in enumerate(axes))
    queries = q.numel() // q.shape[-1]
    flops = 2 * queries * keys * (q.shape[-1] + v.shape[-1])
    return Cost(flops, bytes_of(q, k, v, bias, relative) + queries * v.shape[-1] * q.element_size())


def local_decomposition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
    *,
    window: Sequence[int],
    scale: float,
    stride: Sizes = None,
    dilation: Sizes = None,
    shift: Sizes = None,
    block: Sizes = None,
    border: str = "clamp",
    causal: Sequence[bool] | None = None,
    sinks: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Batched products of blocks with their windows; where a block is one query, sums that Inductor fuses."""
    axes = axes_of(q.dim() - 3, window, stride, dilation, shift, block, border, causal, sinks)
    rank, wide = len(axes), widened(q.dtype)
    found = [slots(a, q.shape[1 + i], k.shape[1 + i], q.device) for i, a in enumerate(axes)]
    if all(a.together == 1 for a in axes):
        return _query_by_query(q, k, v, bias, relative, axes, found, scale, softcap)
    queries = _in_blocks(q, axes)  # [B, *G, H, P, D]
    keys, values = (gathered(x, found) for x in (k, v))  # [B, *G, H, K, D]
    scores = capped((queries.to(wide) @ keys.to(wide).transpose(-2, -1)) * scale, softcap)  # [B, *G, H, P, K]
    if bias is not None:
        scores = scores + torch.where(_tabled(found), _block_bias(bias.to(wide), found), 0.0)
    if relative is not None:
        logits = _in_blocks(relative.to(wide), axes)  # [B, *G, H, P, sum R]
        scores = scores + _block_relative(logits, axes, found)
    if any(_cuts(a) for a in axes):
        p = _softmax(scores, _block_seen(found).unsqueeze(rank))  # [*G, 1, P, K]
    else:
        p = torch.softmax(scores, -1)
    out = p @ values.to(wide)
    return _out_of_blocks(out.to(q.dtype), axes, q.shape[1 : 1 + rank]).contiguous()


def _query_by_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    relative: Tensor | None,
    axes: Sequence[Axis],
    found: Sequence[Slots],
    scale: float,
    softcap: float,
) -> Tensor:
    """Sums over gathered keys that Inductor fuses: the axes of the window are never joined into one."""
    rank, wide = len(axes), widened(q.dtype)
    slot_dims = list(range(-rank, 0))
    keys, values = (gathered(x, found, joined=False).to(wide) for x in (k, v))  # [B, *L, H, *w, D]
    queries = q.to(wide)[(..., *[None] * rank, slice(None))]
    scores = capped((queries * keys).sum(-1) * scale, softcap)  # [B, *L, H, *w]
    if bias is not None:
        table = bias.to(wide)
        for i, s in enumerate(found):
            at = s.offset.squeeze(1)
            table = table.index_select(1 + 2 * i, at.flatten()).unflatten(1 + 2 * i, tuple(at.shape))
        order = [1 + 2 * i for i in range(rank)] + [0] + [2 + 2 * i for i in range(rank)]
        scores = scores + torch.where(
            _tabled(found).view([s.tabled.shape[0] for s in found]), table.permute(order), 0.0
        )
    if relative is not None:
        whole = _relative(relative.to(wide), axes, found)
        scores = scores + whole.unflatten(-1, [s.index.shape[1] for s in found])
    seen = _spread([s.seen.squeeze(1) for s in found]).unsqueeze(rank)  # [*L, 1, *w]
    if any(_cuts(a) for a in axes):
        scores = scores.masked_fill(~seen, float("-inf"))
    peak = scores.amax(slot_dims, keepdim=True)
    p = torch.exp(scores - peak.masked_fill(peak == float("-inf"), 0.0))
    total = p.sum(slot_dims)
    sums = (p.unsqueeze(-1) * values).sum([d - 1 for d in slot_dims])  # [B, *L, H, Dv]
    return (sums / total.masked_fill(total == 0, 1.0).unsqueeze(-1)).to(q.dtype).contiguous()


SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? relative=None, *, int[] window, float scale, "
    "int[]? stride=None, int[]? dilation=None, int[]? shift=None, int[]? block=None, str border='clamp', "
    "bool[]? causal=None, int sinks=0, float softcap=0.0) -> Tensor"
)

# q [B, *Lq, H, D], k [B, *Lk, H, D], v [B, *Lk, H, Dv], bias [H, *R], relative [B, *Lq, H, sum of R]
# -> [B, *Lq, H, Dv] contiguous. One number for each spatial axis in window, stride, dilation, shift, block, causal.
local_attention = define(
    "local_attention",
    SCHEMA,
    reference=local_reference,
    shape=local_shape,
    gradient=by_vjp(local_decomposition),
    cost=local_cost,
    decomposition=local_decomposition,
)


def gathered(x: Tensor, found: Sequence[Slots], *, joined: bool = True) -> Tensor:
    """[B, *L, H, D] -> each block's keys, [B, *G, H, K, D]; zeros where a slot lies beyond the border.

    Not joined, the slots stay one dimension for each axis.
    """
    rank = len(found)
    for i, s in enumerate(found):
        x = x.index_select(1 + 2 * i, s.index.flatten()).unflatten(1 + 2 * i, tuple(s.index.shape))
    blocks, inside = [1 + 2 * i for i in range(rank)], [2 + 2 * i for i in range(rank)]
    x = x.permute([0, *blocks, 1 + 2 * rank, *inside, 2 + 2 * rank])  # [B, *G, H, *w, D]
    real = _spread([s.real for s in found])  # [*G, *w]
    x = torch.where(real.unsqueeze(rank).unsqueeze(-1), x, 0.0)
    return x.flatten(2 + rank, 1 + 2 * rank) if joined else x


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Conditions [G, w] of each axis -> [*G, K], which hold where all do."""
    return _spread(parts).flatten(len(parts))


def _spread(parts: Sequence[Tensor]) -> Tensor:
    """Conditions [G, w] of each axis -> [*G, *w], which hold where all do."""
    rank = len(parts)
    spread = []
    for i, part in enumerate(parts):
        shape: list[Any] = [1] * (2 * rank)
        shape[i], shape[rank + i] = part.shape
        spread.append(part.view(shape))
    return reduce(torch.logical_and, spread)


def _block_seen(found: Sequence[Slots]) -> Tensor:
    """[*G, P, K]: what every query of a block counts."""
    rank = len(found)
    spread = []
    for i, s in enumerate(found):
        shape: list[Any] = [1] * (3 * rank)
        shape[i], shape[rank + i], shape[2 * rank + i] = s.seen.shape
        spread.append(s.seen.reshape(shape))
    return reduce(torch.logical_and, spread).flatten(2 * rank).flatten(rank, 2 * rank - 1)


def _tabled(found: Sequence[Slots]) -> Tensor:
    """[K]: whether a slot takes the bias."""
    return _joined([s.tabled.view(1, -1) for s in found]).flatten()


def _block_bias(table: Tensor, found: Sequence[Slots]) -> Tensor:
    """[H, *R] -> [*G, H, P, K]."""
    rank = len(found)
    for i, s in enumerate(found):
        table = table.index_select(1 + 3 * i, s.offset.flatten()).unflatten(1 + 3 * i, tuple(s.offset.shape))
    order = [1 + 3 * i for i in range(rank)] + [0]
    order += [2 + 3 * i for i in range(rank)] + [3 + 3 * i for i in range(rank)]
    return table.permute(order).flatten(2 * rank + 1).flatten(rank + 1, 2 * rank)


def _relative(logits: Tensor, axes: Sequence[Axis], found: Sequence[Slots]) -> Tensor:
    """[B, *L, H, sum of R] -> [B, *L, H, K], for single queries."""
    rank = len(axes)
    return _block_relative(logits.unsqueeze(rank + 2), axes, found, single=True).squeeze(rank + 2)


def _block_relative(logits: Tensor, axes: Sequence[Axis], found: Sequence[Slots], *, single: bool = False) -> Tensor:
    """[B, *G, H, P, sum of R] -> [B, *G, H, P, K]: each slot's logit of every axis, summed."""
    rank = len(axes)
    together = [1 if single else a.together for a in axes]
    logits = logits.unflatten(2 + rank, together)  # [B, *G, H, *b, sum of R]
    total: Any = 0.0
    first = 0
    for i, (axis, s) in enumerate(zip(axes, found, strict=True)):
        part = logits[..., first : first + axis.offsets]
        first += axis.offsets
        shape: list[Any] = [1] * (2 * rank + 3)
        shape[1 + i], shape[2 + rank + i], shape[-1] = s.offset.shape
        index = s.offset.reshape(shape).expand(*part.shape[:-1], s.offset.shape[2])
        part = torch.where(s.tabled, part.gather(-1, index), 0.0)  # [B, *G, H, *b, w]
        slot: list[Any] = [1] * rank
        slot[i] = part.shape[-1]
        part = part.unflatten(-1, slot)
        total = total + part
    return total.flatten(2 + 2 * rank).flatten(2 + rank, 1 + 2 * rank)


def _softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Over the last dimension, of what is seen; a query that sees nothing gets zeros."""
    blind = ~seen.any(-1, keepdim=True)
    hidden = scores.masked_fill(~seen, float("-inf")).masked_fill(blind, 0.0)
    return torch.softmax(hidden, -1).masked_fill(blind, 0.0)


def _in_blocks(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """[B, *L, H, D] -> [B, *G, H, P, D], zeros where a border block has no query."""
    rank = len(axes)
    padding: list[Any] = [0, 0, 0, 0]
    for i, axis in reversed(list(enumerate(axes))):
        size = x.shape[1 + i]
        padding += [axis.lead, axis.blocks(size) * axis.together - axis.lead - size]
    if any(not isinstance(p, int) or p for p in padding):
        x = F.pad(x, padding)
    for i, axis in enumerate(axes):
        x = x.unflatten(1 + 2 * i, (x.shape[1 + 2 * i] // axis.together, axis.together))
    blocks, inside = [1 + 2 * i for i in range(rank)], [2 + 2 * i for i in range(rank)]
    return x.permute([0, *blocks, 1 + 2 * rank, *inside, 2 + 2 * rank]).flatten(2 + rank, 1 + 2 * rank)


def _out_of_blocks(x: Tensor, axes: Sequence[Axis], sizes: Sequence[Any]) -> Tensor:
    """[B, *G, H, P, D] -> [B, *L, H, D]."""
    rank = len(axes)
    x = x.unflatten(2 + rank, [a.together for a in axes])  # [B, *G, H, *b, D]
    order = [0]
    for i in range(rank):
        order += [1 + i, 2 + rank + i]
    x = x.permute([*order, 1 + rank, 2 + 2 * rank])
    for i, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
        x = x.flatten(1 + i, 2 + i).narrow(1 + i, axis.lead, size)
    return x


def _cuts(axis: Axis) -> bool:
    """Whether a query may count fewer keys than the window has slots."""
    return axis.causal or axis.border != "zero" or axis.sinks > 0


def _seen_at_most(axis: Axis, keys: Any) -> Any:
    """Keys a query sees along the axis; never more than there are, where that is a number."""
    most = axis.window + axis.sinks
    return min(most, keys) if isinstance(keys, int) and axis.border != "zero" else most


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    relative: Tensor | None,
    pattern: tuple[Any, ...],
    softcap: float,
) -> tuple[Axis, ...]:
    """The axes; raises OpError where the arguments clash."""
    op, rank = "local_attention", q.dim() - 3
    if not 1 <= rank <= 3:
        raise OpError(
            f"{op}: q has {q.dim()} dimensions",
            facts=f"it is [B, *spatial, H, D] with one to three spatial axes; this one has the shape {tuple(q.shape)}",
            do="give q as [B, X, H, D], [B, Y, X, H, D] or [B, Z, Y, X, H, D]",
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        want_floating(op, name, tensor)
        want_equal(op, "the number of dimensions", "q", q.dim(), name, tensor.dim())
        want_equal(op, "the batch size", "q", q.shape[0], name, tensor.shape[0])
        want_equal(op, "the number of heads", "q", q.shape[-2], name, tensor.shape[-2])
        want_equal(op, "the element type", "q", str(q.dtype), name, str(tensor.dtype))
    want_equal(op, "the head width", "q", q.shape[-1], "k", k.shape[-1])
    for i in range(rank):
        want_equal(op, f"the size of spatial axis {i}", "k", k.shape[1 + i], "v", v.shape[1 + i])
    check_pattern(op, rank, pattern)
    want_softcap(op, softcap)
    axes = axes_of(rank, *pattern)
    for i, axis in enumerate(axes):
        want_equal(
            op,
            f"the size of spatial axis {i} (stride {axis.stride} keys for {axis.block} queries)",
            "k",
            k.shape[1 + i] * axis.block,
            "q",
            q.shape[1 + i] * axis.stride,
        )
    if bias is not None:
        want_floating(op, "bias", bias)
        _want_shape(op, "bias", bias, (q.shape[-2], *(a.offsets for a in axes)), "[H, 2 w - 1 for each axis]")
    if relative is not None:
        want_floating(op, "relative", relative)
        wanted = (*q.shape[:-1], sum(a.offsets for a in axes))
        _want_shape(op, "relative", relative, wanted, "[B, *spatial, H, the sum of 2 w - 1 over the axes]")
    return axes


def _want_shape(op: str, name: str, tensor: Tensor, wanted: tuple[Any, ...], letters: str) -> None:
    same = tensor.dim() == len(wanted) and not any(differ(a, b) for a, b in zip(tensor.shape, wanted, strict=True))
    if not same:
        raise OpError(
            f"{op}: {name} has the shape {tuple(tensor.shape)}",
            facts=f"it is {letters}, here {wanted}",
            do=f"give {name} that shape",
        )


def check_pattern(op: str, rank: int, pattern: tuple[Any, ...]) -> None:
    """Raises OpError where window, stride, dilation, shift, block, border, causal and sinks clash."""
    window, stride, dilation, shift, block, border, causal, sinks = pattern
    named = {"window": window, "stride": stride, "dilation": dilation, "shift": shift, "block": block, "causal": causal}
    for name, values in named.items():
        if values is not None and len(values) != rank:
            raise OpError(
                f"{op}: {name} has {len(values)} numbers",
                facts=f"{name} is {list(values)}, q has {rank} spatial axes",
                do="give one number for each spatial axis",
            )
    if border not in BORDERS:
        raise OpError(
            f"{op}: there is no border {border!r}", facts=f"borders are {', '.join(BORDERS)}", do="name one of them"
        )
    for i, axis in enumerate(axes_of(rank, *pattern)):
        because = _unfit(axis)
        if because:
            raise OpError(f"{op}: spatial axis {i} has no such pattern", facts=because, do="change one of them")
    if sinks and rank > 1:
        raise OpError(f"{op}: sinks are keys of a sequence", facts=f"q has {rank} spatial axes", do="leave sinks out")


def _unfit(axis: Axis) -> str | None:
    """The two facts of a pattern that clash."""
    for name, value in (("window", axis.window), ("stride", axis.stride), ("block", axis.block)):
        if value < 1:
            return f"{name} {value} is none, it counts from 1"
    if axis.dilation < 1:
        return f"dilation {axis.dilation} is none, neighbors lie 1 apart or more"
    if axis.sinks < 0:
        return f"sinks {axis.sinks} are fewer than none"
    if axis.window < axis.stride:
        return f"window {axis.window} is shorter than stride {axis.stride}"
    if axis.stride % axis.block:
        return f"stride {axis.stride} is not a multiple of block {axis.block}"
    if not 0 <= axis.shift < axis.stride:
        return f"shift {axis.shift} does not lie in 0 to stride - 1 = {axis.stride - 1}"
    if axis.block != axis.stride and (axis.shift or axis.dilation > 1 or axis.causal):
        return f"block {axis.block} below stride {axis.stride} goes with no shift, dilation or causal axis"
    if axis.sinks and axis.dilation > 1:
        return f"sinks {axis.sinks} go with no dilation, which is {axis.dilation}"
    return None
