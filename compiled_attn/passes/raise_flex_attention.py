"""Turns FlexAttention calls whose mask follows a pattern into attention that the other passes know.

    o = flex_attention(q, k, v, score_mod, block_mask)     ->     o = scaled_dot_product_attention(q, k, v, mask + bias)

The mask function is asked about every head, query and key. What it lets through must be everything, all earlier keys,
or a pattern of local_attention (which raise-local-attention then finds in the mask). The score function may add numbers
that depend on places and constants, and hide pairs. Before that it may scale the scores and cap them by tanh, which
makes the result the vocabulary's attention(..., softcap=20.0). Any other call stays the FlexAttention call that it is,
with a sentence: it skips blocks, where a dense mask would not. Of the block mask only the function counts, as in eager
mode.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn import ops
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.ir.text import target_text
from compiled_attn.passes.match.positions import Numbering
from compiled_attn.passes.match.windows import Groups, grids, patterns
from compiled_attn.passes.strides import follow_strides, moved

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
FLEX = torch.ops.higher_order.flex_attention
SDPA = aten.scaled_dot_product_attention.default
ADDED = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar}
HIDDEN = {aten.where.self, aten.where.ScalarOther}
TIMES = {aten.mul.Tensor, aten.mul.Scalar}
BY = {aten.div.Tensor, aten.div.Scalar}
# ops that ask their first argument only for its type and place of memory
FILLED = {aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.full_like.default}
PICTURE, SCORE = 0, 0  # first arguments of a mask function, and of a score function, where PICTURE comes second
PAIRS_MOST = 2**25  # of queries and keys, times heads that differ, that functions are asked about


@dataclass(frozen=True)
class Call:
    """One FlexAttention call. score, mask: the functions, with the tensors that they read besides places."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    score: fx.GraphModule
    mask: fx.GraphModule
    scale: float
    score_reads: tuple[Any, ...]
    mask_reads: tuple[Any, ...]


@dataclass(frozen=True)
class Found:
    """A call as plain attention. mask, bias [1 or H, N, M]; says: what the mask lets through; softcap: 0 for none."""

    call: Call
    scale: float
    softcap: float
    causal: bool
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    made_from: tuple[str, ...]
    says: str


def read(program: Program, node: fx.Node) -> Call:
    """A node's arguments by name."""
    args: Any = node.args
    q, k, v, score, block_mask, scale, _, score_reads, mask_reads = args
    scores, mask = (getattr(program.graph_module, x.target) for x in (score, block_mask[-1]))
    return Call(q, k, v, scores, mask, float(scale), tuple(score_reads), tuple(mask_reads))


def match(program: Program, node: fx.Node) -> Found | str:
    """The attention that a FlexAttention node is; a sentence where it stays."""
    call = read(program, node)
    if any(user.args[1] != 0 and user.users for user in node.users if user.target is operator.getitem):
        return "its log-sum-exp is read"
    q_sizes, k_sizes = call.q.meta["val"].shape, call.k.meta["val"].shape
    heads, n, m = q_sizes[1], q_sizes[2], k_sizes[2]
    numbering = Numbering.of(program, [call.q, call.k, call.v])
    if numbering is None or not all(isinstance(size, int) for size in (heads, n, m)):
        return f"its {n} queries and {m} keys are symbols, what a mask function hides is found by numbers"
    differ = heads if _uses_head(call) else 1
    if differ * n * m > PAIRS_MOST:
        return f"its functions would be asked about {differ * n * m} pairs, at most {PAIRS_MOST} are"
    reads: list[torch.Tensor] = []
    for value in (*call.score_reads, *call.mask_reads):
        known = numbering.constant(value) if isinstance(value, fx.Node) else None
        if known is None:
            return f"its functions read {value}, which depends on the input"
        reads.append(known.cpu())
    because = unread(call)
    if because is not None:
        return because
    split = len(call.score_reads)
    try:
        visible = asked(call.mask, [], (differ, n, m), reads[split:]).bool()
        added = asked(call.score, [torch.zeros(())], (differ, n, m), reads[:split])
    except (RuntimeError, TypeError) as error:
        return f"its functions can not be asked about every pair: {str(error).splitlines()[0]}"
    visible = alike(visible & ~added.isneginf())
    known_bias = alike(added.masked_fill(added.isneginf(), 0.0))
    names = {x for value in (*call.score_reads, *call.mask_reads) for x in numbering.made_from(value)}
    says = pattern(visible)
    if says is None:
        return f"its mask over {n} queries and {m} keys follows no window, neighborhood or order"
    bias = known_bias if bool(known_bias.any()) else None
    dtype = call.q.meta["val"].dtype
    if bias is not None and not torch.equal(bias.to(dtype).to(bias.dtype), bias):
        return f"what its score function adds would be rounded to {dtype}"
    causal = says == "all earlier keys" and bias is None and n == m
    mask = None if causal or bool(visible.all()) else visible
    scale, softcap, _ = bent(call.score)
    return Found(call, call.scale * scale, softcap, causal, mask, bias, tuple(sorted(names)), says)


