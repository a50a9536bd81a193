"""Launches the Triton kernels of ops/kernels; triton is imported when a function here is first called.

`stand_in` gives, for a vocabulary op, a function of the same signature that launches its kernel through a
`torch.library.triton_op`: Inductor and AOTInductor see into it and carry the kernel into generated code and packages.
The configuration is the first that the template offers for the target. Under Triton's interpreter `attention`,
`class_row`, `ragged_attention` and `select_tokens` run on CPU tensors. Local attention, neighborhoods, attention with
decay or over a cache and depthwise blocks are launched by launch_local.py, launch_neighborhood.py, launch_decay.py,
launch_cached.py and launch_depthwise.py. Every launch has its gradients: local attention and depthwise blocks by
kernels, the others by their op's rule (launch_gradient.py).
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch

from compiled_attn.ir import targets
from compiled_attn.ir.errors import TargetError
from compiled_attn.ops.templates import (
    triton_attention,
    triton_class_row,
    triton_ragged_attention,
    triton_select_tokens,
)
from compiled_attn.ops.templates.triton_config import Config, block_of
from compiled_attn.runtime import (
    launch_cached,
    launch_decay,
    launch_depthwise,
    launch_gradient,
    launch_local,
    launch_local_backward,
    launch_neighborhood,
)
from compiled_attn.runtime.triton_run import interpreted, run


def stand_in(op: str, target: targets.Target) -> Callable[..., Any]:
    """A function with the vocabulary op's signature that launches its Triton kernel, configured for `target`.

    Raises TargetError where no Triton kernel serves the op, or triton is not installed. Whether the kernel covers a
    call, the template's `accepts` says.
    """
    if find_spec("triton") is None:
        raise TargetError(
            f"{op} can not be built for {target.name} without triton",
            where=f"target={target.name!r}",
            facts="its kernel for CUDA is written in Triton, and triton is not installed here",
            do="pip install 'compiled-attn[triton]'; it needs no GPU",
        )
    launches = _operators()
    if op not in launches:
        raise TargetError(
            f"no Triton kernel serves {op}",
            where=f"target={target.name!r}",
            facts=f"there are kernels for {', '.join(sorted(launches))}",
            do="lower the op by its decomposition",
        )
    return partial(_CALLS[op], launches[op], target.name)


def register() -> None:
    """Makes the launches known to torch, as a process must that reads a lowered program."""
    _operators()


@cache
def _operators() -> dict[str, Any]:
    """The launches as operators, `compiled_attn_triton::<op>`, which take the target's name as an argument."""
    launches: dict[str, Any] = {
        "attention": _attention,
        "attention_with_class_row": _attention_with_class_row,
        "cached_attention": launch_cached.operator,
        "decay_attention": launch_decay.operator,
        "depthwise_block": launch_depthwise.operator,
        "depthwise_input_gradient": launch_depthwise.input_gradient_operator,
        "depthwise_weight_gradient": launch_depthwise.gradient_operator,
        "local_attention": launch_local.operator,
        "neighborhood_apply": launch_neighborhood.operator,
        "ragged_attention": _ragged_attention,
        "select_tokens": _select_tokens,
    }
    found = {
        op: torch.library.triton_op(f"compiled_attn_triton::{op}", launch, mutates_args=())
        for op, launch in launches.items()
    }
    for op in _BY_THE_RULE:
        launch_gradient.by_the_rule(op, found[op], launches[op])
    launch_depthwise.differentiable(
        *(found[f"depthwise_{name}"] for name in ("block", "input_gradient", "weight_gradient"))
    )
    launch_local_backward.differentiable(found["local_attention"])
    return found


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    causal: bool,
    target: str,
) -> torch.Tensor:
    config = triton_attention.chosen((q, k, v, bias), {"causal": causal}, targets.load(target))[0]
    return attention(q, k, v, bias, scale=scale, causal=causal, config=config)


def _attention_with_class_row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, row: int, target: str
) -> tuple[torch.Tensor, torch.Tensor]:
    device = targets.load(target)
    logits, mean = (found[0] for found in triton_class_row.chosen((q, k, v, bias), {}, device))
    config = triton_attention.chosen((q, k, v, bias), {}, device)[0]
    out = attention(q, k, v, bias, scale=scale, causal=False, config=config)
    return out, class_row(q, k, bias, scale=scale, row=row, logits_config=logits, mean_config=mean)


