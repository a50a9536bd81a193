"""Recognises attention inside windows that were cut out of a map, and reads the map in place instead.

    r = roll(x, [-3, -3]);  t = partition(r)                       y = linear(x, W, b)
    q, k, v = heads(linear(t, W, b))                         ->    q, k, v = heads(y)
    a = scaled_dot_product_attention(q, k, v, bias + mask)         a = local_attention(q, k, v, table, window=[7, 7],
    z = roll(reverse(linear(a, P, c)), [3, 3])                          stride=[7, 7], shift=[3, 3], border="mask")
                                                                   z = linear(a, P, c)

How the windows are cut is found by following element numbers (match/positions.py), so it does not matter how the
partition is written. The bias is taken apart by its values: what it says of two tokens must depend on their distance
alone, and hide every pair of different windows. Never changes which keys a query sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn import ops
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.ops.local_geometry import axes_of
from compiled_attn.passes.choose_attention import SDPA, read
from compiled_attn.passes.fold_constants import constant_placeholders
from compiled_attn.passes.match.positions import Numbering, moves, numbered, upstream
from compiled_attn.passes.match.windows import Windows, distances, windows_of

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
RULE = "local_attention"
HIDDEN = -80.0  # what is this far below the rest has a probability below 1e-34


@dataclass(frozen=True)
class Part:
    """q, k or v: channels [first, first + heads * width) of `linear`, whose tokens are those of `source`."""

    linear: fx.Node
    source: fx.Node
    first: int
    place: torch.Tensor  # [windows, tokens]: element number of the token among the source's


@dataclass(frozen=True)
class Found:
    """A match: the attention's parts, its pattern, the bias as indices into a constant node, and the output."""

    parts: tuple[Part, Part, Part]
    windows: Windows
    bias: tuple[fx.Node, torch.Tensor] | None
    output: fx.Node | None  # the projection
    end: fx.Node
    scale: float


def part_of(node: fx.Node, numbering: Numbering) -> Part | str:
    """Where q, k or v [windows, heads, tokens, width] comes from."""
    chain = upstream(node, lambda n: n.target is aten.linear.default)
    if not chain:
        return "its q, k or v is no view of a linear"
    linear: Any = chain[0].args[0]
    above = upstream(linear.args[0], lambda n: n.meta["val"].dim() == 4 and not moves(n))
    sources = [c for c in above if c.meta["val"].dim() == 4]
    top: Any = above[0].args[0] if above else None
    if top is None:
        # The picture may be a view of tokens: the topmost value of four dimensions then stands for it.
        above = upstream(linear.args[0], lambda n: not moves(n))
        sources = [c for c in above if c.meta["val"].dim() == 4]
        if not sources:
            return "its tokens are not those of a map [B, Y, X, C]"
        top = sources[0]
        above = above[above.index(top) + 1 :]
    shapes = numbering.shape(top), numbering.shape(linear), numbering.shape(node)
    if shapes[0] is None or shapes[1] is None or shapes[2] is None or shapes[0][0] != numbering.batch:
        return "a size of it is symbolic beside the batch"
    pixels = numbering.run(above, numbered(*shapes[0]))
    if pixels is None:
        return "its windows do not follow from the map by moving elements"
    pixels = pixels.reshape(-1, shapes[0][3])
    token = pixels[:, 0] // shapes[0][3]
    if not torch.equal(pixels, token.unsqueeze(1) * shapes[0][3] + torch.arange(shapes[0][3])):
        return "its windows mix channels"
    channels = shapes[1][-1]
    heads = numbering.run(chain, numbered(*shapes[1]))
    if heads is None or heads.dim() != 4:
        return "its heads do not follow from the linear by moving elements"
    _, count, _, width = heads.shape
    row, channel = heads // channels, heads % channels
    first = int(channel[0, 0, 0, 0])
    wanted = first + torch.arange(count).view(-1, 1, 1) * width + torch.arange(width)
    if not bool((channel == wanted).all()) or not bool((row == row[:, :1, :, :1]).all()):
        return "its heads are not consecutive channels of the linear"
    return Part(linear, top, first, token[row[:, 0, :, 0]])


