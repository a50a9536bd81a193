"""What a program costs: floating-point operations and bytes, from shapes alone; symbolic sizes stay symbols.

Flops are counted as in the papers' tables (which fvcore makes), times two for multiply and add: products (linear,
matrix product, convolution, attention), which a target's peak is stated for, and five multiply-adds an element for a
normalisation. Pointwise work and softmax count their bytes only. Bytes are those of a node run alone: its inputs read
once, its outputs written once; a view moves nothing. Vocabulary ops bring their own rule (`Op.cost`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch
from compiled_attn.ir.op import Cost, op_of

if TYPE_CHECKING:
    from compiled_attn.ir.program import Program
    from compiled_attn.ir.targets import Target

FREE = Cost(0, 0)


def node_cost(node: fx.Node) -> Cost:
    """The cost of one node, from the values that it takes and gives; zero for inputs, views and size arithmetic."""
    if node.op != "call_function":
        return FREE
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    op = op_of(node.target)
    if op is not None:
        found = op.cost(*args, **kwargs)
        return Cost(_torch.expression(found.flops), _torch.expression(found.bytes))
    packet = getattr(node.target, "overloadpacket", None)
    out = node.meta.get("val")
    outputs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    if packet is None or packet in VIEWS or not outputs:
        return FREE
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    flops = FLOPS[packet](outputs[0], *args, **kwargs) if packet in FLOPS else 0
    if packet in GATHERS:  # they read what they give, and the indices
        inputs = [outputs[0], *(x for x in inputs if not x.dtype.is_floating_point)]
    return Cost(flops, sum((_bytes(x) for x in (*inputs, *outputs)), 0))


def program_cost(program: Program) -> Cost:
    """The sum over a program's nodes; an expression in the program's symbols where a size is symbolic."""
    total = FREE
    for node in program.graph.nodes:
        total = total + node_cost(node)
    return total


def at(cost: Cost, sizes: Mapping[str, int]) -> Cost:
    """A symbolic cost at given sizes, by the symbols' names."""

    def value(expression: Any) -> Any:
        symbols = {s: sizes[str(s)] for s in getattr(expression, "free_symbols", ()) if str(s) in sizes}
        found = expression.subs(symbols) if symbols else expression
        return int(found) if not getattr(found, "free_symbols", None) else found

    return Cost(value(cost.flops), value(cost.bytes))


def bounds(cost: Cost, ranges: Mapping[Any, Any]) -> tuple[Cost, Cost]:
    """Least and greatest cost over the ranges of the symbols; math.inf where a range has no end."""
    flops, moved = (_torch.size_bounds(x, ranges) for x in (cost.flops, cost.bytes))
    high = Cost(*(math.inf if end is None else end for end in (flops[1], moved[1])))
    return Cost(flops[0], moved[0]), high


def roofline(cost: Cost, target: Target, dtype: torch.dtype = torch.float32) -> Any:
    """Seconds that `target` can not go below: arithmetic or memory, whichever takes longer.

    A float, or an expression where the cost is symbolic.
    """
    seconds = (cost.flops / target.flops_per_second(dtype), cost.bytes / target.bytes_per_second)
    if any(getattr(s, "free_symbols", None) for s in seconds):
        return _torch.symbolic_max(*seconds)
    return max(float(s) for s in seconds)


def _size(value: Any) -> Any:
    return _torch.expression(value)


def _numel(x: torch.Tensor) -> Any:
    return math.prod((_size(s) for s in x.shape), start=1)


def _bytes(x: torch.Tensor) -> Any:
    return _numel(x) * x.element_size()


def _linear(out: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> Any:
    return 2 * _numel(out) * _size(x.shape[-1])


def _addmm(out: torch.Tensor, _bias: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> Any:
    return 2 * _numel(out) * _size(x.shape[-1])


def _convolution(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Each output takes one multiply-add per weight of its channel; transposed, each input does."""
    transposed = bool(kwargs.get("transposed", args[4] if len(args) > 4 else False))
    per_channel = math.prod((_size(s) for s in weight.shape[1:]), start=1)
    return 2 * _numel(x if transposed else out) * per_channel


def _conv(out: torch.Tensor, _x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> Any:
    return 2 * _numel(out) * math.prod((_size(s) for s in weight.shape[1:]), start=1)


def _conv_transpose(_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> Any:
    return 2 * _numel(x) * math.prod((_size(s) for s in weight.shape[1:]), start=1)


def _attention(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
    """q k^T and p v; a causal mask is counted in full, as the papers and torch's counter do."""
    rows = math.prod((_size(s) for s in out.shape[:-1]), start=1)
    return 2 * rows * _size(k.shape[-2]) * (_size(q.shape[-1]) + _size(v.shape[-1]))


def _norm(out: torch.Tensor, *_: Any, **__: Any) -> Any:
    return 2 * 5 * _numel(out)


def _einsum(_out: torch.Tensor, equation: str, operands: Any, **_: Any) -> Any:
    """One multiply-add per combination of the letters' values."""
    letters: dict[str, Any] = {}
    for term, operand in zip(equation.split("->")[0].replace(" ", "").split(","), operands, strict=True):
        letters.update(zip(term, (_size(s) for s in operand.shape), strict=True))
    return 2 * math.prod(letters.values(), start=1)


_aten = torch.ops.aten

FLOPS: dict[Any, Callable[..., Any]] = {
    _aten.linear: _linear,
    _aten.mm: _linear,
    _aten.bmm: _linear,
    _aten.matmul: _linear,
    _aten.addmm: _addmm,
    _aten.baddbmm: _addmm,
    _aten.convolution: _convolution,
    _aten.conv1d: _conv,
    _aten.conv2d: _conv,
    _aten.conv3d: _conv,
    _aten.conv_transpose2d: _conv_transpose,
    _aten.scaled_dot_product_attention: _attention,
    _aten.einsum: _einsum,
    _aten.layer_norm: _norm,
    _aten.native_layer_norm: _norm,
    _aten.group_norm: _norm,
}

GATHERS = frozenset({_aten.index, _aten.gather, _aten.index_select, _aten.embedding})

# Named, not asked of the schema: reshape and flatten alias only where they can, and are counted as views all the same.
VIEWS = frozenset(
    {
        _aten.alias,
        _aten.as_strided,
        _aten.broadcast_to,
        _aten.chunk,
        _aten.detach,
        _aten.diagonal,
        _aten.expand,
        _aten.expand_as,
        _aten.flatten,
        _aten.movedim,
        _aten.narrow,
        _aten.permute,
        _aten.reshape,
        _aten.select,
        _aten.slice,
        _aten.split,
        _aten.split_with_sizes,
        _aten.squeeze,
        _aten.t,
        _aten.transpose,
        _aten.unbind,
        _aten.unflatten,
        _aten.unsqueeze,
        _aten.view,
        _aten.view_as,
    }
)
