"""Raises softmax(q k^T * scale + bias) v, however it is written, to one scaled_dot_product_attention.

    s = matmul(q * 0.125, k.transpose(-2, -1))          o = scaled_dot_product_attention(
    p = softmax(s + bias, -1)                     ->            q, k, v, bias, 0.0, False, scale=0.125)
    o = matmul(dropout(p), v)

Scores capped by tanh, which torch's operator does not know, make it the vocabulary's attention(..., softcap=50.0).
q, k, v become [B, H, N, D] views of the projections. What is recognised is dataflow alone: where axes come from, not
what modules or nodes are called. Never raised: probabilities or scores that something else reads, anything but scaling,
capping, adding and masking between the products, a softmax over another axis than the one that the product with v sums
over. A row that a -inf mask hides whole gives 0, where softmax gives NaN; the note says where that can happen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from compiled_attn import ops
from compiled_attn.ir import _torch
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.ir.text import target_text, type_text
from compiled_attn.passes.match import values
from compiled_attn.passes.match.attention import Attention, match
from compiled_attn.passes.match.axes import Dim, Layout, below, flat, is_layout_op, settled, whole
from compiled_attn.passes.match.bias import bias_of, invariant, mask_value
from compiled_attn.passes.match.build import Builder, Source, UnknownSizeError, cost, sources
from compiled_attn.passes.match.probabilities import reached
from compiled_attn.passes.match.scores import Decline, Step
from compiled_attn.passes.match.softmax import softmax

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class RaiseAttention:
    """Every attention of the program as one node."""

    name: ClassVar[str] = "raise-attention"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        edit = program.edit()
        raised = 0
        for node in list(edit.graph.nodes):
            found = softmax(node) if node.op == "call_function" else None
            if found is None:
                continue
            matched = match(program, found)
            if isinstance(matched, Attention):
                matched = raise_one(edit, matched, notes) or matched
            if isinstance(matched, Decline):
                notes.miss(node, self.name, matched.because)
            raised += isinstance(matched, Attention)
        if not raised:
            return program
        if program.mode == "inference":
            for node in edit.graph.nodes:
                if node.target is aten.view.default:  # what it views may now lie in another memory order
                    node.target = aten.reshape.default
        return edit.finish(self.name)


def attention_blocks(program: Program) -> tuple[list[fx.Node], list[fx.Node]]:
    """Attention in a program: single nodes, and products that a softmax's result goes into (each once)."""
    present = [n for n in program.graph.nodes if n.target in (SDPA, ops.attention.overload)]
    written: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        found = softmax(node) if node.op == "call_function" else None
        if found is not None:
            written.update(dict.fromkeys(reached(found.node)[:1]))
    return present, list(written)


@dataclass(frozen=True)
class Plan:
    """The dimensions B, H, N, M, D, Dv of an attention as axes, where q, k, v are read, and where the result goes."""

    batch: Dim
    heads: Dim
    queries: Dim
    keys: Dim
    q: Source
    k: Source
    v: Source
    out: fx.Node
    out_layout: Layout
    scale: float
    softcap: float
    factors: tuple[Step, ...]
    condition: str


def raise_one(edit: Edit, found: Attention, notes: Notes) -> Decline | None:
    """Rewrites one matched attention in the edit; a Decline, and no change, where a guard fails."""
    pv = found.mixed.product.node
    writer = _written_between(found.scores.product.node, pv)
    if writer is not None:
        return Decline(writer, f"{writer.name} writes in place between {found.scores.product.node.name} and {pv.name}")
    plan = plan_for(edit, found)
    if isinstance(plan, Decline):
        return plan
    builder = Builder(edit, found.softmax.node, _sizes_before(edit, pv))
    for node in (plan.q.node, plan.k.node, plan.v.node, found.softmax.node, pv):
        builder.know(node)
    try:
        with edit.graph.inserting_before(pv):
            result = _build(builder, found, plan)
    except UnknownSizeError as error:
        return Decline(pv, f"no node holds the size {error} that {pv.name} needs")
    edit.replace(plan.out, result)
    for node in (*found.mixed.path, *reversed(found.scores.path), *found.softmax.inner):
        values.erase_checks(node)
    notes.did(result, RaiseAttention.name, _formula(found, plan), plan.condition)
    return None


