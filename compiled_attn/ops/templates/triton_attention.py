"""Plain attention as a Triton kernel (kernels/attention.py): flash forward with optional bias and causal mask.

Memory: a program holds one block of queries, the running output and, through the software pipeline, `stages` blocks of
keys and values; nothing of size N x M exists. Strided q, k, v are read in place.
"""

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

NAME = "triton_attention"
KERNEL = "attention"


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::attention, else the sentence that says why not."""
    q, k, v, bias = (*args, None)[:4]
    because = unfit(target)
    if because is not None:
        return because
    if q.dtype not in DTYPES:
        return f"its elements are {q.dtype}, the kernel reads float32, float16 and bfloat16"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q is {q.dtype} but k is {k.dtype} and v is {v.dtype}"
    if bias is not None and not bias.dtype.is_floating_point:
        return f"its bias is {bias.dtype}, the kernel adds a floating-point bias"
    if kwargs.get("softcap", 0.0):
        return f"its scores are capped at {kwargs['softcap']:g}, the kernel bends none"
    because = unfit_widths(q, v)
    if because is not None:
        return because
    if not chosen(args, kwargs, target):
        return f"no configuration for its head width {q.shape[-1]} fits target {target.name} without spilling"
    return None


TEMPLATE = Template(NAME, "attention", "cuda", accepts)


def chosen(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[Config]:
    """The configurations that fit `target` for this call, the most promising first."""
    q, _, v, bias = (*args, None)[:4]
    block = max(block_of(q.shape[-1]), block_of(v.shape[-1]))
    name = case(q.dtype, block, bias=bias is not None, causal=kwargs.get("causal", False))
    return offered(KERNEL, name, configs(q.dtype, block), target)


def grid(config: Config, batch: Any, heads: Any, queries: Any) -> tuple[Any]:
    """Programs to launch: one per (batch, head, block of queries)."""
    block = config.constants["BLOCK_N"]
    return (((queries + block - 1) // block) * heads * batch,)


def shared_bytes(config: Config, dtype: torch.dtype, block: int, *, bias: bool) -> int:
    """Most shared memory of the plan above: the query block, the pipeline's keys, values and bias, and a padded block
    of float32 scores on its way from one register layout to another."""
    queries, keys = config.constants["BLOCK_N"], config.constants["BLOCK_M"]
    elements = queries * block + config.stages * keys * (2 * block + (queries if bias else 0))
    twice = 2 if config.constants["PRECISION"] == "tf32x3" else 1
    return elements * dtype.itemsize * twice + queries * (keys + 4) * 4


def case(dtype: torch.dtype, block: int, *, bias: bool, causal: bool) -> str:
    """The name under which this specialisation's machine code is recorded."""
    return f"{kind_of(dtype)} d{block}{' bias' if bias else ''}{' causal' if causal else ''}"


def configs(dtype: torch.dtype, block: int) -> tuple[Config, ...]:
    """Candidates for a head that fills `block` columns, the most promising first.

    float32 is multiplied in float32 ("ieee"); three tf32 products ("tf32x3"), about as exact, come last.
    """
    return tuple(
        Config((("BLOCK_N", n), ("BLOCK_M", m), ("PRECISION", precision)), warps, stages)
        for n, m, precision, warps, stages, widest in (_FLOAT if dtype == torch.float32 else _HALF)
        if block <= widest
    )


# queries, keys, precision of float32 products, warps, stages; the widest head it is a candidate for
_HALF = (
    (128, 64, "tf32", 4, 3, 64),
    (128, 64, "tf32", 8, 3, 128),
    (64, 64, "tf32", 4, 3, 128),
    (64, 32, "tf32", 4, 3, 128),
    (64, 32, "tf32", 8, 2, 256),
    (32, 32, "tf32", 4, 2, 256),
    (32, 32, "tf32", 8, 2, 256),
)
_FLOAT = (
    (64, 32, "ieee", 4, 2, 32),
    (64, 32, "ieee", 8, 2, 64),
    (32, 32, "ieee", 4, 2, 128),
    (32, 16, "ieee", 8, 1, 256),
    (16, 16, "ieee", 8, 1, 256),
    (64, 32, "tf32x3", 4, 2, 64),
    (32, 32, "tf32x3", 4, 2, 128),
)
