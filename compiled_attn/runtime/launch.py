"""Launches the Triton kernels of ops/kernels; triton is imported when a function here is first called.

`register()` makes each launch a `torch.library.triton_op`, through which Inductor and AOTInductor see into the launch
and carry the kernel into generated code and packages. Under Triton's interpreter the same functions run on CPU tensors.
Configurations come from the templates and are chosen for a compute capability (`sm`: 80 for an A100).
"""

from collections.abc import Callable
from typing import Any

import torch

from compiled_attn.ops.templates import triton_attention, triton_class_row, triton_select_tokens
from compiled_attn.ops.templates.triton_config import Config, block_of


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    scale: float,
    causal: bool,
    config: Config,
) -> torch.Tensor:
    """q [B,H,N,D], k [B,H,M,D], v [B,H,M,Dv], bias to [B,H,N,M] -> [B,H,N,Dv], memory [B,N,H,Dv]."""
    from compiled_attn.ops.kernels.attention import attention as kernel

    batch, heads, queries, width = q.shape
    keys, width_v = v.shape[2:]
    out = q.new_empty(batch, queries, heads, width_v).transpose(1, 2)
    bias_strides: tuple[int, ...] = (0, 0, 0, 0)
    if bias is not None:
        bias_strides = bias.expand(batch, heads, queries, keys).stride()
    _run(kernel, triton_attention.grid(config, batch, heads, queries))(
        q,
        k,
        v,
        q if bias is None else bias,
        out,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *bias_strides,
        *out.stride()[:3],
        scale,
        heads,
        queries,
        keys,
        D=width,
        DV=width_v,
        HAS_BIAS=bias is not None,
        CAUSAL=causal,
        BLOCK_D=block_of(width),
        BLOCK_DV=block_of(width_v),
        UPCAST=_interpreted(kernel) and q.dtype == torch.bfloat16,
        **config.constants,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def class_row(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    scale: float,
    row: int,
    logits_config: Config,
    mean_config: Config,
) -> torch.Tensor:
    """q [B,H,N,D], k [B,H,M,D], bias to [B,H,N,M] -> [B,M] float32: query `row`'s attention, mean over the heads."""
    from compiled_attn.ops.kernels.class_row import class_row_logits, class_row_mean

    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    logits = q.new_empty(batch, heads, keys, dtype=torch.float32)
    lse = q.new_empty(batch, heads, dtype=torch.float32)
    out = q.new_empty(batch, keys, dtype=torch.float32)
    one = q.select(2, row)
    bias_row = q
    bias_strides: tuple[int, ...] = (0, 0, 0)
    if bias is not None:
        bias_row = bias.expand(batch, heads, queries, keys).select(2, row)
        bias_strides = bias_row.stride()
    _run(class_row_logits, triton_class_row.logits_grid(batch, heads))(
        one,
        k,
        bias_row,
        logits,
        lse,
        *one.stride(),
        *k.stride(),
        *bias_strides,
        scale,
        heads,
        keys,
        D=width,
        HAS_BIAS=bias is not None,
        BLOCK_D=block_of(width),
        **logits_config.constants,
        num_warps=logits_config.warps,
        num_stages=logits_config.stages,
    )
    _run(class_row_mean, triton_class_row.mean_grid(mean_config, batch, keys))(
        logits,
        lse,
        out,
        heads,
        keys,
        **mean_config.constants,
        num_warps=mean_config.warps,
        num_stages=mean_config.stages,
    )
    return out


def select_tokens(
    x: torch.Tensor, score: torch.Tensor, keep: int, *, prefix: int, fuse: bool, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B,prefix+M,C], score [B,M] -> tokens [B,prefix+keep(+1),C], index [B,keep] int64."""
    from compiled_attn.ops.kernels.select_tokens import select_tokens as kernel

    batch, _, channels = x.shape
    tokens = score.shape[1]
    out = x.new_empty(batch, prefix + keep + (1 if fuse else 0), channels)
    index = x.new_empty(batch, keep, dtype=torch.int64)
    _run(kernel, triton_select_tokens.grid(config, batch, tokens, channels, fuse=fuse))(
        x,
        score,
        out,
        index,
        *x.stride(),
        *score.stride(),
        tokens,
        channels,
        keep,
        prefix,
        FUSE=fuse,
        **config.constants,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out, index


def _run(kernel: Any, grid: tuple[Any, ...]) -> Callable[..., Any]:
    """The kernel ready to be called: traceable by Inductor, or interpreted."""
    return kernel[grid] if _interpreted(kernel) else torch.library.wrap_triton(kernel)[grid]


def _interpreted(kernel: Any) -> bool:
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernel, InterpretedFunction)
