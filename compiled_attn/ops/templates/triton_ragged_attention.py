"""Attention within packed sequences as a Triton kernel (kernels/ragged_attention.py): flash forward, lengths on device.

Memory: as triton_attention's. The grid is a bound that the host knows from the number of rows and of sequences; each
program finds its sequence by counting blocks through the offsets.
"""

from typing import Any

import torch

from compiled_attn.ops.templates import triton_attention
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

NAME = "triton_ragged_attention"
KERNEL = "ragged_attention"


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::ragged_attention, else why not."""
    q, _, v = args[:3]
    because = unfit(target)
    if because is not None:
        return because
    if q.dtype not in DTYPES:
        return f"its elements are {q.dtype}, the kernel reads float32, float16 and bfloat16"
    because = unfit_widths(q, v)
    if because is not None:
        return because
    if not chosen(args, kwargs, target):
        return f"no configuration for its head width {q.shape[-1]} fits target {target.name} without spilling"
    return None


TEMPLATE = Template(NAME, "ragged_attention", "cuda", accepts)


def chosen(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[Config]:
    """The configurations that fit `target` for this call, the most promising first."""
    q, _, v = args[:3]
    block = max(block_of(q.shape[-1]), block_of(v.shape[-1]))
    return offered(KERNEL, case(q.dtype, block, causal=kwargs.get("causal", False)), configs(q.dtype, block), target)


def blocks(config: Config, rows: Any, sequences: Any) -> Any:
    """Most blocks of queries that any lengths can make."""
    block = config.constants["BLOCK_N"]
    return (rows + block - 1) // block + sequences


def case(dtype: torch.dtype, block: int, *, causal: bool) -> str:
    """The name under which this specialisation's machine code is recorded."""
    return f"{kind_of(dtype)} d{block}{' causal' if causal else ''}"


configs = triton_attention.configs
