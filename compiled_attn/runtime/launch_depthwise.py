"""Launches the Triton kernels of depthwise_block and of its input's and weight's gradients, for runtime/launch.py."""

from types import SimpleNamespace
from typing import Any

import torch

from compiled_attn.ir import targets
from compiled_attn.ops.depthwise import both_ends, depthwise_gradient, depthwise_shape
from compiled_attn.ops.depthwise_input_gradient import input_gradient_shape
from compiled_attn.ops.templates import (
    triton_depthwise,
    triton_depthwise_gradient,
    triton_depthwise_input_gradient,
)
from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime.triton_run import run

OPTIONS = ("stride", "padding", "dilation", "activation", "norm_eps")


def operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    norm_eps: float | None,
    target: str,
) -> torch.Tensor:
    """The launch as torch.library takes it; `target` by its name."""
    config = triton_depthwise.chosen((x, weight), {"norm_eps": norm_eps}, targets.load(target))[0]
    tensors = (x, weight, bias, gate, residual, norm_weight, norm_bias)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    return depthwise_block(*tensors, **options, activation=activation, norm_eps=norm_eps, config=config)


def gradient_operator(
    x: torch.Tensor,
    grad: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    target: str,
) -> torch.Tensor:
    """The launch as torch.library takes it; `target` by its name."""
    config = triton_depthwise_gradient.chosen((x, grad), {}, targets.load(target))[0]
    options: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return depthwise_weight_gradient(x, grad, **options, config=config)


def input_gradient_operator(
    grad: torch.Tensor,
    weight: torch.Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    target: str,
) -> torch.Tensor:
    """The launch as torch.library takes it; `target` by its name."""
    config = triton_depthwise_input_gradient.chosen((grad, weight), {}, targets.load(target))[0]
    options: dict[str, Any] = {"size": size, "stride": stride, "padding": padding, "dilation": dilation}
    return depthwise_input_gradient(grad, weight, **options, config=config)


def call(
    launch: Any,
    target: str,
    x: Any,
    weight: Any,
    bias: Any = None,
    gate: Any = None,
    residual: Any = None,
    norm_weight: Any = None,
    norm_bias: Any = None,
    *,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    activation: str = "none",
    norm_eps: float | None = None,
) -> Any:
    """The vocabulary op's signature on `operator`."""
    pairs = (list(stride), list(padding), list(dilation))
    return launch(x, weight, bias, gate, residual, norm_weight, norm_bias, *pairs, activation, norm_eps, target)


def call_gradient(
    launch: Any,
    target: str,
    x: Any,
    grad: Any,
    *,
    kernel: Any,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
) -> Any:
    """The vocabulary op's signature on `gradient_operator`."""
    return launch(x, grad, list(kernel), list(stride), list(padding), list(dilation), target)


def call_input_gradient(
    launch: Any,
    target: str,
    grad: Any,
    weight: Any,
    *,
    size: Any,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
) -> Any:
    """The vocabulary op's signature on `input_gradient_operator`."""
    return launch(grad, weight, list(size), list(stride), list(padding), list(dilation), target)


def differentiable(block: Any, input_gradient: Any, weight_gradient: Any) -> None:
    """Gives the launch of the block its gradient: of the same three launches, for the same target."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs[:7])
        ctx.options, ctx.target = dict(zip(OPTIONS, inputs[7:12], strict=True)), inputs[12]

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        ops = SimpleNamespace(
            depthwise_block=lambda *args, **kwargs: call(block, ctx.target, *args, **kwargs),
            depthwise_input_gradient=lambda *args, **kwargs: call_input_gradient(
                input_gradient, ctx.target, *args, **kwargs
            ),
            depthwise_weight_gradient=lambda *args, **kwargs: call_gradient(
                weight_gradient, ctx.target, *args, **kwargs
            ),
        )
        found = depthwise_gradient(ctx.saved_tensors, ctx.options, (grad,), ops=ops)
        wanted = [g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False)]
        return (*wanted, *[None] * 6)

    block.register_autograd(backward, setup_context=setup)


def depthwise_block(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    *,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    norm_eps: float | None,
    config: Config,
) -> torch.Tensor:
    """x [B,C,Y,X], weight [I,J,C], the maps [B,C,Y',X'], the others [C] -> [B,C,Y',X'], memory [B,Y',X',C]."""
    from compiled_attn.ops.kernels.depthwise import depthwise as kernel

    tensors = (x, weight, bias, gate, residual, norm_weight, norm_bias)
    pairs: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    out = depthwise_shape(*tensors, **pairs, activation=activation, norm_eps=norm_eps)
    batch, channels, rows, columns = out.shape
    run(kernel, triton_depthwise.grid(config, batch, channels, rows, columns))(
        x,
        weight.contiguous(),
        *(x if t is None else t for t in (bias, gate, residual, norm_weight, norm_bias)),
        out,
        *x.stride(),
        *(0, 0, 0, 0) if gate is None else gate.stride(),
        *(0, 0, 0, 0) if residual is None else residual.stride(),
        channels,
        *x.shape[2:],
        rows,
        columns,
        *weight.shape[:2],
        *stride,
        *(ahead for ahead, _ in both_ends(padding)),
        *dilation,
        0.0 if norm_eps is None else norm_eps,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        HAS_RESIDUAL=residual is not None,
        NORM=norm_eps is not None,
        NORM_WEIGHT=norm_weight is not None,
        NORM_BIAS=norm_bias is not None,
        ACTIVATION=activation,
        **config.constants,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def depthwise_weight_gradient(
    x: torch.Tensor,
    grad: torch.Tensor,
    *,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    config: Config,
) -> torch.Tensor:
    """x [B,C,Y,X], grad [B,C,Y',X'] -> [I,J,C] contiguous."""
    from compiled_attn.ops.kernels.depthwise_gradient import depthwise_gradient as program

    channels, places = x.shape[1], kernel[0] * kernel[1]
    sums = x.new_empty(config.constants["SHARES"], kernel[0], kernel[1], channels, dtype=torch.float32)
    run(program, triton_depthwise_gradient.grid(config, places, channels))(
        x,
        grad,
        sums,
        *x.stride(),
        *grad.stride(),
        channels,
        *x.shape[2:],
        *grad.shape[2:],
        grad.shape[0] * grad.shape[2],
        kernel[1],
        *stride,
        *(ahead for ahead, _ in both_ends(padding)),
        *dilation,
        **config.constants,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return sums.sum(0).to(x.dtype)


def depthwise_input_gradient(
    grad: torch.Tensor,
    weight: torch.Tensor,
    *,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    config: Config,
) -> torch.Tensor:
    """grad [B,C,Y',X'], weight [I,J,C] -> [B,C,Y,X] of `size`, memory [B,Y,X,C]."""
    from compiled_attn.ops.kernels.depthwise_input_gradient import depthwise_input_gradient as program

    pairs: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    out = input_gradient_shape(grad, weight, size=size, **pairs)
    batch, channels, rows, columns = out.shape
    run(program, triton_depthwise_input_gradient.grid(config, batch, channels, rows, columns))(
        grad,
        weight.contiguous(),
        out,
        *grad.stride(),
        channels,
        rows,
        columns,
        *grad.shape[2:],
        *weight.shape[:2],
        *stride,
        *(ahead for ahead, _ in both_ends(padding)),
        *dilation,
        **config.constants,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