def bias_of(
    program: Program, mask: fx.Node | None, windows: Windows, numbering: Numbering, heads: int, size: tuple[int, int]
) -> tuple[fx.Node, torch.Tensor] | str | None:
    """The table [H, 2 wy - 1, 2 wx - 1] as a constant node and the numbers of its elements, or why there is none."""
    seen, at = distances(windows, *size)
    if mask is None:
        return None if bool(seen.all()) else "its windows join opposite borders of the map and nothing hides that"
    cut, tokens = windows.place.shape
    chain = [] if constant(program, mask) else upstream(mask, lambda n: constant(program, n))
    base: Any = mask if not chain else chain[0].args[0]
    value = evaluated(program, base) if chain or constant(program, mask) else None
    if value is None:
        return "its bias depends on the input"
    shape = numbering.shape(base)
    full = numbering.run(chain, numbered(*shape)) if shape else None
    if full is None or full.dim() > 4:
        return "its bias does not follow from a constant by moving elements"
    full = full.expand(numbering.batch * cut, heads, tokens, tokens).view(numbering.batch, cut, heads, tokens, tokens)
    values = value.flatten()[full]
    if not bool((values == values[:1]).all()):
        return "its bias differs between pictures"
    number, values = full[0].movedim(1, 0), values[0].movedim(1, 0).float()  # [H, cut, n, m]
    axes = axes_of(2, **windows.options)
    entries = axes[0].offsets * axes[1].offsets
    where = torch.zeros(heads, entries, dtype=torch.long)
    where[:, at[seen]] = number[:, seen]
    table = value.flatten()[where].float()
    if not bool((values[:, seen] == table[:, at[seen]]).all()):
        return "its bias is no function of the distance between two tokens"
    if bool((~seen).any()) and not bool((values[:, ~seen] <= table.min() + HIDDEN).all()):
        return "its mask lets tokens of different windows see each other"
    return base, where.view(heads, axes[0].offsets, axes[1].offsets)


def constant(program: Program, node: fx.Node) -> bool:
    """Whether a node's value follows from the program's own tensors alone."""
    known = constant_placeholders(program)
    pending, met = [node], set()
    while pending:
        current = pending.pop()
        if current in met:
            continue
        met.add(current)
        if current.op == "placeholder" and current.name not in known:
            return False
        pending += current.all_input_nodes
    return True


def evaluated(program: Program, node: fx.Node) -> torch.Tensor | None:
    """The value of a node that follows from the program's own tensors."""
    names, tensors = constant_placeholders(program), program.tensors()
    known: dict[fx.Node, Any] = {}

    def value(n: fx.Node) -> Any:
        if n not in known:
            if n.op == "placeholder":
                known[n] = tensors[names[n.name]] if names[n.name] in tensors else tensors.get(n.name)
            else:
                args, kwargs = fx.node.map_arg((n.args, n.kwargs), value)
                known[n] = n.target(*args, **kwargs)  # type: ignore[operator]
        return known[n]

    with torch.no_grad():
        found = value(node)
    return found if isinstance(found, torch.Tensor) else None


def end_of(
    node: fx.Node, windows: Windows, numbering: Numbering, source: fx.Node
) -> tuple[fx.Node | None, fx.Node] | str:
    """The projection behind the attention, and the first value behind it that is a map again."""
    shape = numbering.shape(node)
    rows, columns = source.meta["val"].shape[1:3]
    if shape is None:
        return "a size of it is symbolic beside the batch"
    numbers: Any = numbered(*shape).transpose(1, 2).flatten(2)  # [windows, tokens, channels]
    place = (windows.place.unsqueeze(0) + torch.arange(numbering.batch).view(-1, 1, 1) * (rows * columns)).flatten()
    wanted = torch.empty_like(numbers.flatten(0, 1))
    wanted[place] = numbers.flatten(0, 1)
    current, value, linear = node, numbered(*shape), None
    while len(current.users) == 1:
        user = next(iter(current.users))
        if user.target is aten.linear.default and linear is None and user.args[0] is current:
            flat = value.reshape(-1, value.shape[-1])
            if not torch.equal(flat, numbers.flatten(0, 1)):
                return "its heads are not joined in order behind it"
            linear, sizes = user, numbering.shape(user)
            if sizes is None:
                return "a size of it is symbolic beside the batch"
            value = numbered(*sizes)
            numbers = value.reshape(-1, sizes[-1])
            wanted = torch.empty_like(numbers)
            wanted[place] = numbers
        elif moves(user) and user.args[0] is current:
            moved = numbering.run([user], value)
            if moved is None:
                return "what follows it is no moving of elements"
            value = moved
        else:
            break
        current = user
        same = value.shape[:3] == (numbering.batch, rows, columns) and value.dim() == 4
        if same and torch.equal(value.reshape(-1, value.shape[-1]), wanted):
            return linear, current
    return "its windows are not put back into the map behind it"


