"""Finds softmax(q k^T * scale + bias) v by its dataflow: from a softmax up to the scores and down to the product with v.

    softmax --climb--> steps (scale, bias, mask, cast, view) --> product of q and k
            --descend--> steps (cast, view, dropout, scale)  --> product with v
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from compiled_attn.ir.program import Program
from compiled_attn.ir.text import target_text, type_text
from compiled_attn.passes.match import values
from compiled_attn.passes.match.axes import (
    Axis,
    Dim,
    Layout,
    above,
    below,
    broadcast,
    flat,
    fresh,
    is_layout_op,
    shape,
    whole,
)
from compiled_attn.passes.match.products import (
    Product,
    contraction,
    place_left_right,
    place_other_out,
    product,
    read_by,
)

aten = torch.ops.aten

MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar}
DIVIDE = {aten.div.Tensor, aten.div.Scalar}
ADD = {aten.add.Tensor, aten.add.Scalar}
SUBTRACT = {aten.sub.Tensor, aten.sub.Scalar}
FILL = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
FLOOR = {aten.clamp_min.default, aten.clamp.default, aten.maximum.default, aten.max.other}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.einsum.default}
CARRIERS = {
    *MULTIPLY, *DIVIDE, *ADD, *SUBTRACT, *FILL, *WHERE, *FLOOR,
    aten.dropout.default, aten.native_dropout.default, operator.getitem, aten.nan_to_num.default,
    aten.cat.default, aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.conv2d.default, aten.relu.default,
}  # fmt: skip
SEARCH = 24  # nodes looked at for what a near miss should have been


@dataclass(frozen=True)
class Decline:
    """Why a softmax is not raised: the node that stands in the way, and a sentence that names it."""

    node: fx.Node
    because: str
    depth: int = 0


@dataclass(frozen=True)
class Softmax:
    """A softmax, in one op or written by hand. inner: the nodes between `scores` and `node` that are part of it.
    keys: the axes that it runs over, once a match has named them."""

    node: fx.Node
    scores: fx.Node
    dim: int
    inner: frozenset[fx.Node] = frozenset()
    keys: Dim = ()


@dataclass(frozen=True)
class Step:
    """What is done to the scores on their way to the softmax, with the layout of the other operand.

    scale: times `number`.  factor: times (or, inverse, by) tensor `other`.  bias: plus `number` times `other`.
    mask: `number` where `other` (or, inverse, where not).  floor: at least `number`.
    """

    kind: Literal["scale", "factor", "bias", "mask", "floor"]
    node: fx.Node
    number: float = 1.0
    other: Any = None
    layout: Layout = ()
    inverse: bool = False


@dataclass(frozen=True)
class Scores:
    """The product under a softmax, the layout of its result, and the steps from it to the softmax, first done first."""

    product: Product
    layout: Layout
    steps: tuple[Step, ...]
    path: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Mixed:
    """The product with v above which the probabilities go, with what happened to them on the way."""

    product: Product
    factor: fx.Node
    layout: Layout
    dropout: float
    scale: float
    path: tuple[fx.Node, ...]


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


def softmax(program: Program, node: fx.Node) -> Softmax | None:
    """The softmax whose result `node` is: one op, or exp(x - max x) / sum of it."""
    if node.target in (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default):
        source, dim = node.args[0], node.args[1]
        if isinstance(source, fx.Node) and isinstance(dim, int):
            return Softmax(node, source, values.normal_dim(dim, len(shape(source))))
        return None
    if node.target is aten.div.Tensor and values.is_tensor(node.args[0]) and values.is_tensor(node.args[1]):
        return _by_hand(node)
    return None


def _by_hand(node: fx.Node) -> Softmax | None:
    top, below_line = node.args
    if not isinstance(top, fx.Node) or not isinstance(below_line, fx.Node) or top.target is not aten.exp.default:
        return None
    total = below_line
    while total.target in (aten.expand.default, aten.clone.default) and isinstance(total.args[0], fx.Node):
        total = total.args[0]
    dim = _reduced(total, aten.sum.dim_IntList, top)
    shifted = top.args[0]
    if dim is None or not isinstance(shifted, fx.Node):
        return None
    inner = {top, below_line, total}
    if shifted.target is aten.sub.Tensor and shifted.kwargs.get("alpha", 1) == 1:
        scores, largest = shifted.args
        chain = _largest(largest, scores, dim)
        if isinstance(scores, fx.Node) and chain is not None:
            return Softmax(node, scores, dim, frozenset(inner | {shifted} | chain))
    return Softmax(node, shifted, dim, frozenset(inner))


def _reduced(node: fx.Node, target: Any, source: Any) -> int | None:
    """The one dimension that a reduction of `source` with keepdim runs over."""
    if node.target is not target or node.args[0] is not source:
        return None
    dims = values.argument(node, 1, "dim", None)
    keep = values.argument(node, 2, "keepdim", False)
    if isinstance(dims, int):
        dims = [dims]
    if not keep or not dims or len(dims) != 1:
        return None
    return values.normal_dim(dims[0], len(shape(source)))


def _largest(node: Any, scores: Any, dim: int) -> set[fx.Node] | None:
    """The nodes that take the largest of `scores` along `dim`."""
    chain: set[fx.Node] = set()
    while isinstance(node, fx.Node) and node.target in (
        aten.detach.default, aten.clone.default, aten.expand.default, aten.alias.default, operator.getitem
    ):  # fmt: skip
        if node.target is operator.getitem and node.args[1] != 0:
            return None
        chain.add(node)
        node = node.args[0]
    for target in (aten.amax.default, aten.max.dim):
        if isinstance(node, fx.Node) and _reduced(node, target, scores) == dim:
            return chain | {node}
    return None


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
        return Decline(found.node, f"the keys that {found.node.name} runs over are not those of one factor of {qk.node.name}")
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


def climb(program: Program, found: Softmax, node: fx.Node, layout: Layout, depth: int = 0) -> Scores | Decline:
    """From the softmax's input up to the product of q and k."""
    own = product(node)
    if own is not None:
        if own.addend is None or not isinstance(own.addend, fx.Node):
            scale = () if own.alpha == 1.0 else (Step("scale", node, own.alpha),)
            return Scores(own, layout, scale, (node,))
        steps = [Step("scale", node, own.alpha)] if own.alpha != 1.0 else []
        steps.append(Step("bias", node, own.beta, own.addend, broadcast(layout, shape(own.addend))))
        return Scores(own, layout, tuple(steps), (node,))
    if node.op != "call_function":
        return Decline(node, f"{found.node.name} reads {node.name}: no product of queries and keys lies above", depth)
    if is_layout_op(node) or values.inactive_dropout(node):
        source = node.args[0]
        up = layout if values.inactive_dropout(node) else above(node, layout)
        if up is None or not isinstance(source, fx.Node):
            return Decline(node, f"{node.name} ({target_text(node.target)}) cuts across heads or tokens", depth)
        return _after(climb(program, found, source, up, depth + 1), node, None)
    if node.target in MULTIPLY | DIVIDE | ADD | SUBTRACT:
        return _arithmetic(program, found, node, layout, depth)
    if node.target in FILL | WHERE:
        return _masking(program, found, node, layout, depth)
    if node.target in FLOOR:
        return _flooring(program, found, node, layout, depth)
    return _in_the_way(found, node, depth)


