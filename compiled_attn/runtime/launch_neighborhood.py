"""Launches the Triton kernel of neighborhood_apply, for runtime/launch.py."""

import math
from typing import Any

import torch

from compiled_attn.ir import targets
from compiled_attn.ops.local_geometry import BORDERS, Axis, axes_of
from compiled_attn.ops.templates import triton_neighborhood
from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime.triton_run import run

NO_AXIS = Axis(1)


def operator(
    weights: torch.Tensor,
    v: torch.Tensor,
    window: list[int],
    stride: list[int],
    dilation: list[int],
    shift: list[int],
    block: list[int],
    border: str,
    target: str,
) -> torch.Tensor:
    """The launch as torch.library takes it, no list optional; `target` by its name."""
    config = triton_neighborhood.chosen((weights, v), {}, targets.load(target))[0]
    axes = axes_of(v.dim() - 3, window, stride, dilation, shift, block, border)
    return neighborhood_apply(weights, v, axes=axes, config=config)


def call(launch: Any, target: str, weights: Any, v: Any, **options: Any) -> Any:
    """The vocabulary op's signature on `operator`."""
    axes = axes_of(v.dim() - 3, **options)
    lists = ([getattr(a, name) for a in axes] for name in ("stride", "dilation", "shift", "block"))
    return launch(weights, v, list(options["window"]), *lists, axes[0].border, target)


def neighborhood_apply(
    weights: torch.Tensor, v: torch.Tensor, *, axes: tuple[Axis, ...], config: Config
) -> torch.Tensor:
    """weights [B,*Lq,H,M,K], v [B,*Lk,H,Dv] -> [B,*Lq,H,M,Dv] contiguous."""
    from compiled_attn.ops.kernels.neighborhood import neighborhood as kernel

    rank, missing = len(axes), 3 - len(axes)
    queries, keys = weights.shape[1 : 1 + rank], v.shape[1 : 1 + rank]
    heads, mixes, width = *weights.shape[-3:-1], v.shape[-1]
    out = v.new_empty((*weights.shape[:-1], width))
    rows = [(1, 1, NO_AXIS)] * missing + list(zip(queries, keys, axes, strict=True))
    strides = (weights.stride(), v.stride(), out.stride()[:-1])
    run(kernel, triton_neighborhood.grid(config, weights.shape[0] * heads, math.prod(queries), width))(
        weights,
        v,
        out,
        *(n for s in strides for n in (s[0], *(0,) * missing, *s[1:])),
        heads,
        mixes,
        width,
        BORDERS.index(axes[0].border),
        *(n for q, k, a in rows for n in (q, k, a.window, a.stride, a.block, a.dilation, a.shift)),
        **config.constants,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
