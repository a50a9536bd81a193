"""What each op does to a token axis: one rule per op, asked by passes/follow.py.

A rule takes `(follow, node)`, rewrites the node's arguments where they are sized or indexed by token, and returns the
tags of its value (a list of tags where the op gives several). It raises `Lost` where the op mixes, counts or numbers
patches in a way that a shorter axis would change.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from compiled_attn.ir.op import NAMESPACE
from compiled_attn.passes.follow import (
    Dim,
    Follow,
    Lost,
    Tags,
    batch_in,
    latest,
    plain,
    product,
    tokens_in,
)
from compiled_attn.passes.follow_layout import (
    along_other_axes,
    argument,
    cat,
    dimension,
    expand,
    getitem,
    is_tensor,
    merge,
    no_tokens,
    permute,
    pieces,
    repeat,
    select,
    slice_,
    squeeze,
    stack,
    stronger,
    tags_of,
    transpose,
    turned,
    unsqueeze,
    view,
    view_as_complex,
    view_as_real,
)

aten = torch.ops.aten
Rule = Callable[[Follow, fx.Node], Any]
ZERO, ONE, TRUE, FALSE = 0.0, 1.0, True, False


def rule_for(node: fx.Node) -> Rule:
    """The rule of a node's op; one that raises Lost where there is none."""
    if node.target is operator.getitem:
        return getitem
    name = rule_name(node)
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return pointwise
    return unknown


def rule_name(node: fx.Node) -> str:
    """What an op is called in tables of rules: `view` of ATen, `compiled_attn.attention`; empty where it is no op."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    namespace, name = target._schema.name.split("::")
    if namespace == NAMESPACE:
        return f"{NAMESPACE}.{name}"
    return name if namespace == "aten" else f"{namespace}::{name}"


def unknown(_: Follow, node: fx.Node) -> Any:
    raise Lost(node, f"no rule says what {getattr(node.target, '__name__', node.target)} does to tokens")


def alike(f: Follow, node: fx.Node) -> Tags:
    """The value has the shape of the first argument, and each entry only depends on others of its token, or of all."""
    return tags_of(f, node.args[0])


def pointwise(f: Follow, node: fx.Node) -> Tags:
    rank = len(f.shape(node))
    at = [i for i, a in enumerate(node.args) if is_tensor(a)]
    out = merge(f, node, [node.args[i] for i in at], rank)
    for i in at:
        table: Any = node.args[i]
        brought = f.bring(node, table, out, partial(neutral_entry, f, node, i, table))
        if brought is not table:
            node.update_arg(i, brought)
    return out


def neutral_entry(f: Follow, node: fx.Node, position: int, table: fx.Node) -> Any:
    """The fused token's entry in a per-token table that is an operand of an elementwise op."""
    packet = str(node.target).removeprefix("aten.").split(".")[0]
    if packet in ("add", "sub", "rsub"):
        return ZERO
    if packet == "mul":
        return f.multiplier_neutral(node, table)
    if packet == "div" and position == 1:
        return ONE
    if packet == "masked_fill" and position == 1:
        return FALSE
    if packet in ("logical_and", "bitwise_and"):
        return TRUE
    if packet in ("logical_or", "bitwise_or"):
        return FALSE
    if packet == "where" and position == 0:
        kept = [i for i in (1, 2) if is_tensor(node.args[i]) and node.args[i] in f.data]
        if len(kept) == 1:
            return kept == [1]
    raise Lost(node, f"the fused token has no stated entry in {table}, a table indexed by token")


def reduction(f: Follow, node: fx.Node) -> Tags:
    """mean, sum, maximum, ... over any dimensions: over tokens, it is over the tokens that are left."""
    tags = tags_of(f, node.args[0])
    name = str(node.target).split(".")[1]
    position = 2 if name == "linalg_vector_norm" else 1
    given = argument(node, position, "dim", None)
    keep = argument(
        node, position + 1 + (name in ("var", "std") and "correction" not in str(node.target)), "keepdim", False
    )
    keep = keep if isinstance(keep, bool) else False
    every = given is None or given == []
    dims = (
        set(range(len(tags)))
        if every
        else {dimension(d, len(tags)) for d in (given if isinstance(given, (list, tuple)) else [given])}
    )
    if name == "sum":
        counts = [product([p.size for p in tags[d]]) for d in dims if latest((tags[d],)) > 0]
        if counts:
            f.summed[node] = product(counts)
    return tuple(plain(1) if d in dims else t for d, t in enumerate(tags) if keep or d not in dims)


def softmax(f: Follow, node: fx.Node) -> Tags:
    return tags_of(f, node.args[0])


def pooled(f: Follow, node: fx.Node) -> Tags:
    """Adaptive pooling of the last dimension to one value."""
    tags = tags_of(f, node.args[0])
    if list(node.args[1]) != [1]:  # type: ignore[arg-type]
        no_tokens(node, tags[-1:], "it pools tokens by their place")
    return (*tags[:-1], plain(f.shape(node)[-1]))


def linear(f: Follow, node: fx.Node) -> Tags:
    tags = tags_of(f, node.args[0])
    no_tokens(node, tags[-1:], "it multiplies along tokens with a matrix of weights")
    no_tokens(node, tags_of(f, node.args[1]), "its weight is made of tokens")
    return (*tags[:-1], plain(f.shape(node)[-1]))


def normalised(f: Follow, node: fx.Node) -> Tags:
    tags = tags_of(f, node.args[0])
    no_tokens(node, tags[len(tags) - len(node.args[1]) :], "it normalises over tokens")  # type: ignore[arg-type]
    return tags


