"""Launches the Triton kernels of local_attention's gradients, for the backward of launch_local.py's operator."""

import math
from functools import partial
from typing import Any

import torch

from compiled_attn.ir import targets
from compiled_attn.ir.op import OPS, NoGradient
from compiled_attn.ops.local_geometry import BORDERS, Axis, axes_of
from compiled_attn.ops.templates import triton_local_attention, triton_local_backward
from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime.launch_local import NO_AXIS, numbers, spread
from compiled_attn.runtime.triton_run import interpreted, run

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
TENSORS = ("q", "k", "v", "bias", "relative")
OPTIONS = ("window", "scale", "stride", "dilation", "shift", "block", "border", "causal", "sinks")


def operator(
    grad: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The launch as torch.library takes it; the gradients of a bias and of logits that are not there are empty."""
    configs = triton_local_backward.chosen((q, k, v, bias, relative), targets.load(target))
    if configs is None:
        raise ValueError(f"no configuration of the gradients fits {target}")  # the template was asked before
    axes = axes_of(q.dim() - 3, window, stride, dilation, shift, block, border, causal, sinks)
    dq, dk, dv, *others = local_attention_backward(
        grad, q, k, v, bias, relative, axes=axes, scale=scale, rows_config=configs[0], columns_config=configs[1]
    )
    dbias, drelative = (q.new_empty(0) if x is None else x for x in others)
    return dq, dk, dv, dbias, drelative


def differentiable(attention: Any) -> None:
    """Gives launch_local.operator, as torch.library has made it, its gradients."""
    launch = torch.library.triton_op("compiled_attn_triton::local_attention_backward", operator, mutates_args=())
    attention.register_autograd(partial(gradients, launch), setup_context=keep)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps the arguments of launch_local.operator for `gradients`."""
    del output
    ctx.given = [x is not None for x in inputs[: len(TENSORS)]]
    ctx.save_for_backward(*(x for x in inputs[: len(TENSORS)] if x is not None))
    ctx.options = dict(zip(OPTIONS, inputs[len(TENSORS) :], strict=False))
    ctx.target = inputs[-1]


def gradients(launch: Any, ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """By the kernels through `launch`, the operator, where they cover the call, else by the op's own rule."""
    saved = iter(ctx.saved_tensors)
    args = tuple(next(saved) if given else None for given in ctx.given)
    rest = (None,) * (len(OPTIONS) + 1)
    if triton_local_backward.accepts(args, ctx.options, targets.load(ctx.target)) is None:
        found = launch(grad, *args, *(ctx.options[name] for name in OPTIONS), ctx.target)
        return (*(None if x is None else g for x, g in zip(args, found, strict=True)), *rest)
    rule = OPS["local_attention"].gradient
    if isinstance(rule, NoGradient):
        raise ValueError(rule.because)
    return (*rule(args, ctx.options, (grad,)), *rest)


def local_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    relative: torch.Tensor | None,
    *,
    axes: tuple[Axis, ...],
    scale: float,
    rows_config: Config,
    columns_config: Config,
) -> Gradients:
    """grad [B,*Lq,H,Dv] of the result -> the gradients of q, k, v, bias and relative, dense, each in its own type.

    Those of bias and relative are added up in float32, in no fixed order; None where the argument is None.
    """
    from compiled_attn.ops.kernels.local_attention_columns import local_attention_columns
    from compiled_attn.ops.kernels.local_attention_rows import local_attention_rows

    rank, heads, width, width_v = len(axes), q.shape[-2], q.shape[-1], v.shape[-1]
    missing = 3 - rank
    table = None if bias is None else bias.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    lse, mean = (q.new_empty(q.shape[:-1], dtype=torch.float32) for _ in range(2))
    dbias = None if table is None else torch.zeros(table.shape, dtype=torch.float32, device=q.device)
    drelative = None if relative is None else torch.zeros(relative.shape, dtype=torch.float32, device=q.device)
    inputs = (q, k, v, q if table is None else table, q if relative is None else relative, grad)
    strides = (
        *(n for x in (q, k, v, grad) for n in spread(x.stride(), 1, missing)),
        *((0,) * 4 if table is None else spread(table.stride(), 1, missing)),
        *((0,) * 6 if relative is None else spread(relative.stride(), 1, missing)),
        scale,
        heads,
        BORDERS.index(axes[0].border),
        axes[0].sinks,
    )
    constants = {
        "D": width,
        "DV": width_v,
        "RANK": rank,
        "HAS_BIAS": bias is not None,
        "HAS_RELATIVE": relative is not None,
        "HAS_SINKS": axes[0].sinks > 0,
        "BLOCK_D": triton_local_backward.held(width),
        "BLOCK_DV": triton_local_backward.held(width_v),
        "UPCAST": interpreted(local_attention_rows) and q.dtype == torch.bfloat16,
    }

    def launch(kernel: Any, config: Config, tile: tuple[int, ...], count: Any, *outputs: torch.Tensor) -> None:
        places = [numbers(NO_AXIS, 1, 1, 1)] * missing
        places += [numbers(a, q.shape[1 + i], k.shape[1 + i], tile[i]) for i, a in enumerate(axes)]
        run(kernel, (q.shape[0] * heads * count,))(
            *inputs,
            *outputs,
            *strides,
            *(number for place in places for number in place),
            **constants,
            **config.constants,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    tile = triton_local_attention.tiles(q, k, axes, rows_config)
    count = triton_local_attention.programs(axes, tile, q.shape[1 : 1 + rank])
    spare = lse  # stands for what no kernel writes
    added = [spare if x is None else x for x in (dbias, drelative)]
    launch(local_attention_rows, rows_config, tile, count, dq, lse, mean, *added)
    box = triton_local_backward.box(axes, k.shape[1 : 1 + rank], columns_config.constants["BLOCK_M"])
    count = math.prod(triton_local_backward.parts(a, n, t) for a, n, t in zip(axes, k.shape[1:], box, strict=False))
    launch(local_attention_columns, columns_config, box, count, lse, mean, dk, dv)
    dbias = None if bias is None or dbias is None else dbias.to(bias.dtype)
    return dq, dk, dv, dbias, None if relative is None or drelative is None else drelative.to(relative.dtype)