def _arithmetic(program: Program, found: Softmax, node: fx.Node, layout: Layout, depth: int) -> Scores | Decline:
    a, b = node.args[0], node.args[1]
    alpha = values.argument(node, 2, "alpha", 1)
    if not isinstance(alpha, (int, float)):
        return _in_the_way(found, node, depth)
    options: list[tuple[fx.Node, Any, bool]] = []
    if values.is_tensor(a):
        options.append((a, b, False))  # type: ignore[arg-type]
    if values.is_tensor(b) and node.target not in DIVIDE:
        options.append((b, a, True))  # type: ignore[arg-type]
    if node.target in SUBTRACT and (chain := _shift(found, a, b, layout)) is not None:
        return _after(climb(program, found, a, layout, depth + 1), node, None, tuple(chain))  # type: ignore[arg-type]
    results: list[Scores | Decline] = []
    for path, other, swapped in options:
        if scalar_only(program, path):
            continue
        step: list[Step] = []
        path_layout = broadcast(layout, shape(path))
        number = values.scalar(program, other)
        if node.target in MULTIPLY | DIVIDE:
            if number is not None and (number or node.target in MULTIPLY):
                step.append(Step("scale", node, 1 / number if node.target in DIVIDE else number))
            else:
                step.append(_factor(node, other, layout, node.target in DIVIDE))
        else:
            sign = -1.0 if node.target in SUBTRACT else 1.0
            if swapped and sign < 0:
                step.append(Step("scale", node, -float(alpha)))
                step.append(_bias(node, other, layout, 1.0))
            elif swapped:
                if alpha != 1:
                    step.append(Step("scale", node, float(alpha)))
                step.append(_bias(node, other, layout, 1.0))
            else:
                step.append(_bias(node, other, layout, sign * float(alpha)))
        results.append(_after(climb(program, found, path, path_layout, depth + 1), node, step))
    return _best(program, results) or _in_the_way(found, node, depth)


