"""Launches the Triton kernel of local_attention, for runtime/launch.py."""

from typing import Any

import torch

from compiled_attn.ir import targets
from compiled_attn.ops.local_geometry import BORDERS, Axis, axes_of
from compiled_attn.ops.templates import triton_local_attention
from compiled_attn.ops.templates.triton_config import Config, block_of
from compiled_attn.runtime.triton_run import interpreted, run

NO_AXIS = Axis(1)


def operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    relative: torch.Tensor | None,
    window: list[int],
    scale: float,
    stride: list[int],
    dilation: list[int],
    shift: list[int],
    block: list[int],
    border: str,
    causal: list[bool],
    sinks: int,
    target: str,
) -> torch.Tensor:
    """The launch as torch.library takes it, no list optional; `target` by its name."""
    options: dict[str, Any] = {
        "window": window,
        "stride": stride,
        "dilation": dilation,
        "shift": shift,
        "block": block,
        "border": border,
        "causal": causal,
        "sinks": sinks,
    }
    config = triton_local_attention.chosen((q, k, v, bias, relative), options, targets.load(target))[0]
    axes = axes_of(q.dim() - 3, **options)
    return local_attention(q, k, v, bias, relative, axes=axes, scale=scale, config=config)


def call(
    launch: Any, target: str, q: Any, k: Any, v: Any, bias: Any = None, relative: Any = None, **options: Any
) -> Any:
    """The vocabulary op's signature on `operator`."""
    axes = triton_local_attention.pattern(q, options)
    lists = ([getattr(a, name) for a in axes] for name in ("stride", "dilation", "shift", "block"))
    causal = [a.causal for a in axes]
    window, scale = list(options["window"]), options["scale"]
    return launch(q, k, v, bias, relative, window, scale, *lists, axes[0].border, causal, axes[0].sinks, target)


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    relative: torch.Tensor | None,
    *,
    axes: tuple[Axis, ...],
    scale: float,
    config: Config,
) -> torch.Tensor:
    """q [B,*Lq,H,D], k [B,*Lk,H,D], v [B,*Lk,H,Dv], bias [H,*R], relative [B,*Lq,H,sum R] -> [B,*Lq,H,Dv], dense."""
    from compiled_attn.ops.kernels.local_attention import local_attention as kernel

    rank, heads, width, width_v = len(axes), q.shape[-2], q.shape[-1], v.shape[-1]
    missing = 3 - rank
    out = q.new_empty((*q.shape[:-1], width_v))
    tile = triton_local_attention.tiles(q, k, axes, config)
    grid = q.shape[0] * heads * triton_local_attention.programs(axes, tile, q.shape[1 : 1 + rank])
    rows = [numbers(NO_AXIS, 1, 1, 1)] * missing
    rows += [numbers(a, q.shape[1 + i], k.shape[1 + i], tile[i]) for i, a in enumerate(axes)]
    run(kernel, (grid,))(
        q,
        k,
        v,
        q if bias is None else bias,
        q if relative is None else relative,
        out,
        *spread(q.stride(), 1, missing),
        *spread(k.stride(), 1, missing),
        *spread(v.stride(), 1, missing),
        *spread(out.stride()[:-1], 1, missing),
        *((0,) * 4 if bias is None else spread(bias.stride(), 1, missing)),
        *((0,) * 6 if relative is None else spread(relative.stride(), 1, missing)),
        scale,
        heads,
        BORDERS.index(axes[0].border),
        axes[0].sinks,
        *(number for row in rows for number in row),
        D=width,
        DV=width_v,
        RANK=rank,
        HAS_BIAS=bias is not None,
        HAS_RELATIVE=relative is not None,
        HAS_SINKS=axes[0].sinks > 0,
        BLOCK_D=block_of(width),
        BLOCK_DV=block_of(width_v),
        UPCAST=interpreted(kernel) and q.dtype == torch.bfloat16,
        **config.constants,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def spread(strides: tuple[Any, ...], first: int, missing: int) -> tuple[Any, ...]:
    """Strides with those of the missing axes, which are never moved along, behind the first."""
    return (*strides[:first], *(0,) * missing, *strides[first:])


def numbers(axis: Axis, queries: Any, keys: Any, tile: int) -> tuple[Any, ...]:
    """An axis in the order of the kernel's arguments."""
    pattern = (axis.window, axis.stride, axis.block, axis.dilation, axis.shift, int(axis.causal))
    return (queries, keys, *pattern, tile)
