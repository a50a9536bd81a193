"""The gradients of local attention as two Triton kernels (kernels/local_attention_rows.py and _columns.py).

Memory: beside the gradients themselves, two float32 numbers for each query and head; scores are computed again. A tile
of queries is the forward's; a box of keys, whose queries' windows overlap likewise, is as near a cube as its sizes let.
"""

from __future__ import annotations

from typing import Any

import torch

from compiled_attn.ops.local_geometry import Axis
from compiled_attn.ops.templates import triton_local_attention
from compiled_attn.ops.templates.triton_config import Config, block_of, kind_of, offered

ROWS, COLUMNS = "local_attention_rows", "local_attention_columns"
WIDTHS = (32, 64, 128, 256)  # columns that a head may fill; beside relative logits, as many as in the forward


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernels give the gradients of this call of local_attention on `target`, else why not."""
    because = triton_local_attention.accepts(args, kwargs, target)
    if because is not None:
        return because
    if chosen(args, target) is None:
        return f"no configuration of its gradients fits target {target.name} without spilling"
    return None


def chosen(args: tuple[Any, ...], target: Any) -> tuple[Config, Config] | None:
    """A configuration for each kernel that fits `target`; None where there is none."""
    q, _, v, _, relative = (*args, None, None)[:5]
    block = max(held(q.shape[-1]), held(v.shape[-1]))
    name = case(q.dtype, block, rank=q.dim() - 3, relative=relative is not None)
    rows, columns = (offered(kernel, name, configs(q.dtype, block), target) for kernel in (ROWS, COLUMNS))
    return (rows[0], columns[0]) if rows and columns else None


def held(width: int) -> int:
    """Columns that a head of `width` takes."""
    return max(WIDTHS[0], block_of(width))


def box(axes: tuple[Axis, ...], keys: Any, room: int) -> tuple[int, ...]:
    """Keys of a program along each axis: a power of two each, at most `room` in all, the smallest grown first."""
    sizes = [1] * len(axes)
    classes = [room if not isinstance(n, int) else -(-n // a.dilation) for a, n in zip(axes, keys, strict=True)]
    while True:
        total = 1
        for size in sizes:
            total *= size
        open_axes = [i for i, size in enumerate(sizes) if size < classes[i]]
        if total * 2 > room or not open_axes:
            return tuple(sizes)
        sizes[min(reversed(open_axes), key=lambda i: sizes[i])] *= 2


def parts(axis: Axis, keys: Any, tile: int) -> Any:
    """Boxes of all classes along an axis."""
    members = (keys + axis.dilation - 1) // axis.dilation
    return axis.dilation * ((members + tile - 1) // tile)


def case(dtype: torch.dtype, block: int, *, rank: int, relative: bool = False) -> str:
    """The name under which machine code is recorded: with a bias, and sinks where they may be; logits for any rank."""
    return f"{kind_of(dtype)} d{block} {'relative' if relative else f'{rank}d'}"


def configs(dtype: torch.dtype, block: int) -> tuple[Config, ...]:
    """Candidates for a head that fills `block` columns; float32 is multiplied in float32 ("ieee")."""
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return tuple(
        Config((("BLOCK_N", n), ("BLOCK_M", m), ("PRECISION", precision)), warps, 1)
        for n, m, warps, narrowest, widest in _SIZES
        if narrowest <= block <= widest
    )


# queries, keys, warps; the narrowest and widest head it is a candidate for
_SIZES = (
    (32, 32, 4, 32, 32),
    (16, 32, 4, 32, 32),
    (32, 32, 8, 64, 128),
    (16, 16, 4, 32, 64),
    (16, 16, 8, 64, 256),
    (16, 16, 4, 128, 256),
    (16, 16, 2, 32, 32),
    (16, 32, 8, 128, 128),
    (16, 16, 16, 256, 256),
)
