"""Chooses how each local_attention runs on a GPU: by its template, as dense attention with a mask, or decomposed.

    y = local_attention(q, k, v, table, window=[7, 7], scale=0.2)      stays, for the template; or, on a map of 7 x 7,
                                                                  ->   y = scaled_dot_product_attention(q, k, v, mask)

The form with the least expected seconds is taken, of those that can be: dense attention needs known sizes, a mask that
fits and no query that sees nothing or keys of zeros; the decomposition is asked where the template declines. Seconds
are counted from shapes and a target's peaks, as the roof is that the note states beside; no form is timed. Of capped
scores, which torch's operator does not know, dense attention is the vocabulary's. On a CPU the template is taken where
it accepts, and this pass does nothing. Never changes which keys a query sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn import ops
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.ops.local_geometry import Axis, slots
from compiled_attn.ops.templates import registry, triton_local_attention
from compiled_attn.ops.templates.triton_config import block_of
from compiled_attn.ops.templates.triton_local_attention import CACHE_SPEED, PAIR_FLOPS

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
RULE = "local_attention form"
MASK_BYTES_MOST = 64 * 2**20
DENSE_PAIR_FLOPS = 8  # of a softmax without a mask
DENSE_BLOCK = 64  # keys that a fused operator takes at once
SCORE_MOVES = 5  # times that each score of a decomposed attention is written or read, in float32


@dataclass(frozen=True)
class Call:
    """One call: its tensors' values and its pattern."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    relative: torch.Tensor | None
    axes: tuple[Axis, ...]
    kwargs: dict[str, Any]

    @property
    def sizes(self) -> list[tuple[int, int]] | None:
        """Queries and keys along each axis, where all are numbers."""
        pairs = list(zip(self.q.shape[1:-2], self.k.shape[1:-2], strict=True))
        return pairs if all(isinstance(n, int) for pair in pairs for n in pair) else None

    @property
    def widths(self) -> int:
        return int(self.q.shape[-1]) + int(self.v.shape[-1])

    @property
    def softcap(self) -> float:
        return float(self.kwargs.get("softcap", 0.0))

    @property
    def seen(self) -> int:
        """Keys of a query's window."""
        found = math.prod(a.window + a.sinks for a in self.axes)
        return found if self.sizes is None else min(found, math.prod(m for _, m in self.sizes))


@dataclass(frozen=True)
class Form:
    """One way to run a call, and what it is expected to take for each query of a head."""

    name: str
    seconds: float


def read(node: fx.Node) -> Call:
    """A node's call."""
    values: list[Any] = [a.meta["val"] if isinstance(a, fx.Node) else None for a in (*node.args, None, None)[:5]]
    q, k, v, bias, relative = values
    kwargs = dict(node.kwargs)
    return Call(q, k, v, bias, relative, triton_local_attention.pattern(q, kwargs), kwargs)


def forms(call: Call, target: Target) -> tuple[list[Form], str | None]:
    """The ways that a call can run, fastest first, and why dense attention is not among them where it is not."""
    args = (call.q, call.k, call.v, call.bias, call.relative)
    template, _ = registry.choose(ops.local_attention.name, args, call.kwargs, target)
    found = []
    if template is None:
        found.append(Form("decomposition", decomposed_seconds(call, target)))
    elif template is triton_local_attention.TEMPLATE:
        best = triton_local_attention.chosen(args, call.kwargs, target)[0]
        found.append(Form(template.name, triton_local_attention.seconds(args, call.kwargs, best, target)))
    else:
        return [Form(template.name, 0.0)], "a template of the user's serves it"
    because = undense(call)
    if because is None:
        found.append(Form("dense attention", dense_seconds(call, target)))
    return sorted(found, key=lambda form: form.seconds), because


