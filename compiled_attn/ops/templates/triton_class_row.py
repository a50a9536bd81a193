"""The class row as two Triton kernels (kernels/class_row.py): one query's attention, averaged over the heads.

Memory: one block of keys a program and B H M float32 of logits between the kernels; N x M never exists. With
`attention_with_class_row` the attention itself is the kernel of triton_attention.
"""

from typing import Any

from compiled_attn.ops.templates import triton_attention
from compiled_attn.ops.templates.base import Template
from compiled_attn.ops.templates.triton_config import Config, block_of, kind_of, offered

NAME = "triton_class_row"
LOGITS_KERNEL = "class_row_logits"
MEAN_KERNEL = "class_row_mean"


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernels cover this call of attention_with_class_row, else the sentence that says why not."""
    because = triton_attention.accepts(args, kwargs, target)
    if because is not None:
        return because
    row = kwargs.get("row", 0)
    if not isinstance(row, int) or row < 0:
        return f"its row is {row}, the kernel counts rows from 0"
    if not all(chosen(args, kwargs, target)):
        return f"no configuration for its head width {args[0].shape[-1]} fits target {target.name} without spilling"
    return None


TEMPLATE = Template(NAME, "attention_with_class_row", "cuda", accepts)


def chosen(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> tuple[list[Config], list[Config]]:
    """The configurations of the two kernels that fit `target` for this call, the most promising first."""
    del kwargs
    q, _, _, bias = (*args, None)[:4]
    block = block_of(q.shape[-1])
    name = logits_case(q.dtype, block, bias=bias is not None)
    return (
        offered(LOGITS_KERNEL, name, logits_configs(block), target),
        offered(MEAN_KERNEL, MEAN_CASE, mean_configs(), target),
    )


def logits_grid(batch: Any, heads: Any) -> tuple[Any]:
    """Programs of the first kernel: one per (batch, head)."""
    return (batch * heads,)


def mean_grid(config: Config, batch: Any, keys: Any) -> tuple[Any]:
    """Programs of the second kernel: one per (batch, block of keys)."""
    block = config.constants["BLOCK_M"]
    return (batch * ((keys + block - 1) // block),)


def logits_case(dtype: Any, block: int, *, bias: bool) -> str:
    """The name under which this specialisation's machine code is recorded."""
    return f"{kind_of(dtype)} d{block}{' bias' if bias else ''}"


MEAN_CASE = "fp32"


def logits_configs(block: int) -> tuple[Config, ...]:
    """Candidates of the first kernel for a head that fills `block` columns, the most promising first."""
    sizes = ((128, 4), (64, 4), (32, 4)) if block <= 64 else ((64, 4), (32, 4), (32, 8), (16, 8))
    return tuple(Config((("BLOCK_M", m),), warps, 2) for m, warps in sizes)


def mean_configs() -> tuple[Config, ...]:
    """Candidates of the second kernel, the most promising first."""
    return tuple(Config((("BLOCK_M", m),), warps, 2) for m, warps in ((128, 4), (256, 4)))
