"""Finds attention over full caches that are arguments: by what the values are, never by name or module.

    c = index_copy(%cache, 2, seen + arange(T), k)      the cache [B, G, capacity, D] is written back
    o = scaled_dot_product_attention(q, repeat(c), repeat(d), mask)      mask: slot <= seen + row, perhaps in a window

Masks and indices are asked for their values: the part of the graph that makes them is run for several states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.program import Program

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
COPIES = (aten.clone.default, aten.alias.default, aten.contiguous.default)
REPEATS = (aten.expand.default, aten.unsqueeze.default, aten.repeat_interleave.self_int)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class CachedLayer:
    """One attention over a full cache. index: node [T], the slots of the new tokens. window: 0 for none."""

    attention: fx.Node
    key_cache: fx.Node
    value_cache: fx.Node
    keys: fx.Node
    values: fx.Node
    index: fx.Node
    key_write: fx.Node
    value_write: fx.Node
    scale: float
    window: int


class Unlike(Exception):
    """An attention is none over a full cache, because of `because`."""

    def __init__(self, because: str) -> None:
        super().__init__(because)
        self.because = because


def cached_layer(program: Program, graph: fx.Graph, node: fx.Node) -> CachedLayer:
    """The layer of an SDPA node of the graph, a copy of the program's. Raises Unlike."""
    q, k, v = node.args[:3]
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | dict(node.kwargs)
    if given.get("dropout_p") or given.get("is_causal"):
        raise Unlike("it has dropout, or a causal mask that does not know how many tokens came before")
    keys, values = _written(graph, _unrepeated(k)), _written(graph, _unrepeated(v))
    if keys.args[2] is not values.args[2] or keys.args[0] is values.args[0]:
        raise Unlike("keys and values are written at places that are not one node")
    index, cache = keys.args[2], keys.args[0]
    capacity = cache.meta["val"].shape[2]  # type: ignore[union-attr]
    if not isinstance(capacity, int):
        raise Unlike("the length of its cache is symbolic")
    mask = given.get("attn_mask")
    if not isinstance(mask, fx.Node):
        raise Unlike("it has no mask, so that it sees slots that are not written yet")
    window = mask_window(program, index, mask, capacity)  # type: ignore[arg-type]
    scale = given.get("scale")
    width = q.meta["val"].shape[3]  # type: ignore[union-attr]
    return CachedLayer(
        attention=node,
        key_cache=cache,  # type: ignore[arg-type]
        value_cache=values.args[0],  # type: ignore[arg-type]
        keys=keys.args[3],  # type: ignore[arg-type]
        values=values.args[3],  # type: ignore[arg-type]
        index=index,  # type: ignore[arg-type]
        key_write=keys,
        value_write=values,
        scale=float(width) ** -0.5 if scale is None else float(scale),  # type: ignore[arg-type]
        window=window,
    )


def _unrepeated(value: Any) -> fx.Node:
    """The keys or values [B, G, S, D] behind a repetition for every query head: unsqueeze, expand, copy, view; or by
    repeat_interleave.
    """
    node: fx.Node = value
    while isinstance(node, fx.Node) and node.target in (*COPIES, *VIEWS, *REPEATS):
        if node.target is aten.repeat_interleave.self_int and node.args[2:] != (1,):
            raise Unlike(f"{node.name} repeats its keys otherwise than head by head")
        if node.target is aten.unsqueeze.default and node.args[1] != 2:
            raise Unlike(f"{node.name} repeats its keys otherwise than head by head")
        if node.target is aten.expand.default:
            old, new = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
            if len(new) != 5 or old[2] != 1 or not all(_same(old[i], new[i]) for i in (0, 1, 3, 4)):
                raise Unlike(f"{node.name} repeats its keys otherwise than head by head")
        node = node.args[0]  # type: ignore[assignment]
    found, repeated = node.meta["val"].shape, value.meta["val"].shape
    if len(found) != 4 or not all(_same(found[i], repeated[i]) for i in (0, 2, 3)):
        raise Unlike("its keys are not those of a cache, head by head")
    return node