def undense(call: Call) -> str | None:
    """None where dense attention with a mask computes the call, else the sentence that says why not."""
    if call.sizes is None:
        return "its map has symbolic sizes, the mask is made from numbers"
    if call.relative is not None:
        return "its logits depend on the query"
    if call.axes[0].border == "zero":
        return "keys of zeros beyond its border count"
    step = 16 // call.q.element_size()
    if not call.softcap and (call.q.shape[-1] % step or call.v.shape[-1] % step):
        return f"its head is {call.q.shape[-1]} wide, fused attention takes multiples of {step} in {call.q.dtype}"
    n, m = (math.prod(side) for side in zip(*call.sizes, strict=True))
    heads = call.q.shape[-2] if call.bias is not None else 1
    bytes_of_mask = n * m * heads * call.q.element_size()
    if bytes_of_mask > MASK_BYTES_MOST:
        return f"its mask would take {bytes_of_mask / 2**20:.0f} MiB"
    if not bool(visible(call).any(1).all()):
        return "some of its queries see no key"
    return None


def whole(call: Call) -> bool:
    """Whether each query sees all keys, and adds nothing to their scores."""
    return call.bias is None and bool(visible(call).all())


def visible(call: Call) -> torch.Tensor:
    """[N, M]: whether a query sees a key."""
    return _spread([seen for seen, _, _ in _along(call)])


def _along(call: Call) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each axis [queries, keys]: whether seen, the distance's place in the table, whether a bias belongs to it."""
    found = []
    for axis, (n, m) in zip(call.axes, call.sizes or (), strict=True):
        s = slots(axis, n, m, torch.device("cpu"), single=True)
        counted = s.seen.squeeze(1)
        query = torch.arange(n).unsqueeze(1).expand_as(counted)[counted]
        key, seen = s.index[counted], torch.zeros(n, m, dtype=torch.bool)
        entry, tabled = torch.zeros(n, m, dtype=torch.long), torch.zeros(n, m, dtype=torch.bool)
        seen[query, key] = True
        entry[query, key] = s.offset.squeeze(1)[counted]
        tabled[query, key] = s.tabled.expand_as(counted)[counted]
        found.append((seen, entry, tabled))
    return found


def _spread(parts: list[torch.Tensor]) -> torch.Tensor:
    """Conditions [queries, keys] of each axis -> [N, M], which hold where all do."""
    found = parts[0]
    for part in parts[1:]:
        found = found[:, None, :, None] & part[None, :, None, :]
        found = found.flatten(2).flatten(0, 1)
    return found


def _entries(call: Call) -> torch.Tensor:
    """[N, M]: where a pair's bias lies in a head's table, row-major."""
    found = torch.zeros(1, 1, dtype=torch.long)
    for axis, (_, entry, _) in zip(call.axes, _along(call), strict=True):
        found = (found * axis.offsets)[:, None, :, None] + entry[None, :, None, :]
        found = found.flatten(2).flatten(0, 1)
    return found


def roof_seconds(call: Call, target: Target) -> float:
    """For each query of a head: the products of its window at the peak, or its share of the memory's traffic."""
    shared = math.prod(a.stride / a.block for a in call.axes)  # keys for each query
    moved = call.q.element_size() * (call.widths + shared * call.widths)
    flops = 2 * call.seen * call.widths
    return max(flops / target.flops_per_second(call.q.dtype), moved / target.bytes_per_second)