def _shift(found: Softmax, scores: Any, largest: Any, layout: Layout) -> set[fx.Node] | None:
    """The nodes that take the largest of `scores` over the keys, which softmax does not see when it is subtracted."""
    for dim, axes in enumerate(layout):
        if axes and whole(axes) == whole(found.keys):
            return _largest(largest, scores, dim)
    return None


def scalar_only(program: Program, node: fx.Node) -> bool:
    return values.scalar(program, node) is not None


def _bias(node: fx.Node, other: Any, layout: Layout, number: float) -> Step:
    sizes = shape(other) if values.is_tensor(other) else ()
    return Step("bias", node, number, other, broadcast(layout, sizes))


def _factor(node: fx.Node, other: Any, layout: Layout, inverse: bool) -> Step:
    sizes = shape(other) if values.is_tensor(other) else ()
    return Step("factor", node, 1.0, other, broadcast(layout, sizes), inverse)


def _masking(program: Program, found: Softmax, node: fx.Node, layout: Layout, depth: int) -> Scores | Decline:
    if node.target in FILL:
        path, mask, value = node.args[0], node.args[1], node.args[2]
        inverse = False
    else:
        mask, kept, dropped = node.args[0], node.args[1], node.args[2]
        inverse = _uniform(program, kept) is None
        path, value = (kept, dropped) if inverse else (dropped, kept)
    number = _uniform(program, value)
    if number is None or not isinstance(path, fx.Node) or not isinstance(mask, fx.Node):
        return _in_the_way(found, node, depth)
    if values.dtype(mask) is not torch.bool:
        return Decline(node, f"the mask {mask.name} of {node.name} is {_type(mask)}, not boolean", depth)
    step = Step("mask", node, number, mask, broadcast(layout, shape(mask)), inverse)
    return _after(climb(program, found, path, broadcast(layout, shape(path)), depth + 1), node, [step])