def _written(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The index_copy that writes new rows into a cache, which is an argument that is written back."""
    if node.target is not aten.index_copy.default or node.args[1] != 2:
        raise Unlike(f"{node.name} is no index_copy into dimension 2 of a cache")
    output = next(n for n in graph.nodes if n.op == "output")
    cache: Any = node.args[0]
    if cache.op != "placeholder" or node not in output.all_input_nodes:
        raise Unlike(f"{node.name} does not write into an argument")
    if any(user is not node and user.target is not aten.sym_size.int for user in cache.users):
        raise Unlike(f"the cache {cache.name} is read by others too")
    return node


def mask_window(program: Program, index: fx.Node, mask: fx.Node, capacity: int) -> int:
    """The window of a causal mask over the slots of a cache, 0 for none, found by asking for the mask's values.

    Raises Unlike where it is another mask, or where the index does not count on from a number that is an argument.
    """
    seen, sizes = _counter(index), _size_choices(program)
    windows = set()
    for size in sizes:
        count = _concrete(index.meta["val"].shape[0], size)
        if count > capacity:
            continue
        half, step = capacity // 2, max(1, capacity // 16)
        for past in sorted(
            {*range(0, capacity, step), 1, half - 1, half, half + 1, capacity - count - 1, capacity - count}
        ):
            if past < 0 or past + count > capacity:
                continue
            known = {seen: torch.tensor(past)}
            try:
                places, seeing = (evaluate(n, known, partial(_stand_in, program, size)) for n in (index, mask))
            except (RuntimeError, TypeError, KeyError) as error:
                raise Unlike(f"its mask can not be asked for its values: {str(error).splitlines()[0]}") from error
            if not torch.equal(places, torch.arange(past, past + count)):
                raise Unlike(f"{index.name} is not {seen.name} + 0, 1, 2, ...")
            if seeing.dtype != torch.bool:
                added, seeing = seeing, seeing > torch.finfo(seeing.dtype).min / 2
                if bool(added[seeing].any()):
                    raise Unlike("its mask adds numbers to the scores of what is seen, such as ALiBi's, slot by slot")
            windows.add(_window(seeing, places, capacity))
    wanted = {w for w in windows if w}
    if len(wanted) > 1 or not windows:
        raise Unlike("its mask is another one from step to step")
    return wanted.pop() if wanted else 0


def _window(seeing: torch.Tensor, places: torch.Tensor, capacity: int) -> int:
    """Window of the mask [.., .., T, capacity]; 0 where every earlier slot is seen."""
    slots = torch.arange(capacity)
    ago = places[:, None] - slots
    flat = seeing.expand(*seeing.shape[:-2], len(places), capacity).reshape(-1, len(places), capacity)
    if not all(torch.equal(flat[0], other) for other in flat):
        raise Unlike("its mask differs from text to text or from head to head")
    if torch.equal(flat[0], ago >= 0):
        return 0
    width = int(ago[flat[0]].max()) + 1 if bool(flat[0].any()) else 0
    if width > 0 and torch.equal(flat[0], (ago >= 0) & (ago < width)):
        return width
    raise Unlike("its mask is neither causal nor causal in a window")


def _counter(index: fx.Node) -> fx.Node:
    """The one argument that the slots of the new tokens are counted from: a whole number without dimensions."""
    found = [
        n
        for n in sources(index)
        if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].dim() == 0
    ]
    if len(found) != 1:
        raise Unlike(f"{index.name} counts from no argument, or from several")
    return found[0]


def sources(node: fx.Node) -> list[fx.Node]:
    """What a node's numbers are made of, itself included; what only gives sizes does not count."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            if node.target is not aten.sym_size.int:
                stack += node.all_input_nodes
    return list(found)


def evaluate(node: fx.Node, known: Mapping[fx.Node, Any], leaf: Callable[[fx.Node], Any]) -> Any:
    """The value of a node: of those in `known` as given, of other placeholders by `leaf`, of calls by calling."""
    values = dict(known)

    def of(node: fx.Node) -> Any:
        if node not in values:
            if node.op == "placeholder" or node.target is aten.sym_size.int:
                values[node] = leaf(node)
            else:
                for source in node.all_input_nodes:
                    of(source)
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[node]

    return of(node)


def _size_choices(program: Program) -> list[dict[Any, int]]:
    """Sizes for every symbol of the program: its smallest, some in between, its largest."""
    symbols: set[Any] = set()
    for node in program.inputs:
        if isinstance(node.meta["val"], torch.Tensor):
            for size in node.meta["val"].shape:
                symbols |= set(getattr(_torch.expression(size), "free_symbols", ()))
    found = []
    for wish in (1, 3, 8):
        chosen = {}
        for symbol in symbols:
            low, high = _torch.symbol_range(program.shape_env, symbol, program.ranges)
            chosen[symbol] = max(low, min(wish, high if high is not None else wish))
        found.append(chosen)
    return found


def _concrete(size: Any, chosen: Mapping[Any, int]) -> int:
    expression = _torch.expression(size)
    return int(expression) if isinstance(expression, int) else int(expression.subs(chosen))


def _stand_in(program: Program, chosen: Mapping[Any, int], node: fx.Node) -> Any:
    """A size as chosen, or a constant; what reads other arguments is no place or mask of ours."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return _concrete(value, chosen)
    tensor = program.tensor_of(node)
    if tensor is None:
        raise Unlike(f"its mask or its places are made of the argument {node.name}")
    return tensor


def _same(a: Any, b: Any) -> bool:
    return _torch.statically_true(a == b)
