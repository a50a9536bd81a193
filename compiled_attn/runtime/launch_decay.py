"""Launches the Triton kernel of decay_attention, for runtime/launch.py."""

import math
from typing import Any

import torch

from compiled_attn.ir import targets
from compiled_attn.ops.decay import along_of
from compiled_attn.ops.templates import triton_decay_attention
from compiled_attn.ops.templates.triton_config import Config, block_of
from compiled_attn.runtime.triton_run import interpreted, run


def operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    scale: float,
    along: list[int],
    softmax: bool,
    causal: bool,
    target: str,
) -> torch.Tensor:
    """The launch as torch.library takes it; `target` by its name."""
    options = {"along": along, "softmax": softmax}
    config = triton_decay_attention.chosen((q, k, v, decay), options, targets.load(target))[0]
    return decay_attention(q, k, v, decay, scale=scale, along=along, softmax=softmax, causal=causal, config=config)


def call(
    launch: Any,
    target: str,
    q: Any,
    k: Any,
    v: Any,
    decay: Any,
    *,
    scale: float,
    along: Any = None,
    softmax: bool = True,
    causal: bool = False,
) -> Any:
    """The vocabulary op's signature on `operator`."""
    return launch(q, k, v, decay, scale, along_of(q, along), softmax, causal, target)


def decay_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    *,
    scale: float,
    along: list[int],
    softmax: bool,
    causal: bool,
    config: Config,
) -> torch.Tensor:
    """q, k [B,*L,H,D], v [B,*L,H,Dv], decay [H] -> [B,*L,H,Dv] contiguous."""
    from compiled_attn.ops.kernels.decay_attention import decay_attention as kernel

    rank, heads = q.dim() - 3, q.shape[-2]
    order = [*(a for a in range(rank) if a not in along), *along]
    sizes = [1] * (3 - rank) + [q.shape[1 + a] for a in order]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))

    def strides(x: torch.Tensor) -> list[Any]:
        own = x.stride()
        return [own[0], *[0] * (3 - rank), *(own[1 + a] for a in order), *own[-2:]]

    others = math.prod(sizes[: 3 - len(along)])
    run(kernel, triton_decay_attention.grid(config, q.shape[0] * heads * others, math.prod(sizes[3 - len(along) :])))(
        q,
        k,
        v,
        decay,
        out,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(out)[:-1],
        decay.stride(0),
        scale,
        heads,
        *sizes,
        D=q.shape[-1],
        DV=v.shape[-1],
        ALONG=len(along),
        SOFTMAX=softmax,
        CAUSAL=causal,
        BLOCK_D=block_of(q.shape[-1]),
        BLOCK_DV=block_of(v.shape[-1]),
        UPCAST=interpreted(kernel) and q.dtype == torch.bfloat16,
        **config.constants,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