def _uses_head(call: Call) -> bool:
    places = ((call.mask, PICTURE + 1), (call.score, SCORE + 2))
    return any(_counts(function, place) for function, place in places)


def _counts(function: fx.GraphModule, place: int) -> bool:
    """Whether what a function says may depend on its argument at `place`."""
    return any(user.target not in FILLED for user in _inputs(function)[place].users)


def _inputs(function: fx.GraphModule) -> list[fx.Node]:
    return [node for node in function.graph.nodes if node.op == "placeholder"]


def unread(call: Call) -> str | None:
    """Why the functions can not be written as numbers to add; None where they can."""
    for kind, function, place in (("mask", call.mask, PICTURE), ("score", call.score, SCORE + 1)):
        if _counts(function, place):
            return f"its {kind} function depends on the number of the picture"
    _, _, current = bent(call.score)
    while True:
        users = list(current.users)
        if len(users) != 1:
            return f"its score function reads {current.name} {len(users)} times"
        user = users[0]
        if user.op == "output":
            return None
        if user.target in ADDED:
            subtracted = user.target in (aten.sub.Tensor, aten.sub.Scalar) and user.args[0] is not current
            twice = user.args[0] is current and user.args[1] is current
            fits = not (subtracted or twice or user.kwargs.get("alpha", 1) != 1)
        else:
            fits = user.target in HIDDEN and user.args[1] is current and user.args[2] is not current
        if not fits:
            return f"its score function does {target_text(user.target)} to the scores: neither a sum nor a mask"
        if user.target in HIDDEN and not _hides(call.score, user.args[2]):
            return f"its score function replaces scores by {user.args[2]}, which is not minus infinity"
        current = user


def bent(function: fx.GraphModule) -> tuple[float, float, fx.Node]:
    """What a score function does to the scores first: a factor, the cap that follows or 0, and the last node of it."""
    factor, cap, current = 1.0, 0.0, _inputs(function)[SCORE]
    while len(current.users) == 1:
        (user,) = current.users
        number = _times(function, user, current)
        if number is not None:
            factor, cap = (factor, cap * number) if cap else (factor * number, 0.0)
        elif user.target is aten.tanh.default and not cap:
            cap = 1.0
        else:
            break
        current = user
    return factor * (cap or 1.0), abs(cap), current


def _times(function: fx.GraphModule, node: fx.Node, value: fx.Node) -> float | None:
    """The number, other than 0, that a node multiplies `value` by; None where it does something else."""
    if node.target not in TIMES | BY or node.kwargs or list(node.args).count(value) != 1:
        return None
    inverse, first = node.target in BY, node.args[0] is value
    other: Any = node.args[1] if first else node.args[0]
    if isinstance(other, fx.Node) and other.op == "get_attr":
        held: torch.Tensor = getattr(function, str(other.target))
        other = held.item() if held.numel() == 1 else None
    if not isinstance(other, (int, float)) or not math.isfinite(other) or other == 0 or (inverse and not first):
        return None
    return 1.0 / other if inverse else float(other)


def _hides(function: fx.GraphModule, value: Any) -> bool:
    """Whether a value inside a score function is minus infinity."""
    if isinstance(value, fx.Node) and value.target in (aten.scalar_tensor.default, aten.full.default):
        value = value.args[0 if value.target is aten.scalar_tensor.default else 1]
    if isinstance(value, fx.Node) and value.op == "get_attr":
        held: torch.Tensor = getattr(function, str(value.target))
        value = held.item() if held.numel() == 1 else None
    return isinstance(value, float) and value == float("-inf")


