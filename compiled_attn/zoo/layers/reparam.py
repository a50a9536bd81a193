"""Large depthwise kernels trained with branches that merge into them at inference (UniRepLKNet, arXiv 2311.15599)."""

import torch
from torch import Tensor, nn

from compiled_attn.zoo.layers.conv import depthwise

# (kernel, dilation) of the branches beside a large kernel
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


class DilatedReparam(nn.Module):
    """A depthwise kernel and smaller dilated ones, each with its batch norm, summed; `deploy`: merged to one."""

    def __init__(self, width: int, kernel: int, deploy: bool) -> None:
        super().__init__()
        self.branches = () if deploy else BRANCHES[kernel]
        self.lk_origin = depthwise(width, kernel, bias=deploy)
        self.origin_bn = None if deploy else nn.BatchNorm2d(width)
        for side, dilation in self.branches:
            self.add_module(f"dil_conv_k{side}_{dilation}", depthwise(width, side, dilation, bias=False))
            self.add_module(f"dil_bn_k{side}_{dilation}", nn.BatchNorm2d(width))

    def pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Every convolution with its batch norm, the large one first; none in the merged form."""
        if self.origin_bn is None:
            return []
        names = [f"k{side}_{dilation}" for side, dilation in self.branches]
        beside = [(self.get_submodule(f"dil_conv_{n}"), self.get_submodule(f"dil_bn_{n}")) for n in names]
        return [(self.lk_origin, self.origin_bn), *beside]

    def forward(self, x: Tensor) -> Tensor:
        if self.origin_bn is None:
            return self.lk_origin(x)
        out = self.origin_bn(self.lk_origin(x))
        for conv, norm in self.pairs()[1:]:
            out = out + norm(conv(x))
        return out

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight [C, 1, K, K] and bias [C] of the one convolution that computes the same at inference."""
        if self.origin_bn is None:
            return self.lk_origin.weight.clone(), self.lk_origin.bias.clone()
        weight, bias = torch.zeros_like(self.lk_origin.weight), torch.zeros_like(self.origin_bn.bias)
        for conv, norm in self.pairs():
            factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            step, reach = conv.dilation[0], conv.padding[0]
            first = weight.shape[2] // 2 - reach
            taps = slice(first, first + 2 * reach + 1, step)
            weight[:, :, taps, taps] += conv.weight * factor[:, None, None, None]
            bias += norm.bias - norm.running_mean * factor
        return weight, bias