def _uniform(program: Program, node: Any) -> float | None:
    """The number that a constant, a tensor made by full, or one spread from a constant holds everywhere."""
    if not isinstance(node, fx.Node):
        return values.scalar(program, node)
    while is_layout_op(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.target in (aten.full.default, aten.full_like.default) and isinstance(node.args[1], (int, float)):
        return float(node.args[1])
    return values.scalar(program, node)


def _flooring(program: Program, found: Softmax, node: fx.Node, layout: Layout, depth: int) -> Scores | Decline:
    path, bound = node.args[0], values.argument(node, 1, "min", None)
    if node.target is aten.clamp.default and values.argument(node, 2, "max", None) is not None:
        return _in_the_way(found, node, depth)
    number = values.scalar(program, bound) if bound is not None else None
    if number is None and isinstance(path, fx.Node) and isinstance(bound, fx.Node):
        path, number = bound, values.scalar(program, path)
    if number is None or number > -1e30 or not isinstance(path, fx.Node):
        return _in_the_way(found, node, depth)
    step = Step("floor", node, number)
    return _after(climb(program, found, path, broadcast(layout, shape(path)), depth + 1), node, [step])


def _after(
    result: Scores | Decline, node: fx.Node, steps: list[Step] | None, beside: tuple[fx.Node, ...] = ()
) -> Scores | Decline:
    if isinstance(result, Decline):
        return result
    return Scores(result.product, result.layout, (*result.steps, *(steps or [])), (*result.path, *beside, node))


def _best(program: Program, results: list[Scores | Decline]) -> Scores | Decline | None:
    """Of several ways up the one found; of two found, the one of whose factors more depend on the model's input."""
    scores = [r for r in results if isinstance(r, Scores)]
    if len(scores) > 1:
        inputs = {node.name for node in program.inputs}
        return max(scores, key=lambda s: sum(_depends(f, inputs) for f in (s.product.left, s.product.right)))
    declines = [r for r in results if isinstance(r, Decline)]
    return scores[0] if scores else max(declines, key=lambda d: d.depth, default=None)


def _depends(node: fx.Node, inputs: set[str]) -> bool:
    """Whether a value is computed from one of the program's inputs."""
    queue, seen = [node], {node}
    while queue:
        current = queue.pop()
        if current.op == "placeholder" and current.name in inputs:
            return True
        fresh_sources = [n for n in current.all_input_nodes if n not in seen and values.is_tensor(n)]
        seen.update(fresh_sources)
        queue += fresh_sources
    return False


def _in_the_way(found: Softmax, node: fx.Node, depth: int) -> Decline:
    what = target_text(node.target)
    source = _product_above(node)
    if source is None:
        return Decline(node, f"{found.node.name} reads {node.name} ({what}): no product of queries and keys lies above", depth)
    mixes = " and mixes heads or tokens" if node.target is aten.linear.default else ""
    return Decline(node, f"{node.name} ({what}) stands between the scores {source.name} and {found.node.name}{mixes}", depth)


def _product_above(node: fx.Node) -> fx.Node | None:
    queue, seen = [node], {node}
    while queue and len(seen) < SEARCH:
        current = queue.pop(0)
        for source in current.all_input_nodes:
            if source.target in PRODUCTS:
                return source
            if source not in seen and source.op == "call_function" and source.target is not aten.softmax.int:
                seen.add(source)
                queue.append(source)
    return None


def descend(program: Program, node: fx.Node, layout: Layout) -> Mixed | Decline:
    """From the softmax's result down to the product with v."""
    start, dropout, scale, path = node, 0.0, 1.0, [node]
    while True:
        users = values.readers(node)
        if len(users) != 1:
            names = ", ".join("the output" if u.op == "output" else u.name for u in users)
            return Decline(node, f"the probabilities {node.name} are read {len(users)} times: by {names}")
        user = users[0]
        found = read_by(user, node)
        if found is not None and found.addend is None:
            return Mixed(found, node, layout, dropout, scale * found.alpha, tuple(path))
        if values.inactive_dropout(user):
            pass
        elif (probability := values.active_dropout(user)) is not None:
            if dropout:
                return Decline(user, f"{user.name} is a second dropout of the probabilities of {start.name}")
            dropout = probability
        elif user.target is aten.native_dropout.default:
            kept = [u for u in user.users if u.args[1] == 0]
            if len(kept) != 1 or len(user.users) != 1:
                return Decline(user, f"the mask of {user.name} is read")
        elif is_layout_op(user) and user.args[0] is node:
            down = below(user, layout)
            if down is None:
                return Decline(user, f"{user.name} ({target_text(user.target)}) cuts across heads or tokens")
            layout = down
        elif (number := _scaled_by(program, user, node)) is not None:
            scale *= number
        else:
            what = target_text(user.target) if user.op == "call_function" else "the output"
            mixes = " and mixes heads" if user.target is aten.linear.default else ""
            return Decline(user, f"{user.name} ({what}) stands between {start.name} and the product with v{mixes}")
        node = user
        path.append(node)


def _scaled_by(program: Program, user: fx.Node, node: fx.Node) -> float | None:
    if user.target in MULTIPLY:
        other = user.args[1] if user.args[0] is node else user.args[0]
        return values.scalar(program, other)
    if user.target in DIVIDE and user.args[0] is node:
        number = values.scalar(program, user.args[1])
        return 1 / number if number else None
    return None


def reached(node: fx.Node) -> list[fx.Node]:
    """Products that a softmax's result goes into, through anything that keeps it a tensor, before another softmax."""
    queue, seen, found = [node], {node}, []
    while queue and len(seen) < SEARCH:
        current = queue.pop(0)
        for user in current.users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            if user.target in PRODUCTS:
                found.append(user)
            elif _passes_on(user, current):
                queue.append(user)
    return found


def _passes_on(user: fx.Node, node: fx.Node) -> bool:
    """Whether probabilities that enter `user` are still told token by token behind it."""
    if user.target is aten.linear.default:
        return user.args[0] is node
    return user.target in CARRIERS or is_layout_op(user)


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


__all__ = ["Attention", "Axis", "Decline", "Scores", "Softmax", "Step", "match", "reached", "softmax"]