def dense_seconds(call: Call, target: Target) -> float:
    """All keys of the map, with the mask read from the cache; the scores from memory where they are capped."""
    keys = math.prod(m for _, m in call.sizes or ())
    if call.softcap:
        products = 2 * keys * call.widths / target.flops_per_second(torch.float32)
        return products + 4 * SCORE_MOVES * keys / target.bytes_per_second
    keys = -(-keys // DENSE_BLOCK) * DENSE_BLOCK
    width = block_of(call.q.shape[-1]) + block_of(call.v.shape[-1])
    plain = whole(call)
    pair = 2 * width / target.flops_per_second(call.q.dtype)
    pair += (DENSE_PAIR_FLOPS if plain else PAIR_FLOPS) / target.flops_per_second(torch.float32)
    moved = keys / DENSE_BLOCK * call.widths + (0 if plain else keys)
    return keys * pair + moved * call.q.element_size() / (CACHE_SPEED * target.bytes_per_second)


def decomposed_seconds(call: Call, target: Target) -> float:
    """Products in float32 of gathered windows: single queries' from the cache, blocks' written out, scores too."""
    flops = 2 * call.seen * call.widths / target.flops_per_second(torch.float32)
    size = call.widths * call.q.element_size()
    if all(a.together == 1 for a in call.axes):
        return flops + 2 * call.seen * size / (CACHE_SPEED * target.bytes_per_second)
    shared = math.prod(a.together for a in call.axes)
    return flops + call.seen * (3 * size / shared + 4 * 4) / target.bytes_per_second


def write_dense(edit: Edit, node: fx.Node, call: Call) -> None:
    """Puts dense attention, with the bias and what is hidden as its mask, in the op's place."""
    with edit.graph.inserting_before(node):

        def made(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return edit.call(target, args, kwargs, like=node)

        heads, queries = call.q.shape[-2], [n for n, _ in call.sizes or ()]
        parts = []
        for x, value in zip(node.args[:3], (call.q, call.k, call.v), strict=True):
            flat = made(aten.reshape.default, x, [-1, math.prod(value.shape[1:-2]), *value.shape[-2:]])
            parts.append(made(aten.transpose.int, flat, 1, 2))
        mask = None
        if not whole(call):
            mask = edit.constant(f"{node.name}_seen", visible(call))
        kinds = {"dtype": call.q.dtype, "device": call.q.device}
        added = None
        if call.bias is not None:
            tabled = _spread([t for _, _, t in _along(call)])
            index = edit.constant(f"{node.name}_entries", _entries(call).flatten())
            table = made(aten.reshape.default, made(aten.to.dtype, node.args[3], call.q.dtype), [heads, -1])
            added = made(
                aten.reshape.default, made(aten.index_select.default, table, 1, index), [1, heads, *tabled.shape]
            )
            if not bool(tabled.all()):
                zero = made(aten.scalar_tensor.default, 0.0, **kinds)
                added = made(aten.where.self, edit.constant(f"{node.name}_tabled", tabled), added, zero)
        elif call.softcap and mask is not None:
            added = made(aten.scalar_tensor.default, 0.0, **kinds)
        if added is not None:
            hidden = made(aten.scalar_tensor.default, float("-inf"), **kinds)
            mask = made(aten.where.self, mask, added, hidden)
        if call.softcap:
            options = {"scale": call.kwargs["scale"], "softcap": call.softcap}
            out = made(ops.attention.overload, *parts, mask, **options)
        else:
            out = made(aten.scaled_dot_product_attention.default, *parts, mask, scale=call.kwargs["scale"])
        out = made(aten.clone.default, made(aten.transpose.int, out, 1, 2), memory_format=torch.contiguous_format)
        out = made(aten.reshape.default, out, [-1, *queries, heads, call.v.shape[-1]])
    edit.replace(node, out)


@dataclass(frozen=True)
class ChooseLocalAttention:
    """The expected fastest form of each local_attention on a GPU."""

    name: ClassVar[str] = "choose-local-attention"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        found = [n for n in program.graph.nodes if n.target is ops.local_attention.overload]
        if not found or program.mode != "inference" or target.kind != "cuda":
            return program
        edit = None
        for node in found:
            call = read(node)
            ways, undone = forms(call, target)
            notes.did(node, RULE, ways[0].name, said(call, ways, undone, target))
            if ways[0].name == "dense attention":
                edit = edit or program.edit()
                write_dense(edit, edit.node_of[node], call)
        return edit.finish(self.name) if edit is not None else program


def said(call: Call, ways: list[Form], undone: str | None, target: Target) -> str:
    """What each form and the roof are expected to take: for a picture, or for a thousand queries of a head."""
    if call.sizes is None:
        rows, unit = 1000, "ns a thousand queries of a head"
    else:
        rows, unit = math.prod(n for n, _ in call.sizes) * int(call.q.shape[-2]), "us a picture"
    scale = rows * (1e9 if call.sizes is None else 1e6)
    roof = roof_seconds(call, target)
    text = ", ".join(f"{way.name} {max(way.seconds, roof) * scale:.3g}" for way in ways)
    without = f"; no dense attention, for {undone}" if undone else ""
    return f"{text}, roof {roof * scale:.3g} {unit}, expected and not timed{without}"
