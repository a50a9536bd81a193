"""Local attention as a Triton kernel (kernels/local_attention.py): boxes of queries that share their windows' keys.

Memory: a program holds its queries, the running output and, through the software pipeline, `stages` blocks of keys and
values; the bias is read from its table. A box needs every pair of its queries with the union of its windows, so its
size is a trade of wasted pairs against keys read again; `tiles` finds the shape, `seconds` says what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from compiled_attn.ops.local_geometry import Axis, axes_of
from compiled_attn.ops.templates.base import Template
from compiled_attn.ops.templates.triton_config import (
    BLOCKS,
    DTYPES,
    Config,
    block_of,
    kind_of,
    offered,
    unfit,
    unfit_widths,
)

NAME = "triton_local_attention"
KERNEL = "local_attention"
LONGEST = 2**14
WIDEST_RELATIVE = 128
# float32 operations on a pair of query and key beside the two products: its place, the bias, the softmax
PAIR_FLOPS = 20
# a key that another tile has read comes from the second-level cache, this many times faster than from memory
CACHE_SPEED = 3


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::local_attention, else why not."""
    q, k, v, bias, relative = (*args, None, None)[:5]
    because = unfit(target)
    if because is not None:
        return because
    if q.dtype not in DTYPES:
        return f"its elements are {q.dtype}, the kernel reads float32, float16 and bfloat16"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q is {q.dtype} but k is {k.dtype} and v is {v.dtype}"
    for name, tensor in (("bias is", bias), ("relative logits are", relative)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"its {name} {tensor.dtype}, the kernel adds float32, float16 and bfloat16"
    if kwargs.get("softcap", 0.0):
        return f"its scores are capped at {kwargs['softcap']:g}, the kernel bends none"
    narrowed = (BLOCKS[-1], "") if relative is None else (WIDEST_RELATIVE, " beside relative logits")
    because = unfit_widths(q, v, *narrowed)
    if because is not None:
        return because
    if kwargs["scale"] == 0 and (bias is not None or relative is not None):
        return "its scale is 0, by which the kernel divides what is added to the scores"
    if max(kwargs["window"]) > LONGEST:
        return f"its window is {max(kwargs['window'])} long, the kernel's tables hold distances up to {LONGEST}"
    if not chosen(args, kwargs, target):
        return f"no configuration for its head width {q.shape[-1]} fits target {target.name} without spilling"
    return None


TEMPLATE = Template(NAME, "local_attention", "cuda", accepts)


def chosen(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[Config]:
    """The configurations that fit `target` for this call, the one that is expected to be fastest first."""
    q, _, v, _, relative = (*args, None, None)[:5]
    block = max(block_of(q.shape[-1]), block_of(v.shape[-1]))
    name = case(q.dtype, block, rank=q.dim() - 3, relative=relative is not None)
    fitting = offered(KERNEL, name, configs(q.dtype, block), target)
    return sorted(fitting, key=lambda config: seconds(args, kwargs, config, target))


def pattern(q: torch.Tensor, kwargs: dict[str, Any]) -> tuple[Axis, ...]:
    """The axes of a call by its keyword arguments."""
    options = {name: value for name, value in kwargs.items() if name not in ("scale", "softcap")}
    return axes_of(q.dim() - 3, **options)


def seconds(args: tuple[Any, ...], kwargs: dict[str, Any], config: Config, target: Any) -> float:
    """Expected seconds for each query of a head: pairs at the device's peaks, keys and values from the cache."""
    q, k, v = args[:3]
    axes = pattern(q, kwargs)
    _, pairs, keys = plan(axes, _known(q.shape[1:-2]), _known(k.shape[1:-2]), config)
    width = block_of(q.shape[-1]) + block_of(v.shape[-1])
    pair = 2 * width / target.flops_per_second(q.dtype) + PAIR_FLOPS / target.flops_per_second(torch.float32)
    key = (q.shape[-1] + v.shape[-1]) * q.element_size() / (CACHE_SPEED * target.bytes_per_second)
    return pairs * pair + keys * key


def tiles(q: torch.Tensor, k: torch.Tensor, axes: tuple[Axis, ...], config: Config) -> tuple[int, ...]:
    """Queries of a program along each axis."""
    return plan(axes, _known(q.shape[1:-2]), _known(k.shape[1:-2]), config)[0]


def programs(axes: tuple[Axis, ...], tile: tuple[int, ...], queries: Any) -> Any:
    """Programs for one head of one picture; the kernel counts its tiles alike."""
    return math.prod(_parts(a, n, t) for a, n, t in zip(axes, queries, tile, strict=True))


@lru_cache(maxsize=4096)
def plan(
    axes: tuple[Axis, ...], queries: tuple[int | None, ...], keys: tuple[int | None, ...], config: Config
) -> tuple[tuple[int, ...], float, float]:
    """The tile with the fewest pairs, and for each query: pairs that are computed, and keys that are read.

    A size that is not known counts as one that its tiles fill.
    """
    block_n, block_m = config.constants["BLOCK_N"], config.constants["BLOCK_M"]

    def counts(tile: tuple[int, ...]) -> tuple[float, float]:
        each = 1.0  # programs for each query
        for a, n, t in zip(axes, queries, tile, strict=True):
            each *= 1 / t if n is None else _parts(a, n, t) / max(n, 1)
        spans = [_span(a, n, t) for a, n, t in zip(axes, keys, tile, strict=True)]
        slots = -(-(math.prod(spans) + axes[-1].sinks) // block_m) * block_m
        return each * slots * block_n, each * slots

    best = min(_boxes(axes, queries, block_n), key=lambda tile: (*counts(tile), tile[::-1]))
    return (best, *counts(best))


def _boxes(axes: tuple[Axis, ...], queries: tuple[int | None, ...], room: int) -> Iterator[tuple[int, ...]]:
    """Shapes of at most `room` queries that cut no block in two unevenly."""
    axis, size = axes[0], queries[0]
    members = room if size is None else max(1, -(-size // axis.dilation))
    for length in range(1, min(room, members) + 1):
        if length % axis.block == 0 or axis.block % length == 0 or length == members:
            for rest in _boxes(axes[1:], queries[1:], room // length) if len(axes) > 1 else ((),):
                yield (length, *rest)


def _span(axis: Axis, keys: int | None, tile: int) -> int:
    """Most keys along an axis that `tile` neighboring queries see together."""
    if tile % axis.block == 0 or axis.block % tile == 0:
        blocks = -(-tile // axis.block)
    else:
        blocks = (tile + axis.block - 2) // axis.block + 1
    span = (blocks - 1) * axis.stride + axis.window
    return span if keys is None or axis.border == "zero" else min(span, max(1, -(-keys // axis.dilation)))


def _parts(axis: Axis, queries: Any, tile: int) -> Any:
    lead = axis.block - axis.shift if axis.shift > 0 else 0
    members = (queries + axis.dilation - 1) // axis.dilation
    return axis.dilation * ((members + lead + tile - 1) // tile)


def _known(sizes: Any) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in sizes)


def case(dtype: torch.dtype, block: int, *, rank: int, relative: bool) -> str:
    """The name under which machine code is recorded: with a bias, sinks where they may be; in full where `relative`."""
    return f"{kind_of(dtype)} d{block} {'relative' if relative else f'{rank}d'}"


def configs(dtype: torch.dtype, block: int) -> tuple[Config, ...]:
    """Candidates for a head that fills `block` columns; float32 is multiplied in float32 ("ieee")."""
    return tuple(
        Config((("BLOCK_N", n), ("BLOCK_M", m), ("PRECISION", precision)), warps, stages)
        for n, m, precision, warps, stages, narrowest, widest in (_FLOAT if dtype == torch.float32 else _HALF)
        if narrowest <= block <= widest
    )


# queries, keys, precision of float32 products, warps, stages; the narrowest and widest head it is a candidate for
_HALF = (
    (64, 32, "tf32", 4, 3, 16, 32),
    (32, 32, "tf32", 2, 3, 16, 32),
    (16, 32, "tf32", 1, 3, 16, 32),
    (64, 32, "tf32", 8, 2, 64, 64),
    (32, 32, "tf32", 4, 2, 16, 128),
    (16, 32, "tf32", 2, 2, 64, 64),
    (32, 32, "tf32", 8, 2, 256, 256),
    (16, 32, "tf32", 4, 2, 128, 256),
    (16, 32, "tf32", 8, 1, 256, 256),
)
_FLOAT = (
    (32, 32, "ieee", 4, 2, 16, 32),
    (16, 32, "ieee", 4, 2, 16, 64),
    (16, 16, "ieee", 8, 1, 64, 256),
    (16, 16, "ieee", 8, 2, 256, 256),
)
