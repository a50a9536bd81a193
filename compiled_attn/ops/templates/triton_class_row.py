"""The class row as two Triton kernels (kernels/class_row.py): one query's attention, averaged over the heads.

Memory: one block of keys a program and B H M float32 of logits between the kernels; N x M never exists. With
`attention_with_class_row` the attention itself is the kernel of triton_attention.
"""

from typing import Any

from compiled_attn.ops.templates import triton_attention
from compiled_attn.ops.templates.triton_config import Config


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernels cover this call of attention_with_class_row, else the sentence that says why not."""
    because = triton_attention.accepts(args, kwargs, target)
    if because is not None:
        return because
    row = kwargs.get("row", 0)
    if row < 0:
        return f"its row is {row}, the kernel counts rows from 0"
    return None


def logits_grid(batch: Any, heads: Any) -> tuple[Any]:
    """Programs of the first kernel: one per (batch, head)."""
    return (batch * heads,)


def mean_grid(config: Config, batch: Any, keys: Any) -> tuple[Any]:
    """Programs of the second kernel: one per (batch, block of keys)."""
    block = config.constants["BLOCK_M"]
    return (batch * ((keys + block - 1) // block),)


def logits_configs(block: int) -> tuple[Config, ...]:
    """Candidates of the first kernel for a head that fills `block` columns, the most promising first."""
    sizes = ((128, 4), (64, 4), (32, 4), (32, 8)) if block <= 64 else ((64, 4), (32, 4), (32, 8), (16, 8))
    return tuple(Config((("BLOCK_M", m),), warps, 2) for m, warps in sizes)


def mean_configs() -> tuple[Config, ...]:
    """Candidates of the second kernel, the most promising first."""
    return tuple(Config((("BLOCK_M", m),), warps, 2) for m, warps in ((128, 4), (256, 4)))
