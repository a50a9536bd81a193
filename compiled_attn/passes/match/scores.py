"""From a softmax up to the product of queries and keys: what is done to the scores on the way, in which axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from compiled_attn.ir.program import Program
from compiled_attn.ir.text import target_text, type_text
from compiled_attn.passes.match import values
from compiled_attn.passes.match.axes import Layout, above, broadcast, is_layout_op, shape, whole
from compiled_attn.passes.match.products import PRODUCTS, Product, product
from compiled_attn.passes.match.softmax import Softmax, largest
from compiled_attn.passes.match.values import ADD, DIVIDE, FILL, FLOOR, MULTIPLY, SUBTRACT, WHERE

aten = torch.ops.aten
SEARCH = 24  # nodes looked at for the product that a near miss should have reached


@dataclass(frozen=True)
class Decline:
    """Why a softmax is not raised: the node that stands in the way, and a sentence that names it."""

    node: fx.Node
    because: str
    depth: int = 0


@dataclass(frozen=True)
class Step:
    """What is done to the scores on their way to the softmax, with the layout of the other operand.

    scale: times `number`.  factor: times (or, inverse, by) tensor `other`.  bias: plus `number` times `other`.
    mask: `number` where `other` (or, inverse, where not).  floor: at least `number`.  cap: their hyperbolic tangent.
    """

    kind: Literal["scale", "factor", "bias", "mask", "floor", "cap"]
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
    if node.target is aten.tanh.default and isinstance(node.args[0], fx.Node):
        return _after(climb(program, found, node.args[0], layout, depth + 1), node, [Step("cap", node)])
    return _in_the_way(found, node, depth)


def _arithmetic(program: Program, found: Softmax, node: fx.Node, layout: Layout, depth: int) -> Scores | Decline:
    a, b = node.args[0], node.args[1]
    alpha = values.argument(node, 2, "alpha", 1)
    if not isinstance(alpha, (int, float)):
        return _in_the_way(found, node, depth)
    options: list[tuple[fx.Node, Any, bool]] = []
    if values.is_tensor(a):
        options.append((a, b, False))
    if values.is_tensor(b) and node.target not in DIVIDE:
        options.append((b, a, True))
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


def _shift(found: Softmax, scores: Any, most: Any, layout: Layout) -> set[fx.Node] | None:
    """The nodes that take the largest of `scores` over the keys, which softmax does not see when it is subtracted."""
    for dim, axes in enumerate(layout):
        if axes and whole(axes) == whole(found.keys):
            return largest(most, scores, dim)
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
        return Decline(
            node, f"the mask {mask.name} of {node.name} is {type_text(mask.meta['val'])}, not boolean", depth
        )
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
        return Decline(
            node, f"{found.node.name} reads {node.name} ({what}): no product of queries and keys lies above", depth
        )
    mixes = " and mixes heads or tokens" if node.target is aten.linear.default else ""
    return Decline(
        node, f"{node.name} ({what}) stands between the scores {source.name} and {found.node.name}{mixes}", depth
    )


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