def matmul(f: Follow, node: fx.Node) -> Tags:
    a, b = node.args[0], node.args[1]
    left, right = tags_of(f, a), tags_of(f, b)
    if len(left) < 2 or len(right) < 2:
        raise Lost(node, "it multiplies tokens with a vector")
    contract(node, left[-1], right[-2])
    rank = max(len(left), len(right))
    lead: list[Dim] = []
    for d in range(rank - 2):
        own = [t[d - (rank - len(t))] for t in (left, right) if d - (rank - len(t)) >= 0]
        found = own[0]
        for other in own[1:]:
            if (tokens_in(found) or tokens_in(other)) and tokens_in(found) != tokens_in(other):
                raise Lost(node, "it pairs tokens with a per-token table of matrices")
            found = stronger(node, found, other)
        lead.append(found)
    return (*lead, left[-2], right[-1])


def contract(node: fx.Node, a: Dim, b: Dim) -> None:
    if (tokens_in(a) or tokens_in(b)) and tokens_in(a) != tokens_in(b):
        raise Lost(node, "it sums over tokens with factors that are not of the same tokens")


def einsum(f: Follow, node: fx.Node) -> Tags:
    equation, operands = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        raise Lost(node, "only einsum equations with every letter written can be followed")
    inputs, output = equation.replace(" ", "").split("->")
    found: dict[str, Dim] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        for letter, dim in zip(letters, tags_of(f, operand), strict=True):
            known = found.get(letter)
            if known is not None and tokens_in(known) != tokens_in(dim):
                raise Lost(node, f"index {letter} counts tokens in one factor and others in another")
            found[letter] = dim if known is None or batch_in(dim) else known
    return tuple(found[letter] for letter in output)


def attention(f: Follow, node: fx.Node) -> Any:
    """q [..., N, D], k and v [..., M, D], mask broadcastable to [..., N, M], which is gathered in both token axes."""
    q, k, v = node.args[:3]
    queries, keys, values = (tags_of(f, x) for x in (q, k, v))
    no_tokens(node, (queries[-1], keys[-1], values[-1]), "tokens stand where the features belong")
    contract(node, keys[-2], values[-2])
    named = str(node.target).startswith(NAMESPACE)
    slot = "bias" if named else "attn_mask"
    mask = argument(node, 3, slot, None)
    if is_tensor(mask):
        square = (*merge(f, node, [q], len(queries))[:-2], queries[-2], keys[-2])
        brought = f.bring(node, mask, square, lambda: TRUE if mask.meta["val"].dtype == torch.bool else ZERO)
        if brought is not mask and slot in node.kwargs:
            node.update_kwarg(slot, brought)
        elif brought is not mask:
            node.update_arg(3, brought)
    out = (*queries[:-1], values[-1])
    if "class_row" in str(node.target):
        return [out, (queries[0], keys[-2])]
    return out


def token_count(f: Follow, node: fx.Node) -> None:
    """The number of tokens asked of a value: what is computed from it is in terms of the tokens before."""
    tensor, d = node.args[0], node.args[1]
    dim = tags_of(f, tensor)[dimension(d, len(f.shape(tensor)))]  # type: ignore[arg-type]
    tokens = tokens_in(dim)
    if tokens is None or tokens.stage == 0:
        return
    source = f.origin
    own = f.of(source) or ()
    axis = next((i for i, d in enumerate(own) if tokens_in(d) is not None), 0)
    first = tokens_in(own[axis]) if own else None
    if len(dim) != 1 or source is None or first is None:
        raise Lost(node, "it asks for the size of a dimension in which tokens and others are merged")
    extra = tokens.before + tokens.after - first.before - first.after
    if extra:
        with f.graph.inserting_before(node):
            total = f.edit.call(aten.sym_size.int, (source, axis), like=node)
            other = f.edit.call(operator.add, (total, extra), like=node)
        node.replace_all_uses_with(other)
    else:
        node.args = (source, axis)


def metadata(_: Follow, node: fx.Node) -> None:
    """_assert_tensor_metadata(x, size, stride, ...): sizes and strides are no longer what they were."""
    node.args = (node.args[0], None, None, *node.args[3:])


def already(_: Follow, node: fx.Node) -> Any:
    raise Lost(node, "the tokens are reorganized here already")


RULES: dict[str, Rule] = {
    **dict.fromkeys(("clone", "_to_copy", "to", "contiguous", "detach", "alias", "dropout", "type_as"), alike),
    **dict.fromkeys(("lift_fresh_copy", "zeros_like", "ones_like", "full_like", "empty_like", "positive"), alike),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax"), softmax),
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), view),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("t", "numpy_T"), turned),
    "permute": permute,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "view_as_real": view_as_real,
    "view_as_complex": view_as_complex,
    "expand": expand,
    "repeat": repeat,
    "slice": slice_,
    "select": select,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), pieces),
    "cat": cat,
    "stack": stack,
    **dict.fromkeys(("roll", "flip"), along_other_axes),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "any", "all", "logsumexp"), reduction),
    "linalg_vector_norm": reduction,
    "adaptive_avg_pool1d": pooled,
    "linear": linear,
    **dict.fromkeys(("layer_norm", "rms_norm"), normalised),
    **dict.fromkeys(("matmul", "bmm", "mm"), matmul),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    f"{NAMESPACE}.attention": attention,
    f"{NAMESPACE}.attention_with_class_row": attention,
    f"{NAMESPACE}.select_tokens": already,
    "sym_size": token_count,
    "_assert_tensor_metadata": metadata,
}
