"""Launches the Triton kernels of cached_attention, for runtime/launch.py."""

from typing import Any

import torch

from compiled_attn.ir import targets
from compiled_attn.ops.templates import triton_cached_attention
from compiled_attn.ops.templates.triton_config import Config, block_of
from compiled_attn.runtime.triton_run import interpreted, run


def operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    window: int,
    target: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The launches as torch.library takes them; `target` by its name."""
    split, combine = (found[0] for found in triton_cached_attention.chosen((q, k, v), {}, targets.load(target)))
    return cached_attention(q, k, v, positions, queries, scale=scale, window=window, split=split, combine=combine)


def call(launch: Any, target: str, *tensors: Any, scale: float, window: int = 0, tail: int = 0) -> Any:
    """The vocabulary op's signature on `operator`. tail: of one query the last one counts in any case."""
    del tail
    return launch(*tensors, scale, window, target)


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    queries: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    split: Config,
    combine: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,1,D], k [B,G,S,D], v [B,G,S,Dv], positions [B,G,S], queries [B,1] -> [B,H,1,Dv], mass [B,G,S] float32."""
    from compiled_attn.ops.kernels.cached_attention import cached_attention_combine, cached_attention_split

    batch, heads, _, width = q.shape
    groups, slots, width_v = v.shape[1:]
    part = triton_cached_attention.part(split, slots)
    splits = (slots + part - 1) // part
    logits = q.new_empty(batch, heads, slots, dtype=torch.float32)
    peak = q.new_empty(batch, heads, splits, dtype=torch.float32)
    total = q.new_empty(batch, heads, splits, dtype=torch.float32)
    sums = q.new_empty(batch, heads, splits, width_v, dtype=torch.float32)
    out = q.new_empty(batch, 1, heads, width_v).transpose(1, 2)
    mass = q.new_empty(batch, groups, slots, dtype=torch.float32)
    one = q.select(2, 0)
    run(cached_attention_split, (batch * groups * splits,))(
        one,
        k,
        v,
        positions.contiguous(),
        queries.select(1, 0).contiguous(),
        logits,
        peak,
        total,
        sums,
        *one.stride(),
        *k.stride(),
        *v.stride(),
        scale,
        groups,
        heads // groups,
        slots,
        window,
        splits,
        part,
        D=width,
        DV=width_v,
        BLOCK_D=block_of(width),
        BLOCK_DV=block_of(width_v),
        UPCAST=interpreted(cached_attention_split) and q.dtype == torch.bfloat16,
        **split.constants,
        num_warps=split.warps,
        num_stages=split.stages,
    )
    blocks = (slots + combine.constants["BLOCK_S"] - 1) // combine.constants["BLOCK_S"]
    run(cached_attention_combine, (batch * groups * blocks,))(
        logits,
        peak,
        total,
        sums,
        out,
        mass,
        heads // groups,
        slots,
        splits,
        blocks,
        DV=width_v,
        BLOCK_SPLITS=triton_cached_attention.SPLITS,
        BLOCK_DV=block_of(width_v),
        **combine.constants,
        num_warps=combine.warps,
        num_stages=combine.stages,
    )
    return out, mass
