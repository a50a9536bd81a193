"""Mixing of each place's neighborhood by weights that are given: outlook attention, dynamic kernels.

A query at position (y, x, ...) mixes the values of its window, which local_geometry.py defines axis by axis, M times:

    out[m] = sum over the window of weights[m, slot] v[key]

Slots count the window's places in row-major order; a slot without a key adds nothing. There is no softmax: the weights
are what the model made of them. VOLO reads 9 mixes of 3x3 pixels off every second pixel (window 3, stride 2, one query
a block, zeros beyond the border); ContMix one mix of a window that moves inside at the border.

Letters: B batch, H heads, Y X spatial axes (1 to 3), M mixes, K slots of a window, Dv value width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from compiled_attn.ir.errors import OpError
from compiled_attn.ir.op import Cost, by_vjp, define
from compiled_attn.ops.local import check_pattern, gathered
from compiled_attn.ops.local_geometry import Axis, axes_of, slots
from compiled_attn.ops.rules import bytes_of, want_equal, want_floating, widened

Tensor = torch.Tensor
Sizes = Sequence[int] | None


# neighborhood_apply: per-position mixing with given weights


def neighborhood_reference(
    weights: Tensor,
    v: Tensor,
    *,
    window: Sequence[int],
    stride: Sizes = None,
    dilation: Sizes = None,
    shift: Sizes = None,
    block: Sizes = None,
    border: str = "clamp",
) -> Tensor:
    """Every value gathered for every query."""
    axes = _check(weights, v, window, stride, dilation, shift, block, border)
    wide = widened(v.dtype)
    found = [slots(a, weights.shape[1 + i], v.shape[1 + i], v.device, single=True) for i, a in enumerate(axes)]
    values = gathered(v.to(wide), found)  # [B, *L, H, K, Dv]
    out = torch.einsum("...mk,...kd->...md", weights.to(wide), values)
    return out.to(v.dtype).contiguous()


def neighborhood_shape(
    weights: Tensor,
    v: Tensor,
    *,
    window: Sequence[int],
    stride: Sizes = None,
    dilation: Sizes = None,
    shift: Sizes = None,
    block: Sizes = None,
    border: str = "clamp",
) -> Tensor:
    _check(weights, v, window, stride, dilation, shift, block, border)
    return v.new_empty((*weights.shape[:-1], v.shape[-1]))


def neighborhood_cost(
    weights: Tensor,
    v: Tensor,
    *,
    window: Sequence[int],
    stride: Sizes = None,
    dilation: Sizes = None,
    shift: Sizes = None,
    block: Sizes = None,
    border: str = "clamp",
) -> Cost:
    """One product with the values of each window; slots without a key are counted."""
    del window, stride, dilation, shift, block, border
    mixes = weights.numel() // weights.shape[-1] * v.shape[-1]
    return Cost(2 * weights.numel() * v.shape[-1], bytes_of(weights, v) + mixes * v.element_size())


def neighborhood_decomposition(
    weights: Tensor,
    v: Tensor,
    *,
    window: Sequence[int],
    stride: Sizes = None,
    dilation: Sizes = None,
    shift: Sizes = None,
    block: Sizes = None,
    border: str = "clamp",
) -> Tensor:
    """Batched products of weights with gathered windows; one mix a place is a sum that Inductor fuses."""
    axes = _check(weights, v, window, stride, dilation, shift, block, border)
    wide, rank = widened(v.dtype), v.dim() - 3
    found = [slots(a, weights.shape[1 + i], v.shape[1 + i], v.device, single=True) for i, a in enumerate(axes)]
    if weights.shape[-2] != 1:
        return (weights.to(wide) @ gathered(v, found).to(wide)).to(v.dtype).contiguous()
    values = gathered(v, found, joined=False).to(wide)  # [B, *L, H, *w, Dv]
    spread = weights.to(wide).squeeze(-2).unflatten(-1, [a.window for a in axes]).unsqueeze(-1)
    return (spread * values).sum(list(range(-rank - 1, -1))).unsqueeze(-2).to(v.dtype).contiguous()


SCHEMA = (
    "(Tensor weights, Tensor v, *, int[] window, int[]? stride=None, int[]? dilation=None, int[]? shift=None, "
    "int[]? block=None, str border='clamp') -> Tensor"
)

# weights [B, *Lq, H, M, K], v [B, *Lk, H, Dv] -> [B, *Lq, H, M, Dv] contiguous. One number for each spatial axis in
# window (K is their product), stride, dilation, shift, block; Lk = Lq / block * stride.
neighborhood_apply = define(
    "neighborhood_apply",
    SCHEMA,
    reference=neighborhood_reference,
    shape=neighborhood_shape,
    gradient=by_vjp(neighborhood_decomposition),
    cost=neighborhood_cost,
    decomposition=neighborhood_decomposition,
)


def _check(
    weights: Tensor,
    v: Tensor,
    window: Sequence[int],
    stride: Sizes,
    dilation: Sizes,
    shift: Sizes,
    block: Sizes,
    border: str,
) -> tuple[Axis, ...]:
    """The axes; raises OpError where the arguments clash."""
    op, rank = "neighborhood_apply", v.dim() - 3
    if not 1 <= rank <= 3:
        raise OpError(
            f"{op}: v has {v.dim()} dimensions",
            facts=f"it is [B, *spatial, H, Dv] with one to three spatial axes; this one has the shape {tuple(v.shape)}",
            do="give v as [B, X, H, Dv], [B, Y, X, H, Dv] or [B, Z, Y, X, H, Dv]",
        )
    want_floating(op, "weights", weights)
    want_floating(op, "v", v)
    want_equal(op, "the number of dimensions (weights have one more)", "v", v.dim() + 1, "weights", weights.dim())
    want_equal(op, "the batch size", "weights", weights.shape[0], "v", v.shape[0])
    want_equal(op, "the number of heads", "weights", weights.shape[-3], "v", v.shape[-2])
    want_equal(op, "the element type", "weights", str(weights.dtype), "v", str(v.dtype))
    check_pattern(op, rank, (window, stride, dilation, shift, block, border, None, 0))
    want_equal(op, f"the slots of a window {list(window)}", "window", math.prod(window), "weights", weights.shape[-1])
    axes = axes_of(rank, window, stride, dilation, shift, block, border)
    for i, axis in enumerate(axes):
        ratio = f"(stride {axis.stride} values for {axis.block} queries)"
        sizes: tuple[Any, Any] = (v.shape[1 + i] * axis.block, weights.shape[1 + i] * axis.stride)
        want_equal(op, f"the size of spatial axis {i} {ratio}", "v", sizes[0], "weights", sizes[1])
    return axes