def _written_between(first: fx.Node, last: fx.Node) -> fx.Node | None:
    """A node between two others that writes in place: q and k would be read behind it instead of before."""
    node = first.next
    while node is not last and node.op != "root":
        if values.writes_in_place(node):
            return node
        node = node.next
    return None


def plan_for(edit: Edit, found: Attention) -> Plan | Decline:
    kind = values.dtype(found.v[0])
    q_options = sources(edit, *found.q, multiplied=True)
    k_options = sources(edit, *found.k, multiplied=True)
    v_options = sources(edit, *found.v, multiplied=False)
    out_options = _rearranged(found)
    batch, heads = _batch_and_heads(found)  # after the walks above, which split flattened axes
    rows = (batch, heads, found.queries, found.depth)
    columns = (batch, heads, found.keys, found.depth)
    valued = (batch, heads, found.keys, found.width)
    q, k, v = _best(q_options, rows, kind), _best(k_options, columns, kind), _best(v_options, valued, kind)
    pv, qk = found.mixed.product.node, found.scores.product.node
    if q is None or k is None or v is None:
        return Decline(pv, f"{qk.name} is {_type(found.q[0])} while v is {_type(found.v[0])}")
    declined = _uncapped(edit.program, found)
    if declined is not None:
        return declined
    scale, softcap = q.scale * k.scale, 0.0
    factors = []
    for place, step in enumerate(found.scores.steps):
        if step.kind == "scale":
            scale *= step.number
            softcap *= abs(step.number)
        elif step.kind == "cap":
            softcap = 1.0
        elif step.kind == "factor":
            if set(flat(step.layout)) & set(whole(found.keys)) and set(flat(step.layout)) & set(whole(found.queries)):
                return Decline(step.node, f"{step.node.name} multiplies each score by a factor of its own")
            factors.append(step)
        elif step.kind == "mask" and mask_value(found, place) is None:
            return Decline(
                step.node, f"{step.node.name} replaces scores by {step.number:g}, which no additive mask states"
            )
    if not math.isfinite(scale) or not math.isfinite(softcap):
        return Decline(qk, f"the scores {qk.name} are scaled by {scale}")
    wanted = [whole(dim) for dim in (batch, heads, found.queries, found.width)]
    out, out_layout = next((o for o in out_options if list(settled(o[1])) == wanted), out_options[0])
    condition = _condition(found)
    return Plan(
        batch, heads, found.queries, found.keys, q, k, v, out, out_layout, scale, softcap, tuple(factors), condition
    )


def _uncapped(program: Program, found: Attention) -> Decline | None:
    """Why a tanh over the scores is no soft cap that the op states; None where it is, or there is none."""
    steps = found.scores.steps
    cap = next((i for i, step in enumerate(steps) if step.kind == "cap"), None)
    if cap is None:
        return None
    node, before, behind = steps[cap].node, steps[:cap], steps[cap + 1 :]
    name = f"{node.name} ({target_text(node.target)})"
    if any(step.kind not in ("scale", "factor") for step in before) or any(s.kind in ("cap", "factor") for s in behind):
        return Decline(node, f"{name} bends more than the scaled scores, or its result is scaled by a tensor")
    if any(step.kind == "scale" and step.number == 0 for step in behind):
        return Decline(node, f"{name} is multiplied by 0")
    if program.mode != "inference" or found.mixed.dropout:
        return Decline(node, f"{name} stands between the scores and {found.softmax.node.name} of a model in training")
    return None


def _batch_and_heads(found: Attention) -> tuple[Dim, Dim]:
    """Batch and heads: the last axis but one stays batch when there are several; one axis alone is the batch."""
    axes = whole(found.batch)
    return (axes[:-1], axes[-1:]) if len(axes) > 1 else (axes, ())


def _best(options: list[Source], dims: tuple[Dim, ...], kind: torch.dtype) -> Source | None:
    """The tensor of dtype `kind` from which a factor is made with the fewest copies, the furthest up of equals."""
    fitting = [s for s in options if values.dtype(s.node) == kind]
    return min(reversed(fitting), key=lambda s: cost(s, dims), default=None)