def match(program: Program, node: fx.Node) -> Found | str:
    call = read(node)
    if isinstance(call, str):
        return call
    if call.causal:
        return "it is causal"
    chain = upstream(call.q, lambda n: not moves(n))
    if not chain:
        return "its q is no view of anything"
    linear: Any = chain[0].args[0]
    first = linear.args[0] if linear.target is aten.linear.default else None
    roots = upstream(first, lambda n: not moves(n)) if isinstance(first, fx.Node) else []
    if not roots:
        return "its q is no view of a linear of moved tokens"
    batch: Any = roots[0].args[0].meta["val"].shape[0]  # type: ignore[union-attr]
    numbering = Numbering(batch)
    if not numbering.simple:
        return f"its batch {batch} is no size by itself"
    parts = []
    for value in (call.q, call.k, call.v):
        part = part_of(value, numbering)
        if isinstance(part, str):
            return part
        parts.append(part)
    q, k, v = parts
    if any(p.source is not q.source or not torch.equal(p.place, q.place) for p in (k, v)):
        return "its keys are not of the same windows as its queries"
    rows, columns = q.source.meta["val"].shape[1:3]
    if not (isinstance(rows, int) and isinstance(columns, int)):
        return f"its map {rows} x {columns} is symbolic, the windows are found by their numbers"
    windows = windows_of(q.place, numbering.batch, rows, columns)
    if isinstance(windows, str):
        return windows
    heads = call.q.meta["val"].shape[1]
    bias = bias_of(program, call.mask, windows, numbering, heads, (rows, columns))
    if isinstance(bias, str):
        return bias
    end = end_of(node, windows, numbering, q.source)
    if isinstance(end, str):
        return end
    return Found((q, k, v), windows, bias, *end, call.scale)


def write(edit: Edit, node: fx.Node, found: Found) -> None:
    """Puts the linears on the map, the op between them, and the projection at the end."""
    heads, width = node.meta["val"].shape[1], node.meta["val"].shape[3]
    with edit.graph.inserting_before(edit.node_of[found.end]):
        linears: dict[fx.Node, fx.Node] = {}
        taken = []
        for part, original in zip(found.parts, read_widths(node), strict=True):
            if part.linear not in linears:
                old = edit.node_of[part.linear]
                linears[part.linear] = edit.call(
                    old.target, (edit.node_of[part.source], *old.args[1:]), dict(old.kwargs), like=old
                )
            stop = part.first + heads * original
            piece = edit.call(aten.slice.Tensor, (linears[part.linear], 3, part.first, stop), like=node)
            sizes = [*piece.meta["val"].shape[:3]]
            shape = [batch_of(edit, part.source), *sizes[1:], heads, original]
            taken.append(edit.call(aten.view.default, (piece, shape), like=node))
        bias = None
        if found.bias is not None:
            base, where = found.bias
            index = edit.constant(f"{node.name}_distances", where.flatten())
            flat = edit.call(aten.reshape.default, (edit.node_of[base], [-1]), like=node)
            table = edit.call(aten.index_select.default, (flat, 0, index), like=node)
            bias = edit.call(aten.reshape.default, (table, list(where.shape)), like=node)
        options = {**found.windows.options, "scale": found.scale}
        out = edit.call(ops.local_attention.overload, (*taken, bias), options, like=node)
        sizes = [*out.meta["val"].shape[1:3]]
        joined = [batch_of(edit, found.parts[0].source), *sizes, heads * width]
        out = edit.call(aten.view.default, (out, joined), like=node)
        if found.output is not None:
            old = edit.node_of[found.output]
            out = edit.call(old.target, (out, *old.args[1:]), dict(old.kwargs), like=old)
    edit.replace(edit.node_of[found.end], out)


def batch_of(edit: Edit, source: fx.Node) -> Any:
    """The batch of a map, as a number or as a node."""
    size = source.meta["val"].shape[0]
    return size if isinstance(size, int) else edit.call(aten.sym_size.int, (edit.node_of[source], 0), like=source)


def read_widths(node: fx.Node) -> tuple[int, int, int]:
    """Head widths of q, k and v of an SDPA node."""
    return tuple(a.meta["val"].shape[-1] for a in node.args[:3])  # type: ignore[union-attr]


@dataclass(frozen=True)
class RaiseLocalAttention:
    """Windows become local_attention; what is no window is left, and near misses say why."""

    name: ClassVar[str] = "raise-local-attention"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        edit = None
        for node in program.graph.nodes:
            if node.op != "call_function" or node.target is not SDPA or not windowed(node):
                continue
            found = match(program, node)
            if isinstance(found, str):
                notes.miss(node, RULE, found)
                continue
            edit = edit or program.edit()
            write(edit, node, found)
            options = found.windows.options
            notes.did(node, RULE, f"windows {options['window']}, shift {options['shift']}, read in place")
        return program if edit is None else edit.finish(self.name)


def windowed(node: fx.Node) -> bool:
    """Whether an SDPA's batch is cut out of something: q's way up holds a value with another batch."""
    batch = node.meta["val"].shape[0]
    current: Any = node.args[0]
    for _ in range(64):
        if not isinstance(current, fx.Node) or not (moves(current) or current.target is aten.linear.default):
            return False
        current = current.args[0]
        value = current.meta.get("val") if isinstance(current, fx.Node) else None
        if isinstance(value, torch.Tensor) and value.dim() == 4 and not _equal(value.shape[0], batch):
            return True
    return False


def _equal(a: Any, b: Any) -> bool:
    return str(a) == str(b)
