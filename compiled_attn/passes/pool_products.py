"""Makes averages over uneven bands products with constant matrices.

    y = adaptive_avg_pool1d(x[B, C, L], [n])    ->    y = permute(bmm(expand(m[n, L]), permute(x)), [0, 2, 1])

m[i, l] is one over the size of band i where l lies in it, else 0; of a map, l counts all pixels and i all fields. Bands
that all have one size are left to Inductor, whose loop over them is short. Of uneven ones it writes out every place of
the largest with a condition each, which took most of the time of compiling a network with 9 bands of 196 pixels.

Never touches a symbolic size, nor where the matrix would have more than `LARGEST` elements.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.passes.strides import follow_strides, moved

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
RULE = "pool-products"
POOLS: dict[Any, int] = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool2d.default: 2,
}
LARGEST = 1 << 16


def bands(size: int, count: int) -> torch.Tensor:
    """The matrix [count, size] whose product with `size` numbers averages them in ATen's adaptive bands."""
    place, band = torch.arange(size), torch.arange(count)[:, None]
    inside = (place >= band * size // count) & (place < -(-(band + 1) * size // count))
    return inside.double() / inside.sum(1, keepdim=True)


def refuses(node: fx.Node) -> str | None:
    """Because of what a pool stays as it is."""
    value, sizes, counts = parts(node)
    if not all(isinstance(n, int) for n in (*sizes, *counts)):
        return "its sizes are symbolic"
    if not value.dtype.is_floating_point or value.dim() != len(sizes) + 2:
        return f"its input is {value.dtype} of {value.dim()} dimensions"
    if all(count and size % count == 0 for size, count in zip(sizes, counts, strict=True)):
        return "its bands have one size"
    if not all(counts) or math.prod(sizes) * math.prod(counts) > LARGEST:
        return f"a matrix of {' x '.join(map(str, counts))} bands of {' x '.join(map(str, sizes))} places is large"
    return None


def parts(node: fx.Node) -> tuple[torch.Tensor, list[Any], list[Any]]:
    """The fake value that is pooled, the sizes of its pooled axes, and into how many bands each is cut."""
    args: Any = node.args
    value, given, rank = args[0].meta["val"], args[1], POOLS[node.target]
    counts = list(given) if isinstance(given, (list, tuple)) else [given]
    return value, list(value.shape[-rank:]), counts if len(counts) == rank else counts * rank


def write(edit: Edit, node: fx.Node, matrix: fx.Node) -> fx.Node:
    """matrix [n, L] times the map [B, L, C], L places of all pooled axes."""
    x: Any = node.args[0]
    value, _, counts = parts(node)
    with edit.graph.inserting_before(node):
        batch, channels = (
            n if isinstance(n, int) else edit.call(aten.sym_size.int, (x, d), like=node)
            for d, n in enumerate(value.shape[:2])
        )
        flat = edit.call(aten.reshape.default, (x, [batch, channels, matrix.meta["val"].shape[1]]), like=node)
        places = edit.call(aten.permute.default, (flat, [0, 2, 1]), like=node)
        weights = edit.call(aten.unsqueeze.default, (matrix, 0), like=node)
        weights = edit.call(aten.expand.default, (weights, [batch, -1, -1]), like=node)
        means = edit.call(aten.bmm.default, (weights, places), like=node)
        y = edit.call(aten.permute.default, (means, [0, 2, 1]), like=node)
        return edit.call(aten.reshape.default, (y, [batch, channels, *counts]), like=node) if len(counts) > 1 else y


@dataclass(frozen=True)
class PoolProducts:
    """Averages over uneven bands become products with constant matrices."""

    name: ClassVar[str] = RULE
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        if program.mode != "inference":
            return program
        edit: Edit | None = None
        matrices: dict[Any, fx.Node] = {}
        written: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            if node.target not in POOLS:
                continue
            because = refuses(node)
            if because is not None:
                notes.miss(node, RULE, because)
                continue
            edit = edit or program.edit()
            value, sizes, counts = parts(node)
            key = (*sizes, *counts, value.dtype)
            if key not in matrices:
                matrix = functools.reduce(torch.kron, map(bands, sizes, counts)).to(value.dtype)
                matrices[key] = edit.constant("bands", matrix)
            new = write(edit, edit.node_of[node], matrices[key])
            written[new] = node
            edit.replace(edit.node_of[node], new)
            notes.did(node, RULE, f"{' x '.join(map(str, counts))} bands of {' x '.join(map(str, sizes))} places")
        if edit is None:
            return program
        follow_strides(edit, moved(written))
        return edit.finish(self.name)
