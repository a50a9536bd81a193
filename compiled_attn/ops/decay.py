"""Attention whose heads reach as far as their decay lets them: softmax or retention, along some axes of a map.

Every pair of places, d steps apart (Manhattan distance over the axes that attention goes along), of head h:

    softmax:    out = softmax over keys of (scale * q k + decay[h] d) v
    retention:  out = (scale * q k exp(decay[h] d)) v, summed over keys

Axes that attention does not go along are as good as batch: RMT goes along rows, then along columns, then over both
(Fan et al., CVPR 2024, equations 4 and 5). Retention along one causal axis is RetNet's parallel form.

Letters: B batch, H heads, Y X spatial axes (1 to 3), D head width, Dv value width, N places attended over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from compiled_attn.ir.errors import OpError
from compiled_attn.ir.op import Cost, by_vjp, define
from compiled_attn.ops.rules import bytes_of, differ, want_equal, want_floating, widened

Tensor = torch.Tensor
Axes = Sequence[int] | None


# decay_attention: all pairs along some axes, weighed by distance


def decay_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float,
    along: Axes = None,
    softmax: bool = True,
    causal: bool = False,
) -> Tensor:
    """Every pair's weight, key by key, as the equation says."""
    axes = _check(q, k, v, decay, along, causal)
    wide, kind, sizes = widened(q.dtype), q.dtype, [q.shape[1 + a] for a in axes]
    q, k, v = (_places(x.to(wide), axes) for x in (q, k, v))
    steps = distances(sizes, q.device)
    scores = torch.einsum("...nd,...md->...nm", q, k) * scale
    weight = decay.to(wide)[:, None, None] * steps
    hidden = torch.ones_like(steps).triu(1).bool() & causal
    p = torch.softmax((scores + weight).masked_fill(hidden, -math.inf), -1) if softmax else scores * weight.exp()
    out = torch.einsum("...nm,...md->...nd", p.masked_fill(hidden, 0.0), v)
    return _map(out, axes, sizes).to(kind).contiguous()


def decay_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float,
    along: Axes = None,
    softmax: bool = True,
    causal: bool = False,
) -> Tensor:
    del scale, softmax
    _check(q, k, v, decay, along, causal)
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def decay_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float,
    along: Axes = None,
    softmax: bool = True,
    causal: bool = False,
) -> Cost:
    """Two products over all places along the axes; a causal axis counts in full."""
    del scale, softmax, causal
    queries = q.numel() // q.shape[-1]
    places = math.prod(q.shape[1 + a] for a in along_of(q, along))
    flops = 2 * queries * places * (q.shape[-1] + v.shape[-1])
    return Cost(flops, bytes_of(q, k, v, decay) + queries * v.shape[-1] * q.element_size())


def decay_decomposition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float,
    along: Axes = None,
    softmax: bool = True,
    causal: bool = False,
) -> Tensor:
    """Batched products of the heads' places."""
    axes = _check(q, k, v, decay, along, causal)
    wide, kind, sizes = widened(q.dtype), q.dtype, [q.shape[1 + a] for a in axes]
    q, k, v = (_places(x, axes).to(wide) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) * scale
    bias = decay_bias(decay.to(wide), sizes, causal)
    p = torch.softmax(scores + bias, -1) if softmax else scores * bias.exp()
    return _map((p @ v).to(kind), axes, sizes).contiguous()


def decay_bias(decay: Tensor, sizes: Sequence[Any], causal: bool) -> Tensor:
    """[H, N, N]: decay times distance, minus infinity for keys behind the query where `causal`."""
    steps = distances(sizes, decay.device)
    bias = decay[:, None, None] * steps
    return bias.masked_fill(torch.ones_like(steps).triu(1).bool(), -math.inf) if causal else bias


SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor decay, *, float scale, int[]? along=None, bool softmax=True, "
    "bool causal=False) -> Tensor"
)

# q, k [B, *L, H, D], v [B, *L, H, Dv], decay [H] per step, below 0 -> [B, *L, H, Dv] contiguous. along: numbers of the
# spatial axes that attention goes along, all of them by default; causal: of one axis.
decay_attention = define(
    "decay_attention",
    SCHEMA,
    reference=decay_reference,
    shape=decay_shape,
    gradient=by_vjp(decay_decomposition),
    cost=decay_cost,
    decomposition=decay_decomposition,
)


def distances(sizes: Sequence[Any], device: torch.device) -> Tensor:
    """Steps between every two places of a map of these sizes, [N, N], in row-major order."""
    total = torch.zeros(1, 1, dtype=torch.long, device=device)
    for size in sizes:
        at = torch.arange(size, device=device)
        total = (total[:, None, :, None] + (at[:, None] - at).abs()[:, None]).flatten(2).flatten(0, 1)
    return total


def _places(x: Tensor, axes: Sequence[int]) -> Tensor:
    """[B, *L, H, D] -> [B, *rest, H, N, D]."""
    count = len(axes)
    return x.movedim([1 + a for a in axes], list(range(-1 - count, -1))).flatten(-1 - count, -2)


def _map(x: Tensor, axes: Sequence[int], sizes: Sequence[Any]) -> Tensor:
    """The inverse of `_places`."""
    count = len(axes)
    return x.unflatten(-2, list(sizes)).movedim(list(range(-1 - count, -1)), [1 + a for a in axes])


def along_of(q: Tensor, along: Axes) -> list[int]:
    """The spatial axes that attention goes along."""
    return list(range(q.dim() - 3)) if along is None else list(along)


def _check(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, along: Axes, causal: bool) -> list[int]:
    """The axes of attention; raises OpError where the arguments clash."""
    op, rank = "decay_attention", q.dim() - 3
    if not 1 <= rank <= 3:
        raise OpError(
            f"{op}: q has {q.dim()} dimensions",
            facts=f"it is [B, *spatial, H, D] with one to three spatial axes; this one has the shape {tuple(q.shape)}",
            do="give q as [B, X, H, D], [B, Y, X, H, D] or [B, Z, Y, X, H, D]",
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        want_floating(op, name, tensor)
        want_equal(op, "the number of dimensions", "q", q.dim(), name, tensor.dim())
        want_equal(op, "the element type", "q", str(q.dtype), name, str(tensor.dtype))
        for i in range(q.dim() - 1):
            want_equal(op, f"the size of dimension {i}", "q", q.shape[i], name, tensor.shape[i])
    want_equal(op, "the head width", "q", q.shape[-1], "k", k.shape[-1])
    want_floating(op, "decay", decay)
    if decay.dim() != 1 or differ(decay.shape[0], q.shape[-2]):
        raise OpError(
            f"{op}: decay has the shape {tuple(decay.shape)}",
            facts=f"it holds a number for each of the {q.shape[-2]} heads",
            do="give decay as [H]",
        )
    axes = along_of(q, along)
    if not axes or axes != sorted(set(axes)) or not all(0 <= a < rank for a in axes):
        raise OpError(
            f"{op}: along is {axes}", facts=f"q has {rank} spatial axes, numbered from 0", do="name them in order, once"
        )
    if causal and len(axes) > 1:
        raise OpError(
            f"{op}: it is causal along {len(axes)} axes", facts="a causal axis is one", do="give along one axis"
        )
    return axes