def _rearranged(found: Attention) -> list[tuple[fx.Node, Layout]]:
    """The product with v, and the rearrangements of it alone that follow, any of which the result may stand for."""
    node, layout = found.mixed.product.node, found.out
    options = [(node, layout)]
    while len(users := values.readers(node)) == 1 and is_layout_op(users[0]) and users[0].args[0] is node:
        node = users[0]
        down = below(node, layout)
        if down is None or values.dtype(node) != values.dtype(found.mixed.product.node):
            break
        layout = down
        options.append((node, layout))
    return options


def _condition(found: Attention) -> str:
    """What the equality rests on besides rounding."""
    masks = [s.number for s in found.scores.steps if s.kind == "mask"]
    said = []
    if -math.inf in masks:
        said.append("a row masked whole gives 0 (softmax: NaN)")
    replaced = [n for n in masks if math.isfinite(n) and n > -1e30]
    if replaced:
        said.append(f"each row keeps a score above {max(replaced) + 104:g} or is masked whole")
    return "; ".join(said)


def _build(builder: Builder, found: Attention, plan: Plan) -> fx.Node:
    b, h, n, m = plan.batch, plan.heads, plan.queries, plan.keys
    builder.like = found.scores.product.node
    q = builder.arrange(plan.q.node, plan.q.layout, (b, h, n, found.depth))
    k = builder.arrange(plan.k.node, plan.k.layout, (b, h, m, found.depth))
    scale = plan.scale
    for step in plan.factors:
        q, k = _apply_factor(builder, plan, step, q, k)
    if scale <= 0:
        q, scale = builder.call(aten.mul.Tensor, q, scale), 1.0
    bias = bias_of(builder, found, (b, h, n, m), values.dtype(q))
    builder.like = found.mixed.product.node
    v = builder.arrange(plan.v.node, plan.v.layout, (b, h, m, found.width))
    if plan.softcap:
        result = builder.call(ops.attention.overload, q, k, v, bias, scale=scale, softcap=plan.softcap)
    else:
        result = builder.call(SDPA, q, k, v, bias, found.mixed.dropout, False, scale=scale)
    if found.mixed.scale != 1.0:
        result = builder.call(aten.mul.Tensor, result, found.mixed.scale)
    result = builder.arrange(result, (b, h, n, found.width), plan.out_layout)
    if values.dtype(result) != values.dtype(plan.out):
        result = builder.call(aten._to_copy.default, result, dtype=values.dtype(plan.out))
    return result


def _apply_factor(builder: Builder, plan: Plan, step: Step, q: fx.Node, k: fx.Node) -> tuple[fx.Node, fx.Node]:
    """A factor of the scores on q, or on k where it differs by key."""
    op = aten.div.Tensor if step.inverse else aten.mul.Tensor
    if not values.is_tensor(step.other):
        return builder.call(op, q, step.other), k
    on_keys = bool(set(flat(step.layout)) & set(whole(plan.keys)))
    rows = plan.keys if on_keys else plan.queries
    factor = builder.arrange(step.other, step.layout, (plan.batch, plan.heads, rows, ()), spread=False)
    side = k if on_keys else q
    made = builder.call(op, side, factor)
    if values.dtype(made) != values.dtype(side):
        made = builder.call(aten._to_copy.default, made, dtype=values.dtype(side))
    return (q, made) if on_keys else (made, k)


def _sizes_before(edit: Edit, end: fx.Node) -> dict[str, fx.Node]:
    """Nodes that hold symbolic sizes, by expression, among those that run before `end`."""
    found: dict[str, fx.Node] = {}
    for node in edit.graph.nodes:
        if node is end:
            break
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            found.setdefault(str(_torch.expression(value)), node)
    return found


def _formula(found: Attention, plan: Plan) -> str:
    kinds = {s.kind for s in found.scores.steps if not invariant(s)}
    scale = f" * {plan.scale:.6g}" if plan.scale != 1.0 else ""
    factor = " * factor" if "factor" in kinds else ""
    factor += f" capped at {plan.softcap:g}" if plan.softcap else ""
    bias = " + bias" if "bias" in kinds else ""
    mask = ", masked" if "mask" in kinds else ""
    kept = f"dropout({found.mixed.dropout:g}) " if found.mixed.dropout else ""
    after = f" * {found.mixed.scale:g}" if found.mixed.scale != 1.0 else ""
    return f"{kept}softmax(q k^T{scale}{factor}{bias}{mask}) v{after}"


def _type(node: fx.Node) -> str:
    return type_text(node.meta["val"])
