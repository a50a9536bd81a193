"""Linear maps that act on every channel by itself, found by what the values are: convolutions, norms, scales and sums.

    batch_norm(conv(x, w3) + conv(x, w1) + x)     is     one depthwise convolution of x, with one kernel and one bias
    conv2d(pad(x, [0, 1, 0, 1]), w, stride=2)     is     one of x itself, whose padding differs from end to end
    conv1d(x, w, padding=3)[..., :n]              is     one of a single row, padded ahead only

`Form` is such a map of one source; `Forms` finds it for the nodes of a graph, in double precision. A source is
[B, C, X] or [B, C, Y, X]; what is said of rows holds of the one row of the former.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.program import Program
from compiled_attn.ops.depthwise import both_ends
from compiled_attn.passes.fold_batch_norm import batch_norm_parts
from compiled_attn.passes.fold_constants import constant_placeholders

aten = torch.ops.aten
Offset = tuple[int, int]
Tensor = torch.Tensor
CONVOLUTIONS = (aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding)
PADS = (aten.constant_pad_nd.default, aten.pad.default)
SUMS = (aten.add.Tensor, aten.sub.Tensor)
EXACT = (torch.float32, torch.float64)  # elements whose sums of kernels keep the numbers
DENSER = 1.5  # a kernel of sums may have this many times the places of its parts
EMPTIER = 2.0  # and one of a map whose padding or cut it takes in, which saves a copy of the map


@dataclass(frozen=True)
class Form:
    """out[y] = bias + sum over offsets of taps[offset] * source[y * stride + offset], channel by channel.

    taps: offset -> [C] in float64.  short: the padding at both ends less what the kernel reaches over, the same for all
    parts: the result has (size + short - 1) // stride + 1 positions.  places: of the kernels that were summed.
    repeats: results of every channel of the source; those of one channel stand side by side.
    """

    source: fx.Node
    taps: dict[Offset, Tensor]
    bias: Tensor | None
    stride: Offset
    short: Offset
    convolutions: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]
    made_from: tuple[str, ...]
    places: int
    repeats: int = 1

    def scaled(self, scale: Tensor, shift: Tensor | None, node: fx.Node, names: tuple[str, ...]) -> Form:
        """scale * self + shift, which `node` computes."""
        bias = None if self.bias is None else self.bias * scale
        bias = shift if bias is None else bias if shift is None else bias + shift
        taps = {at: tap * scale for at, tap in self.taps.items()}
        return replace(self, taps=taps, bias=bias, nodes=self.nodes | {node}, made_from=(*self.made_from, *names))

    def plus(self, other: Form, node: fx.Node) -> Form | None:
        """The sum with another map of the same source; None where there is no such kernel or a needlessly big one."""
        alike = (self.stride, self.short, self.repeats) == (other.stride, other.short, other.repeats)
        if self.source is not other.source or not alike:
            return None
        taps = dict(self.taps)
        for at, tap in other.taps.items():
            taps[at] = taps[at] + tap if at in taps else tap
        biases = [b for b in (self.bias, other.bias) if b is not None]
        total = Form(
            self.source,
            taps,
            sum(biases[1:], biases[0]) if biases else None,
            self.stride,
            self.short,
            (*self.convolutions, *other.convolutions),
            self.nodes | other.nodes | {node},
            (*self.made_from, *other.made_from),
            self.places + other.places,
            self.repeats,
        )
        kernel, _, _ = total.geometry()
        return total if kernel[0] * kernel[1] <= DENSER * total.places else None

    def geometry(self) -> tuple[Offset, tuple[int, ...], Offset]:
        """Kernel, padding (two numbers, or four where the ends differ) and dilation that hold every tap."""
        axes = []
        for axis in (0, 1):
            offsets, short = {at[axis] for at in self.taps}, self.short[axis]
            ahead = max(-min(offsets), 0)
            length = ahead + max(max(offsets), -short)  # no less, since nothing is cut from the map
            step = math.gcd(length, *(o + ahead for o in offsets))
            axes.append((length // step + 1 if step else 1, (ahead, length - ahead + short), max(step, 1)))
        (rows, vertical, down), (columns, horizontal, right) = axes
        ends = (*vertical, *horizontal)
        return (rows, columns), ends[::2] if ends[::2] == ends[1::2] else ends, (down, right)

    def kernel(self) -> Tensor:
        """The weight [I, J, C] in float64; zeros where no part has a place."""
        (rows, columns), padding, dilation = self.geometry()
        channels = next(iter(self.taps.values())).shape[0]
        weight = torch.zeros(rows, columns, channels, dtype=torch.float64)
        (top, _), (left, _) = both_ends(padding)
        for at, tap in self.taps.items():
            weight[(at[0] + top) // dilation[0], (at[1] + left) // dilation[1]] = tap
        return weight


class Forms:
    """The Form of every node that has one, with at least one convolution in it or none; `why` says what hindered."""

    def __init__(self, program: Program) -> None:
        names = constant_placeholders(program)
        self.tensors = {n: t.detach() for n, t in program.tensors().items() if n in names}
        self.names = names
        self.of: dict[fx.Node, Form] = {}
        self.why: dict[fx.Node, str] = {}
        for node in program.graph.nodes:
            if node.op == "call_function":
                found = self._form(node)
                if found is not None:
                    self.of[node] = found

    def roots(self) -> list[fx.Node]:
        """The outermost nodes whose Form holds a convolution, in the order of the graph."""
        covered: set[fx.Node] = set()
        found = []
        for node in reversed(self.of):
            form = self.of[node]
            if form.convolutions and node not in covered:
                covered |= form.nodes
                found.append(node)
        return found[::-1]

    def _form(self, node: fx.Node) -> Form | None:
        if node.target in CONVOLUTIONS:
            return self._convolution(node)
        if node.target is aten.slice.Tensor:
            return self._cut(node)
        if node.target in (aten.batch_norm.default, operator.getitem):
            return self._norm(node)
        if node.target is aten.mul.Tensor:
            return self._scale(node)
        return self._sum(node) if node.target in SUMS else None

    def _convolution(self, node: fx.Node) -> Form | None:
        given: Any = (*node.args, *(None, [1], [0], [1], 1)[len(node.args) - 2 :])
        x, weight, bias, stride, padding, dilation, groups = given
        shape = weight.meta["val"].shape
        if groups == 1 or shape[1] != 1 or len(shape) != _rank(x):
            return None
        computed = next((n for n in (weight, bias) if n is not None and n.name not in self.tensors), None)
        if computed is not None:
            self.why[node] = f"its weight or bias is computed ({computed.name})"
            return None
        flat = len(shape) == 3
        kernel = (1 if flat else int(shape[2]), int(shape[-1]))
        stride, dilation = _pair(stride, 1 if flat else None), _pair(dilation, 1 if flat else None)
        reach = (dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1))
        if isinstance(padding, str):  # of an odd number of zeros the larger half lies behind
            both = reach if padding == "same" else (0, 0)
            padding = (both[0] // 2, both[1] // 2)
        else:
            padding = _pair(padding, 0 if flat else None)
            both = (2 * padding[0], 2 * padding[1])
        value = self.tensors[weight.name].double().reshape(int(shape[0]), *kernel)
        taps = {
            (i * dilation[0] - padding[0], j * dilation[1] - padding[1]): value[:, i, j]
            for i in range(kernel[0])
            for j in range(kernel[1])
        }
        short = (both[0] - reach[0], both[1] - reach[1])
        shift = None if bias is None else self.tensors[bias.name].double()
        names = tuple(self.names[n.name] for n in (weight, bias) if n is not None)
        repeats = int(shape[0]) // int(groups)
        nodes = frozenset((node,))
        return _before_zeros(Form(x, taps, shift, stride, short, (node,), nodes, names, len(taps), repeats))

    def _cut(self, node: fx.Node) -> Form | None:
        """A map cut to the size of its source: the rest of a convolution that pads as much behind as ahead."""
        given: Any = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
        x, dim, start, _, step = given
        form = self.of.get(x) if isinstance(x, fx.Node) and len(x.users) == 1 else None
        if form is None or step != 1 or start not in (0, None):
            return None
        axis = dim % _rank(x) - _rank(x) + 2
        sizes = [n.meta["val"].shape[dim] for n in (node, form.source)]
        if axis < 0 or form.stride[axis] != 1 or not _torch.statically_true(sizes[0] == sizes[1]):
            return None
        short = (0, form.short[1]) if axis == 0 else (form.short[0], 0)
        return _lean(replace(form, short=short, nodes=form.nodes | {node}))

    def _norm(self, node: fx.Node) -> Form | None:
        norm: Any = node
        if node.target is operator.getitem:
            norm = node.args[0]
            if node.args[1] != 0 or len(norm.users) != 1:
                return None
        parts = batch_norm_parts(norm)
        if parts is None:
            return None
        x, weight, bias, mean, variance, eps = parts
        nodes = [weight, bias, mean, variance]
        if any(n is not None and n.name not in self.tensors for n in nodes) or not _exact(x):
            return None
        values: list[Any] = [None if n is None else self.tensors[n.name].double() for n in nodes]
        g, h, m, v = values
        scale = torch.rsqrt(v + eps) if g is None else g * torch.rsqrt(v + eps)
        shift = -m * scale if h is None else h - m * scale
        names = tuple(self.names[n.name] for n in nodes if n is not None)
        found = self._inside(x)
        return None if found is None else found.scaled(scale, shift, node, names)

    def _scale(self, node: fx.Node) -> Form | None:
        args: Any = node.args
        for x, other in (args, args[::-1]):
            scale = self._by_channel(x, other)
            if scale is not None and isinstance(x, fx.Node):
                found = self._inside(x)
                names = (self.names[other.name],) if isinstance(other, fx.Node) else ()
                return None if found is None else found.scaled(scale, None, node, names)
        return None

    def _sum(self, node: fx.Node) -> Form | None:
        args: Any = node.args
        a, b = args
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        if node.kwargs.get("alpha", 1) != 1 or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return None
        if a is b or not _exact(a) or not _exact(b) or not _same_shape(a, b):
            return None
        inner = [(self._inside(n), _identity(n)) for n in (a, b)]
        minus = torch.tensor(sign, dtype=torch.float64)
        for left, right in ((inner[0][0], inner[1][0]), (inner[0][0], inner[1][1]), (inner[0][1], inner[1][0])):
            if left is not None and right is not None:
                total = left.plus(right.scaled(minus, None, node, ()), node)
                if total is not None:
                    return total
        return None

    def _inside(self, x: fx.Node) -> Form | None:
        """The Form of an operand that only this map reads; else the operand itself as a source."""
        found = self.of.get(x) if len(x.users) == 1 else None
        return _identity(x) if found is None else found

    def _by_channel(self, x: Any, other: Any) -> Tensor | None:
        """`other` as numbers [C] that multiply x channel by channel."""
        if not isinstance(x, fx.Node) or not _exact(x) or not _is_map(x):
            return None
        channels = x.meta["val"].shape[1]
        if isinstance(other, (int, float)):
            return torch.full((channels,), float(other), dtype=torch.float64)
        value = self.tensors.get(other.name) if isinstance(other, fx.Node) else None
        if value is None or value.dim() > _rank(x) or value.numel() not in (1, channels):
            return None
        shape = (1,) * (_rank(x) - value.dim()) + tuple(value.shape)
        if math.prod((shape[0], *shape[2:])) != 1:
            return None
        return value.double().reshape(-1).expand(channels)


def _identity(x: fx.Node) -> Form | None:
    if not _is_map(x):
        return None
    one = torch.ones(x.meta["val"].shape[1], dtype=torch.float64)
    return Form(x, {(0, 0): one}, None, (1, 1), (0, 0), (), frozenset(), (), 1)


def _is_map(x: fx.Node) -> bool:
    value = x.meta.get("val")
    return isinstance(value, Tensor) and value.dim() in (3, 4) and isinstance(value.shape[1], int)


def _before_zeros(form: Form) -> Form:
    """The same of what its source was before zeros were put around it, unless that asks for too big a kernel."""
    found = zeros_around(form.source)
    if found is None:
        return form
    source, (top, bottom, left, right) = found
    taps = {(i - top, j - left): tap for (i, j), tap in form.taps.items()}
    short = (form.short[0] + top + bottom, form.short[1] + left + right)
    nodes = form.nodes | ({form.source} if len(form.source.users) == 1 else set())
    return _lean(replace(form, source=source, taps=taps, short=short, nodes=nodes)) or form


def zeros_around(node: fx.Node) -> tuple[fx.Node, tuple[int, int, int, int]] | None:
    """The map that `node` puts zeros around, and how many: top, bottom, left, right; else None."""
    given: Any = node.args
    if node.target not in PADS or not set(given[2:]) <= {"constant", None, 0}:
        return None
    left, right, top, bottom = (*given[1], 0, 0)[:4]
    if len(given[1]) > 2 * (_rank(given[0]) - 2) or not all(isinstance(n, int) and n >= 0 for n in given[1]):
        return None
    return given[0], (top, bottom, left, right)


def _lean(form: Form) -> Form | None:
    """The form, if zeros do not make its kernel more than about twice as big as it has to be."""
    kernel, _, _ = form.geometry()
    return form if kernel[0] * kernel[1] <= EMPTIER * form.places else None


def _rank(x: fx.Node) -> int:
    return int(x.meta["val"].dim())


def _exact(x: fx.Node) -> bool:
    value = x.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in EXACT


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    shapes = [n.meta["val"].shape for n in (a, b)]
    return len(shapes[0]) == len(shapes[1]) and all(str(m) == str(n) for m, n in zip(*shapes, strict=True))


def _pair(value: Any, row: int | None) -> Offset:
    """Numbers for rows and columns; `row` is what holds of the one row of [B, C, X], None where there are more."""
    numbers = [int(n) for n in (value if isinstance(value, (list, tuple)) else [value])]
    return (numbers[0] if row is None else row, numbers[-1])
