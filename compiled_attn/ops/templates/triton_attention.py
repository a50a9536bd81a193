"""Plain attention as a Triton kernel (kernels/attention.py): flash forward with optional bias and causal mask.

Memory: a program holds one query block, the running output and, through the software pipeline, `stages` blocks of keys
and values; nothing of size N x M exists. Strided q, k, v are read in place.
"""

from typing import Any

import torch

from compiled_attn.ops.templates.triton_config import DTYPES, Config, block_of

WIDTH_MOST = 256


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call, else the sentence that says why not."""
    del kwargs
    q, k, v, bias = (*args, None)[:4]
    if target.kind != "cuda":
        return f"target {target.name} has no Triton"
    if q.dtype not in DTYPES:
        return f"its elements are {q.dtype}, the kernel reads float32, float16 and bfloat16"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q is {q.dtype} but k is {k.dtype} and v is {v.dtype}"
    if bias is not None and not bias.dtype.is_floating_point:
        return f"its bias is {bias.dtype}, the kernel adds a floating-point bias"
    for name, width in (("head width", q.shape[-1]), ("value width", v.shape[-1])):
        if not isinstance(width, int):
            return f"its {name} {width} is symbolic, the kernel is compiled for one"
        if not 1 <= width <= WIDTH_MOST:
            return f"its {name} is {width}, the kernel holds 1 to {WIDTH_MOST} in registers"
    return None


def grid(config: Config, batch: Any, heads: Any, queries: Any) -> tuple[Any]:
    """Programs to launch: one per (batch, head, block of queries)."""
    block = config.constants["BLOCK_N"]
    return (((queries + block - 1) // block) * heads * batch,)


def shared_bytes(config: Config, block_d: int, block_dv: int, dtype: torch.dtype) -> int:
    """Shared memory that the plan above asks for: the pipeline's key and value blocks, and the query block."""
    n, m = int(config.constants["BLOCK_N"]), int(config.constants["BLOCK_M"])
    return (n * block_d + config.stages * m * (block_d + block_dv)) * dtype.itemsize


def case(dtype: torch.dtype, width: int, width_v: int, *, bias: bool, causal: bool) -> str:
    """The name under which this specialisation's machine code is recorded."""
    blocks = max(block_of(width), block_of(width_v))
    return f"{DTYPES[dtype]} d{blocks}{' bias' if bias else ''}{' causal' if causal else ''}"


def configs(dtype: torch.dtype, block: int) -> tuple[Config, ...]:
    """Candidates for a head that fills `block` columns, the most promising first."""
    sizes = _HALF if dtype != torch.float32 else _FLOAT
    precisions = ("tf32",) if dtype != torch.float32 else ("ieee",)
    return tuple(
        Config((("BLOCK_N", n), ("BLOCK_M", m), ("PRECISION", precision)), warps, stages)
        for (n, m, warps, stages), widest in sizes
        for precision in precisions
        if block <= widest
    )


# (queries, keys, warps, stages), widest head: beyond it the block does not fit any target
_HALF: tuple[tuple[tuple[int, int, int, int], int], ...] = (
    ((128, 64, 4, 3), 64),
    ((128, 64, 8, 3), 128),
    ((64, 64, 4, 3), 128),
    ((64, 64, 4, 2), 256),
    ((64, 32, 4, 2), 256),
    ((64, 32, 8, 2), 256),
    ((32, 32, 4, 2), 256),
)
_FLOAT: tuple[tuple[tuple[int, int, int, int], int], ...] = (
    ((64, 32, 4, 2), 64),
    ((64, 32, 8, 2), 128),
    ((32, 32, 4, 2), 128),
    ((32, 32, 8, 2), 256),
    ((32, 16, 8, 1), 256),
    ((16, 16, 4, 1), 256),
)
