"""decay_attention as one Triton kernel (kernels/decay_attention.py): softmax or retention, along any axes of a map.

Memory: a program holds one block of queries, the running output and, through the software pipeline, `stages` blocks of
keys and values. Beside q, k, v and the result nothing is moved: no bias is stored, and no axis is brought to the end.
"""

from __future__ import annotations

from typing import Any

import torch

from compiled_attn.ops.decay import along_of
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

NAME = "triton_decay_attention"
KERNEL = "decay_attention"
WIDTHS = (16, 32, 64, 128)  # blocks of the head's columns


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::decay_attention, else the sentence that says why not."""
    q, _, v, _ = args
    because = unfit(target)
    if because is not None:
        return because
    if q.dtype not in DTYPES:
        return f"its elements are {q.dtype}, the kernel reads float32, float16 and bfloat16"
    because = unfit_widths(q, v, WIDTHS[-1])
    if because is not None:
        return because
    if not chosen(args, kwargs, target):
        return f"no configuration for its head width {q.shape[-1]} fits target {target.name} without spilling"
    return None


TEMPLATE = Template(NAME, "decay_attention", "cuda", accepts)


def chosen(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[Config]:
    """The configurations that fit `target` for this call, the most promising first."""
    q, _, v, _ = args
    block = max(block_of(q.shape[-1]), block_of(v.shape[-1]))
    axes = along_of(q, kwargs.get("along"))
    name = case(q.dtype, block, along=len(axes), softmax=kwargs.get("softmax", True))
    return offered(KERNEL, name, configs(q.dtype), target)


def grid(config: Config, problems: Any, places: Any) -> tuple[Any]:
    """Programs for `problems` (pictures, heads, places on the other axes) of `places` each."""
    block = config.constants["BLOCK_N"]
    return (((places + block - 1) // block) * problems,)


def case(dtype: torch.dtype, block: int, *, along: int, softmax: bool) -> str:
    """The name under which machine code is recorded: along one axis with a causal mask, along more as along three."""
    return f"{kind_of(dtype)} d{block} {'axis' if along == 1 else 'axes'}{'' if softmax else ' retention'}"


def configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """Candidates, the most promising first: blocks waste little where 28, 49, 56 or 196 places see each other (RMT)."""
    precision = "ieee" if dtype == torch.float32 else "tf32"
    sizes = ((32, 32, 4), (16, 16, 2))
    return tuple(Config((("BLOCK_N", n), ("BLOCK_M", m), ("PRECISION", precision)), warps, 2) for n, m, warps in sizes)
