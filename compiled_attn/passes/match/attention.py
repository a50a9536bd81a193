"""Finds softmax(q k^T * scale + bias) v by dataflow: from a softmax up to the scores and down to the product with v.

softmax --climb--> steps (scale, bias, mask, cast, view) --> product of q and k
        --descend--> steps (cast, view, dropout, scale)  --> product with v
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import fx

from compiled_attn.ir.program import Program
from compiled_attn.ir.text import type_text
from compiled_attn.passes.match import values
from compiled_attn.passes.match.axes import Axis, Dim, Layout, flat, fresh, shape, whole
from compiled_attn.passes.match.probabilities import Mixed, descend, reached
from compiled_attn.passes.match.products import contraction, place_left_right, place_other_out
from compiled_attn.passes.match.scores import Decline, Scores, climb
from compiled_attn.passes.match.softmax import Softmax

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """One matched attention. Layouts are in shared axes; keys, queries, depth and width are the axes of N, M, D, Dv."""

    softmax: Softmax
    scores: Scores
    mixed: Mixed
    q: tuple[fx.Node, Layout]
    k: tuple[fx.Node, Layout]
    v: tuple[fx.Node, Layout]
    out: Layout
    queries: Dim
    keys: Dim
    depth: Dim
    width: Dim
    batch: Dim


def match(program: Program, found: Softmax) -> Attention | Decline | None:
    """The attention around a softmax; a Decline where it goes into a product but a guard fails; None otherwise."""
    if not reached(found.node):
        return None
    layout = fresh(shape(found.node))
    found = replace(found, keys=layout[found.dim])
    mixed = descend(program, found.node, layout)
    scores = climb(program, found, found.scores, layout)
    if isinstance(scores, Decline):
        return scores
    if isinstance(mixed, Decline):
        return mixed
    leak = _leak(found, scores)
    if leak is not None:
        return leak
    return _assemble(found, scores, mixed, layout)


def _assemble(found: Softmax, scores: Scores, mixed: Mixed, layout: Layout) -> Attention | Decline:
    qk, pv = scores.product, mixed.product
    left, right = place_left_right(qk, scores.layout)
    v, v_layout, out = place_other_out(pv, mixed.factor, mixed.layout)
    keys, summed = whole(found.keys), contraction(pv, mixed.factor, mixed.layout)
    if set(keys) != set(summed):
        return Decline(
            found.node,
            f"{found.node.name} normalises over dimension {found.dim} of {_type(found.node)}, "
            f"but {pv.node.name} sums over another",
        )
    in_left, in_right = set(flat(left)), set(flat(right))
    if not set(keys) <= in_left ^ in_right:
        return Decline(
            found.node, f"the keys that {found.node.name} runs over are not those of one factor of {qk.node.name}"
        )
    keys_are_right = set(keys) <= in_right
    q, k = ((qk.left, left), (qk.right, right))[:: 1 if keys_are_right else -1]
    own_q, own_k = (in_left - in_right, in_right - in_left)[:: 1 if keys_are_right else -1]
    if not set(keys) <= own_k:
        return Decline(found.node, f"the keys of {found.node.name} lie in both factors of {qk.node.name}")
    everything = flat(layout)
    depth = whole([a for a in flat(q[1]) if a not in set(flat(scores.layout))])
    width = whole([a for a in flat(v_layout) if a not in set(everything)])
    queries = _queries(scores, own_q - set(flat(v_layout)))
    batch = tuple(a for a in everything if a not in set(keys) and a not in set(queries))
    extra = tuple(a for a in width if a in set(flat(out)))
    lone = [a for a in width if a not in set(extra)]
    if lone:
        return Decline(pv.node, f"{pv.node.name} sums over more than the keys")
    return Attention(found, scores, mixed, q, k, (v, v_layout), out, queries, keys, depth, width, batch)


def _queries(scores: Scores, own: set[Axis]) -> Dim:
    """The axes of the last dimension of the scores that only q has; others that only q has count as batch."""
    for dim in reversed(scores.layout):
        axes = whole(dim)
        if axes and set(axes) <= own:
            return axes
    return ()


def _leak(found: Softmax, scores: Scores) -> Decline | None:
    """Someone outside who reads the scores, which would then have to be made all the same."""
    inside = {found.node, *found.inner, *scores.path}
    for node in (*scores.path, *found.inner):
        for user in values.readers(node):
            if user not in inside and user.target is not operator.getitem:
                name = "the output" if user.op == "output" else user.name
                return Decline(node, f"the scores {node.name} are also read by {name}")
    return None


def _type(node: fx.Node) -> str:
    return type_text(node.meta["val"])
