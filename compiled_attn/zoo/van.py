"""VAN: "Visual Attention Network", Guo et al., Computational Visual Media 2023, https://arxiv.org/abs/2202.09741.

Large kernel attention: a depthwise 5x5, a depthwise 7x7 of dilation 3 and a pointwise convolution together see 23x23
pixels, and their output multiplies their input. A network of four stages is built of it and of convolutional MLPs.

Reference: Visual-Attention-Network/VAN-Classification at e19779b53a1b0828b51ecb4412d577541aee83a7 (models/van.py); its
code has B0 to B3, the rows of B4 to B6 are those of the paper.
Known differences: no dropout and no stochastic depth (both are off in the reference at inference).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.zoo.layers.conv import LayerNorm2d, depthwise, initialise
from compiled_attn.zoo.paper import Paper, Published


@dataclass(frozen=True)
class Config:
    """widths, depths, mlp_ratios: channels, blocks and expansion of each stage; classes 0: features, no head.

    norm_eps: of the LayerNorm that ends a stage; layer_scale: what the two scales of every block begin with.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    img_size: int = 224
    in_chans: int = 3
    classes: int = 1000
    norm_eps: float = 1e-6
    layer_scale: float = 1e-2


class LKA(nn.Module):
    """Large kernel attention (section 3.1, equation 5): the map times what a 23x23 neighbourhood makes of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv0 = depthwise(width, 5)
        self.conv_spatial = depthwise(width, 7, dilation=3)
        self.conv1 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class Attention(nn.Module):
    """LKA between two pointwise convolutions, and its input, which is the normed map, added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(width, width, 1)
        self.spatial_gating_unit = LKA(width)
        self.proj_2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x))))


class DWConv(nn.Module):
    """The depthwise 3x3 of the MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = depthwise(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


class Mlp(nn.Module):
    """Convolutional feed-forward network: pointwise, depthwise 3x3, GELU (erf), pointwise."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.dwconv = DWConv(hidden)
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


class Block(nn.Module):
    """Attention and MLP, each behind a batch norm, scaled per channel and added."""

    def __init__(self, width: int, hidden: int, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.attn = Attention(width)
        self.norm2 = nn.BatchNorm2d(width)
        self.mlp = Mlp(width, hidden)
        self.layer_scale_1 = nn.Parameter(torch.full((width,), layer_scale))
        self.layer_scale_2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1[:, None, None] * self.attn(self.norm1(x))
        return x + self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution, 7x7 by 4 for pictures and 3x3 by 2 later, and a batch norm."""

    def __init__(self, in_chans: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class VAN(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        before = config.in_chans
        for stage, (width, depth, ratio) in enumerate(
            zip(config.widths, config.depths, config.mlp_ratios, strict=True), start=1
        ):
            kernel, stride = (7, 4) if stage == 1 else (3, 2)
            blocks = (Block(width, int(width * ratio), config.layer_scale) for _ in range(depth))
            self.add_module(f"patch_embed{stage}", PatchEmbed(before, width, kernel, stride))
            self.add_module(f"block{stage}", nn.Sequential(*blocks))
            self.add_module(f"norm{stage}", LayerNorm2d(width, config.norm_eps))
            before = width
        self.head = nn.Linear(before, config.classes) if config.classes else nn.Identity()
        initialise(self, fan_out=True)

    def features(self, x: Tensor) -> list[Tensor]:
        """The map [B, width, y, x] that each stage ends with."""
        maps = []
        for stage in range(1, len(self.config.depths) + 1):
            x = self.get_submodule(f"patch_embed{stage}")(x)
            x = self.get_submodule(f"block{stage}")(x)
            x = self.get_submodule(f"norm{stage}")(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[-1].mean((2, 3)))


B0 = Config((32, 64, 160, 256), (3, 3, 5, 2))
B1 = Config((64, 128, 320, 512), (2, 2, 4, 2))
B2 = Config((64, 128, 320, 512), (3, 3, 12, 3))
B3 = Config((64, 128, 320, 512), (3, 5, 27, 3))

# Parameters and multiply-accumulates as measured on the reference (card of VAN), accuracy: table 5 of the paper.
PAPER = Paper(
    title="Visual Attention Network",
    year=2022,
    link="https://arxiv.org/abs/2202.09741",
    reference="Visual-Attention-Network/VAN-Classification@e19779b53a1b0828b51ecb4412d577541aee83a7",
    model=VAN,
    variants={
        "van_b0": B0,
        "van_b1": B1,
        "van_b2": B2,
        "van_b3": B3,
        "van_b4": Config((64, 128, 320, 512), (3, 6, 40, 3)),
        "van_b5": Config((96, 192, 480, 768), (3, 3, 24, 3)),
        "van_b6": Config((96, 192, 384, 768), (6, 6, 90, 6)),
    },
    tiny=Config((16, 16, 24, 32), (1, 1, 2, 1), (2, 2, 2, 2), img_size=64, classes=10),
    published={
        "van_b0": Published(4_105_800, 0.868, stated_gmacs=0.9, top1=75.4),
        "van_b1": Published(13_861_800, 2.502, stated_gmacs=2.5, top1=81.1),
        "van_b2": Published(26_578_472, 5.002, stated_gmacs=5.0, top1=82.8),
        "van_b3": Published(44_765_608, 8.940, top1=83.9),
        "van_b4": Published(60_283_176, 12.162, stated_gmacs=12.2, top1=84.2),
        "van_b5": Published(89_967_688, 17.148),
        "van_b6": Published(199_829_416, 38.753),
    },
    keys="patch_embedK.{proj,norm}, blockK.i.{norm1,attn.proj_1,attn.spatial_gating_unit.{conv0,conv_spatial,conv1},"
    "attn.proj_2,norm2,mlp.{fc1,dwconv.dwconv,fc2},layer_scale_1,layer_scale_2}, normK for K = 1..4, head; the files "
    "hold them under `state_dict`",
)