def asked(
    function: fx.GraphModule, before: Sequence[torch.Tensor], sizes: tuple[int, int, int], reads: Sequence[torch.Tensor]
) -> torch.Tensor:
    """What a function says of every head, query and key [H, N, M]; `before`: its arguments before the places."""

    def one(head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        said: torch.Tensor = function(*before, torch.zeros((), dtype=torch.int32), head, query, key, *reads)
        return said + torch.zeros((), dtype=said.dtype) if said.dtype != torch.bool else said

    places = [torch.arange(size, dtype=torch.int32) for size in sizes]
    each_key = torch.vmap(one, in_dims=(None, None, 0))
    each_query = torch.vmap(each_key, in_dims=(None, 0, None))
    with torch.no_grad():
        found: torch.Tensor = torch.vmap(each_query, in_dims=(0, None, None))(*places)
    return found.expand(sizes).contiguous()


def alike(value: torch.Tensor) -> torch.Tensor:
    """[1, N, M] where all heads say the same."""
    return value[:1] if torch.equal(value, value[:1].expand_as(value)) else value


def pattern(visible: torch.Tensor) -> str | None:
    """In words what [1 or H, N, M] lets through, where it is something that other passes know."""
    if bool(visible.all()):
        return "all keys"
    heads, n, m = visible.shape
    if heads != 1 or n != m:
        return None
    if torch.equal(visible[0], torch.ones(n, m, dtype=torch.bool).tril()):
        return "all earlier keys"
    places = torch.arange(n).unsqueeze(0)
    groups = Groups(places, places, visible)
    return next(("a local pattern" for grid in grids(n, []) if next(patterns(groups, grid, grid), None)), None)


def write(edit: Edit, node: fx.Node, found: Found) -> dict[fx.Node, fx.Node]:
    """Puts plain attention in the call's place, {new result: old}; the rows of shared heads are spread."""
    new, call = edit.node_of[node], found.call
    first = next((user for user in new.users if user.args[1] == 0), None)
    if first is None:
        return {}
    with edit.graph.inserting_before(new):
        q, k, v = (edit.node_of[x] for x in (call.q, call.k, call.v))
        k, v = (_spread(edit, new, x, q.meta["val"].shape[1]) for x in (k, v))
        kept = found.mask
        if found.bias is not None:
            kept = found.bias.to(q.meta["val"].dtype)
            kept = kept if found.mask is None else kept.masked_fill(~found.mask, float("-inf"))
        if found.softcap and kept is not None and kept.dtype == torch.bool:
            kept = torch.zeros(kept.shape, dtype=q.meta["val"].dtype).masked_fill(~kept, float("-inf"))
        mask = None
        if kept is not None:
            kept = kept.unsqueeze(0).to(q.meta["val"].device)
            mask = edit.constant(f"{node.name}_mask", kept, made_from=found.made_from)
        if found.softcap:
            options = {"scale": found.scale, "causal": found.causal, "softcap": found.softcap}
            out = edit.call(ops.attention.overload, (q, k, v, mask), options, like=new)
        else:
            out = edit.call(SDPA, (q, k, v, mask, 0.0, found.causal), {"scale": found.scale}, like=new)
    edit.replace(first, out)
    return {out: first}


def _spread(edit: Edit, like: fx.Node, x: fx.Node, heads: int) -> fx.Node:
    """k or v with each head as often as heads of q share it."""
    batch, own, n, width = x.meta["val"].shape
    if own == heads:
        return x
    batch = -1 if not isinstance(batch, int) else batch
    x = edit.call(aten.unsqueeze.default, (x, 2), like=like)
    x = edit.call(aten.expand.default, (x, [-1, own, heads // own, n, width]), like=like)
    return edit.call(aten.reshape.default, (x, [batch, heads, n, width]), like=like)


@dataclass(frozen=True)
class RaiseFlexAttention:
    """FlexAttention calls with a known pattern as plain attention with a mask; the others say why not."""

    name: ClassVar[str] = "raise-flex-attention"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        if program.mode != "inference":
            return program
        edit = None
        written: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            if node.target is not FLEX:
                continue
            found = match(program, node)
            if isinstance(found, Found) and found.softcap and target.kind == "cuda":
                found = f"its scores are capped at {found.softcap:g}, and no kernel of windows bends them on a GPU"
            if isinstance(found, str):
                notes.miss(node, self.name, found)
                continue
            edit = edit or program.edit()
            written |= write(edit, node, found)
            says = f"attention to {found.says}" + (" with a bias" if found.bias is not None else "")
            notes.did(node, self.name, says + (f", capped at {found.softcap:g}" if found.softcap else ""))
        if edit is None:
            return program
        follow_strides(edit, moved(written))
        return edit.finish(self.name)