def _select_tokens(
    x: torch.Tensor, score: torch.Tensor, keep: int, prefix: int, fuse: bool, target: str
) -> tuple[torch.Tensor, torch.Tensor]:
    config = triton_select_tokens.chosen((x, score, keep), {"fuse": fuse}, targets.load(target))[0]
    return select_tokens(x, score, keep, prefix=prefix, fuse=fuse, config=config)


def _ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    scale: float,
    causal: bool,
    target: str,
) -> torch.Tensor:
    config = triton_ragged_attention.chosen((q, k, v), {"causal": causal}, targets.load(target))[0]
    return ragged_attention(q, k, v, q_offsets, k_offsets, scale=scale, causal=causal, config=config)


def _call_attention(
    launch: Any,
    target: str,
    q: Any,
    k: Any,
    v: Any,
    bias: Any = None,
    *,
    scale: float,
    causal: bool = False,
    softcap: float = 0.0,
) -> Any:
    del softcap  # 0, or the template would have declined
    return launch(q, k, v, bias, scale, causal, target)


def _call_class_row(
    launch: Any, target: str, q: Any, k: Any, v: Any, bias: Any = None, *, scale: float, row: int = 0
) -> Any:
    return launch(q, k, v, bias, scale, row, target)


def _call_select(
    launch: Any, target: str, x: Any, score: Any, keep: Any, *, prefix: int = 1, fuse: bool = False
) -> Any:
    return launch(x, score, keep, prefix, fuse, target)


def _call_ragged(
    launch: Any,
    target: str,
    q: Any,
    k: Any,
    v: Any,
    q_offsets: Any,
    k_offsets: Any,
    *,
    scale: float,
    causal: bool = False,
    longest: Any = None,
) -> Any:
    del longest
    return launch(q, k, v, q_offsets, k_offsets, scale, causal, target)


_BY_THE_RULE = (
    *("attention", "attention_with_class_row", "cached_attention", "decay_attention", "neighborhood_apply"),
    *("ragged_attention", "select_tokens"),
)  # the others have kernels for their gradients

_CALLS: dict[str, Callable[..., Any]] = {
    "attention": _call_attention,
    "attention_with_class_row": _call_class_row,
    "cached_attention": launch_cached.call,
    "decay_attention": launch_decay.call,
    "depthwise_block": launch_depthwise.call,
    "depthwise_input_gradient": launch_depthwise.call_input_gradient,
    "depthwise_weight_gradient": launch_depthwise.call_gradient,
    "local_attention": launch_local.call,
    "neighborhood_apply": launch_neighborhood.call,
    "ragged_attention": _call_ragged,
    "select_tokens": _call_select,
}


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
    run(kernel, triton_attention.grid(config, batch, heads, queries))(
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
        UPCAST=interpreted(kernel) and q.dtype == torch.bfloat16,
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
    run(class_row_logits, triton_class_row.logits_grid(batch, heads))(
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
    run(class_row_mean, triton_class_row.mean_grid(mean_config, batch, keys))(
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


def ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    config: Config,
) -> torch.Tensor:
    """q [T,H,D], k [S,H,D], v [S,H,Dv], offsets [B+1] int64 -> [T,H,Dv] contiguous."""
    from compiled_attn.ops.kernels.ragged_attention import ragged_attention as kernel

    rows, heads, width = q.shape
    width_v, sequences = v.shape[2], q_offsets.shape[0] - 1
    out = q.new_empty(rows, heads, width_v)
    blocks = triton_ragged_attention.blocks(config, rows, sequences)
    run(kernel, (blocks * heads,))(
        q,
        k,
        v,
        q_offsets.contiguous(),
        k_offsets.contiguous(),
        out,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride()[:2],
        scale,
        sequences,
        blocks,
        D=width,
        DV=width_v,
        CAUSAL=causal,
        BLOCK_D=block_of(width),
        BLOCK_DV=block_of(width_v),
        UPCAST=interpreted(kernel) and q.dtype == torch.bfloat16,
        **config.constants,
        num_warps=config.warps,
        num_stages=config.stages,
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
    run(kernel, triton_select_tokens.grid(config, batch, tokens, channels, fuse=fuse))(
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
