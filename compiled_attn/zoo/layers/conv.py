"""The parts of convolutional networks that several papers cite, on maps [B, C, Y, X]."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ir.errors import CompiledAttnError


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of every pixel (ConvNeXt, Liu et al., arXiv 2201.03545)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def depthwise(channels: int, kernel: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution of each channel by itself that keeps the map's size."""
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation, groups=channels, bias=bias)


def conv_norm(in_channels: int, channels: int, stride: int = 2) -> nn.Sequential:
    """A 3x3 convolution without bias and its batch norm: the step of most stems."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(channels)
    )


def to_square(tokens: Tensor) -> Tensor:
    """Tokens [B, n * n, C] as a map [B, C, n, n]."""
    count = tokens.shape[1]
    side = math.isqrt(count)
    if side * side != count:
        raise CompiledAttnError(
            "the patches do not make a square",
            where="zoo.layers.conv.to_square",
            facts=f"there are {count} patches, {side} x {side} are {side * side}",
            do="give a square picture",
        )
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def initialise(model: nn.Module, *, fan_out: bool) -> None:
    """Linear maps truncated normal of std 0.02; convolutions the same or, `fan_out`, normal as He et al.; no biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and fan_out:
            fan = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
