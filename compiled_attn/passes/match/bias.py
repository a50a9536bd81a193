"""The additive mask of an attention: what happens to the scores between the product and the softmax, done to zeros.

(s * 0.25 + a).masked_fill(m, -inf) + b    ->    where(m, -inf, a) + b
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from compiled_attn.passes.match import values
from compiled_attn.passes.match.attention import Attention
from compiled_attn.passes.match.axes import Dim, Layout, flat, whole
from compiled_attn.passes.match.build import Builder
from compiled_attn.passes.match.scores import Step

aten = torch.ops.aten
REPLACED = -1e4  # a finite mask value at or below this gives weight 0 beside any score above `value + 104`


def bias_of(builder: Builder, found: Attention, groups: tuple[Dim, ...], kind: torch.dtype) -> fx.Node | None:
    """What is added to the scaled scores, as [B or 1, H or 1, N or 1, M or 1]; a boolean mask where that says it all.

    groups: the axes of B, H, N, M.  kind: dtype of q, k, v.
    """
    apart: list[Dim] = [
        dim for group in groups for dim in ([(axis,) for axis in whole(group)] if whole(group) else [()])
    ]
    bias: fx.Node | None = None
    layout: Layout = ()
    mask_alone = [s.kind for s in found.scores.steps if s.kind != "scale" and not invariant(s)] == ["mask"]
    for place, step in enumerate(found.scores.steps):
        if invariant(step):
            continue
        builder.like = step.node
        other = None
        if values.is_tensor(step.other) and (bias is not None or step.kind in ("bias", "mask")):
            other = builder.arrange(step.other, step.layout, apart, spread=False)
            term = tuple(dim if set(dim) & set(flat(step.layout)) else () for dim in apart)
            layout = tuple(a or b for a, b in zip(layout, term, strict=True)) if layout else term
        if step.kind == "mask":
            value = mask_value(found, place)
            if mask_alone and value == -math.inf and other is not None:
                bias = other if step.inverse else builder.call(aten.logical_not.default, other)
            else:
                bias = _masked(builder, bias, other, value, step.inverse)
        elif step.kind == "bias":
            bias = _added(builder, bias, other, step.number)
        elif bias is not None and bias.meta["val"].dtype is not torch.bool:
            bias = _followed(builder, bias, step, other)
    if bias is None:
        return None
    builder.like = found.scores.product.node
    bias = builder.arrange(bias, layout, groups, spread=False)
    if values.dtype(bias) not in (torch.bool, kind) and not (
        values.dtype(bias) is torch.float32 and kind in (torch.float16, torch.bfloat16)
    ):
        bias = builder.call(aten._to_copy.default, bias, dtype=kind)
    return bias


def invariant(step: Step) -> bool:
    """A number added to all scores alike, which softmax does not see."""
    return step.kind == "bias" and not values.is_tensor(step.other)


def _masked(builder: Builder, bias: Any, mask: Any, value: Any, inverse: bool) -> fx.Node:
    if bias is None:
        pair = (0.0, value) if inverse else (value, 0.0)
        return builder.call(aten.where.Scalar, mask, *pair)
    if inverse:
        return builder.call(aten.where.ScalarOther, mask, bias, value)
    return builder.call(aten.where.ScalarSelf, mask, value, bias)


def _added(builder: Builder, bias: Any, other: Any, number: float) -> fx.Node:
    if bias is None:
        return other if number == 1.0 else builder.call(aten.mul.Tensor, other, number)
    if number == 1.0:
        return builder.call(aten.add.Tensor, bias, other)
    return builder.call(aten.add.Tensor, bias, other, alpha=number)


def _followed(builder: Builder, bias: fx.Node, step: Step, other: Any) -> fx.Node:
    """What a scale, a factor or a floor behind it does to a bias."""
    if step.kind == "scale":
        return builder.call(aten.mul.Tensor, bias, step.number)
    if step.kind == "floor":
        return builder.call(aten.clamp_min.default, bias, step.number)
    op = aten.div.Tensor if step.inverse else aten.mul.Tensor
    return builder.call(op, bias, step.other if other is None else other)


def mask_value(found: Attention, place: int) -> float | None:
    """What to add where a mask replaces scores, so that the softmax stays the same; None where nothing does.

    -inf, and values so negative that adding a score leaves them, are added as they are. A value that is merely very
    negative is replaced by the most negative one, when nothing is added behind the mask.
    """
    step, later = found.scores.steps[place], found.scores.steps[place + 1 :]
    behind = math.prod(s.number for s in later if s.kind == "scale")
    if step.number == -math.inf and behind > 0:
        return step.number
    if not math.isfinite(step.number) or any(s.kind == "factor" for s in later):
        return None
    effective = step.number * behind
    if behind > 0 and step.number <= -1e30 and effective <= -1e30:
        return step.number
    if behind > 0 and effective <= REPLACED and not any(s.kind == "bias" for s in later):
        return torch.finfo(torch.float32).min / max(behind, 1.0)
    return None
