"""A decode step's attention over a slot cache in Triton (kernels/cached_attention.py), split over the slots.

Memory: scores of all slots of a text's heads in float32, written once and read once for the mass, and a partial sum a
split; keys and values are read once. A text gives few programs (its key heads), so the slots are divided into SPLITS.
"""

from __future__ import annotations

from typing import Any

import torch

from compiled_attn.ops.templates.base import Template
from compiled_attn.ops.templates.triton_config import (
    DTYPES,
    Config,
    block_of,
    kind_of,
    offered,
    unfit,
    unfit_widths,
)

NAME = "triton_cached_attention"
SPLIT_KERNEL, COMBINE_KERNEL = "cached_attention_split", "cached_attention_combine"
SHARE_MOST = 16  # query heads a key head, the rows of one product
SPLITS = 16  # most parts of a text's slots


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernels cover this call of compiled_attn::cached_attention, else why not."""
    q, k, v = args[:3]
    because = unfit(target)
    if because is not None:
        return because
    if q.dtype not in DTYPES:
        return f"its elements are {q.dtype}, the kernel reads float32, float16 and bfloat16"
    if not isinstance(q.shape[2], int) or q.shape[2] != 1:
        return f"it has {q.shape[2]} queries a head, which a product of matrices serves better"
    if not isinstance(q.shape[1], int) or not isinstance(k.shape[1], int):
        return "its number of heads is symbolic"
    if q.shape[1] // k.shape[1] > SHARE_MOST:
        return f"{q.shape[1] // k.shape[1]} query heads share a key head, the kernel takes up to {SHARE_MOST}"
    because = unfit_widths(q, v)
    if because is not None:
        return because
    if not all(chosen(args, kwargs, target)):
        return f"no configuration for its head width {q.shape[-1]} fits target {target.name} without spilling"
    return None


TEMPLATE = Template(NAME, "cached_attention", "cuda", accepts)


def chosen(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> tuple[list[Config], list[Config]]:
    """The configurations of both kernels that fit `target` for this call, the most promising first."""
    del kwargs
    q, _, v = args[:3]
    block = max(block_of(q.shape[-1]), block_of(v.shape[-1]))
    name = case(q.dtype, block)
    return (
        offered(SPLIT_KERNEL, name, split_configs(q.dtype, block), target),
        offered(COMBINE_KERNEL, name, combine_configs(), target),
    )


def part(config: Config, slots: Any) -> Any:
    """Slots of one split: a multiple of the block, so that there are at most SPLITS of them."""
    block = config.constants["BLOCK_S"]
    return ((slots + SPLITS * block - 1) // (SPLITS * block)) * block


def case(dtype: torch.dtype, block: int) -> str:
    """The name under which this specialisation's machine code is recorded."""
    return f"{kind_of(dtype)} d{block}"


def split_configs(dtype: torch.dtype, block: int) -> tuple[Config, ...]:
    """Candidates for a head that fills `block` columns; float32 is multiplied in float32 ("ieee")."""
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return tuple(
        Config((("BLOCK_H", 16), ("BLOCK_S", slots), ("PRECISION", precision)), warps, stages)
        for slots, warps, stages, widest in _SPLIT
        if block <= widest
    )


def combine_configs() -> tuple[Config, ...]:
    """Candidates for the parts and the mass."""
    return (Config((("BLOCK_S", 128),), 4, 1), Config((("BLOCK_S", 64),), 2, 1))


# slots, warps, stages; the widest head it is a candidate for
_SPLIT = ((64, 4, 3, 64), (64, 4, 2, 128), (32, 4, 2, 128), (32, 4, 2, 256), (16, 4, 1, 256), (16, 8, 1, 256))
