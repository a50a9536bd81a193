"""DiNAT: "Dilated Neighborhood Attention Transformer", Hassani and Shi, 2022; with NAT, which it builds on.

https://arxiv.org/abs/2209.15001, and NAT: Hassani et al., CVPR 2023, https://arxiv.org/abs/2204.07143. Each pixel
attends to its k x k nearest pixels; where the window would leave the map it stays inside. Dilation takes every d-th
pixel, so that alternate blocks reach far at the same cost.

Reference: SHI-Labs/Neighborhood-Attention-Transformer at d334f5bb0bd73cad05e5aeaf7c14cce3876a9650 (classification/),
its attention from SHI-Labs/NATTEN at 3b54c76185904f3cb59a49fff7bc044e4513d106 (v0.14.6).
Known differences: no dropout and no stochastic depth (off at inference); NAT's isotropic form takes any picture's size.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.ops import local_attention
from compiled_attn.zoo.layers.vit import Mlp, initialise
from compiled_attn.zoo.paper import Paper, Published


@dataclass(frozen=True)
class Config:
    """One entry a level in depths and heads; dilations: one for each block of each level, or () for none.

    width: of the first level, doubled by each later one; layer_scale: what the residuals' factors start at, None
    without any.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratio: float
    dilations: tuple[tuple[int, ...], ...] = ()
    kernel: int = 7
    layer_scale: float | None = None
    img_size: int = 224
    in_chans: int = 3
    classes: int = 1000


@dataclass(frozen=True)
class SwinConfig(Config):
    """DiNAT_s: patches and merging as in Swin."""


@dataclass(frozen=True)
class IsotropicConfig:
    """One width and size throughout; odd blocks are dilated. kernel None: attention over the whole map (ViT-rpb)."""

    width: int
    heads: int
    depth: int = 12
    mlp_ratio: float = 4
    kernel: int | None = 7
    dilation: int = 2
    patch: int = 16
    img_size: int = 224
    in_chans: int = 3
    classes: int = 1000


class NeighborhoodAttention(nn.Module):
    """Softmax over the `kernel` x `kernel` nearest pixels of the same class modulo `dilation`, with relative bias.

    Maps [B, Y, X, C]. A map shorter than kernel * dilation is filled by zeros, which stand as keys with qkv's bias.
    """

    def __init__(self, width: int, heads: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.heads, self.kernel, self.dilation = heads, kernel, dilation
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel - 1, 2 * kernel - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        q, k, v = self.qkv(filled(x, self.kernel * self.dilation)).unflatten(3, (3, self.heads, -1)).unbind(3)
        window, dilation = [self.kernel] * 2, [self.dilation] * 2
        out = local_attention(q, k, v, self.rpb, window=window, dilation=dilation, scale=self.scale)
        return self.proj(out.flatten(3)[:, :height, :width])


@torch.fx.wrap
def filled(x: Tensor, size: int) -> Tensor:
    """A map [B, Y, X, C] with zeros at its right and bottom, to at least size x size."""
    down, across = max(size - x.shape[1], 0), max(size - x.shape[2], 0)
    return F.pad(x, (0, 0, 0, across, 0, down)) if down or across else x


class WholeAttention(NeighborhoodAttention):
    """Every pixel's neighborhood is the whole map of `side` x `side` pixels: ViT with relative bias."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__(width, heads, kernel=side)
        at = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        apart = at[None] - at[:, None] + side - 1  # [N, N, 2], key - query
        self.register_buffer("relative_position_index", apart[..., 0] * (2 * side - 1) + apart[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(of_side(x, self.kernel))


@torch.fx.wrap
def of_side(x: Tensor, side: int) -> Tensor:
    """The map [B, Y, X, C] itself; raises CompiledAttnError where it is not side x side."""
    if x.shape[1] != side or x.shape[2] != side:
        raise CompiledAttnError(
            "the picture is not of the size that the network was built for",
            where="zoo.dinat.WholeAttention",
            facts=f"its map is {x.shape[1]} x {x.shape[2]}, the relative bias is for {side} x {side}",
            do="give a picture of Config.img_size, or build the network for this size",
        )
    return x


class Block(nn.Module):
    """Pre-norm block; with layer scale, each residual has a factor a channel."""

    def __init__(self, width: int, attn: nn.Module, hidden: int, layer_scale: float | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)
        scaled = layer_scale is not None
        self.gamma1 = nn.Parameter(torch.full((width,), float(layer_scale))) if scaled else None
        self.gamma2 = nn.Parameter(torch.full((width,), float(layer_scale))) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gamma1 is None:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = x + self.gamma1 * self.attn(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2, nothing between, and a norm: [B, Y / 4, X / 4, C]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(channels, width // 2, 3, stride=2, padding=1),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.norm(self.proj(pictures).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchEmbed(nn.Module):
    """Squares of pixels, made linear and normed: [B, ceil(Y / patch), ceil(X / patch), C]."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, pictures: Tensor) -> Tensor:
        filling = (0, -pictures.shape[3] % self.patch, 0, -pictures.shape[2] % self.patch)
        return self.norm(self.proj(F.pad(pictures, filling)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """2x2 pixels side by side, column by column, normed and made linear (Swin, Liu et al., arXiv 2103.14030)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, y::2, column::2] for column in range(2) for y in range(2)]
        return self.reduction(self.norm(torch.cat(corners, dim=3)))


class Level(nn.Module):
    """Blocks at one size of the map, then, but for the last, the way to half of it."""

    def __init__(self, level: int, config: Config, downsample: type[nn.Module]) -> None:
        super().__init__()
        width, heads, depth = config.width * 2**level, config.heads[level], config.depths[level]
        hidden, dilations = int(width * config.mlp_ratio), config.dilations[level] if config.dilations else (1,) * depth
        self.blocks = nn.ModuleList(
            Block(width, NeighborhoodAttention(width, heads, config.kernel, dilation), hidden, config.layer_scale)
            for dilation in dilations[:depth]
        )
        self.downsample = downsample(width) if level < len(config.depths) - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class DiNAT(nn.Module):
    """Pictures [B, in_chans, Y, X] of any size to logits [B, classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = ConvTokenizer(config.in_chans, config.width)
        self.levels = nn.ModuleList(Level(i, config, ConvDownsampler) for i in range(len(config.depths)))
        last = config.width * 2 ** (len(config.depths) - 1)
        self.norm = nn.LayerNorm(last)
        self.head = nn.Linear(last, config.classes)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """The normed map [B, Y / 32, X / 32, C] of the last level."""
        x = self.patch_embed(x)
        for level in self.levels:
            x = level(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((1, 2)))


class SwinShaped(nn.Module):
    """DiNAT_s: Swin with dilated and plain neighborhoods for its shifted and plain windows."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.in_chans, config.width, patch=4)
        self.layers = nn.ModuleList(Level(i, config, PatchMerging) for i in range(len(config.depths)))
        last = config.width * 2 ** (len(config.depths) - 1)
        self.norm = nn.LayerNorm(last)
        self.head = nn.Linear(last, config.classes)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((1, 2)))


class Isotropic(nn.Module):
    """A ViT of neighborhoods, with the mean token for the class token."""

    def __init__(self, config: IsotropicConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbed(config.in_chans, width, config.patch)
        hidden = int(width * config.mlp_ratio)
        self.layers = nn.Sequential(*(Block(width, self.attention(i), hidden) for i in range(config.depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.classes)
        initialise(self)

    def attention(self, index: int) -> nn.Module:
        config = self.config
        if config.kernel is None:
            return WholeAttention(config.width, config.heads, config.img_size // config.patch)
        return NeighborhoodAttention(config.width, config.heads, config.kernel, config.dilation if index % 2 else 1)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.layers(self.patch_embed(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((1, 2)))


def build(config: Config | IsotropicConfig) -> nn.Module:
    """The network of a configuration's family."""
    if isinstance(config, IsotropicConfig):
        return Isotropic(config)
    return SwinShaped(config) if isinstance(config, SwinConfig) else DiNAT(config)


def dilated(config: Config, farthest: tuple[int, ...] = (8, 4, 2, 1)) -> Config:
    """Dilation 1 and a level's `farthest` in turn: how often the kernel goes into its map (at 224 pixels and 7)."""
    turns = [tuple((1, far)[i % 2] for i in range(depth)) for depth, far in zip(config.depths, farthest, strict=True)]
    return replace(config, dilations=tuple(turns))


MINI = Config(width=64, depths=(3, 4, 6, 5), heads=(2, 4, 8, 16), mlp_ratio=3)
TINY = replace(MINI, depths=(3, 4, 18, 5))
SMALL = Config(width=96, depths=(3, 4, 18, 5), heads=(3, 6, 12, 24), mlp_ratio=2)
BASE = replace(SMALL, width=128, heads=(4, 8, 16, 32), layer_scale=1e-5)
LARGE = replace(SMALL, width=192, heads=(6, 12, 24, 48))
SWIN_TINY = SwinConfig(width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), mlp_ratio=4)
SWIN_SMALL = replace(SWIN_TINY, depths=(2, 2, 18, 2))
SWIN_BASE = replace(SWIN_SMALL, width=128, heads=(4, 8, 16, 32))
SWIN_LARGE = replace(SWIN_SMALL, width=192, heads=(6, 12, 24, 48))
ISO_SMALL, ISO_BASE = IsotropicConfig(384, 12), IsotropicConfig(768, 24)
AT_384 = (13, 6, 3, 1)

# Accuracy and stated multiply-accumulates: the reference's lists of checkpoints, without those that another way
# of counting rounds otherwise (0.4 % and less apart); parameters: measured on its code.
PAPER = Paper(
    title="Dilated Neighborhood Attention Transformer",
    year=2022,
    link="https://arxiv.org/abs/2209.15001",
    reference="SHI-Labs/Neighborhood-Attention-Transformer@d334f5bb0bd73cad05e5aeaf7c14cce3876a9650",
    model=build,
    variants={
        "nat_mini": MINI,
        "nat_tiny": TINY,
        "nat_small": replace(SMALL, layer_scale=1e-5),
        "nat_base": BASE,
        "dinat_mini": dilated(MINI),
        "dinat_tiny": dilated(TINY),
        "dinat_small": dilated(SMALL),
        "dinat_base": dilated(BASE),
        "dinat_large": dilated(LARGE),
        "dinat_large_21k": replace(dilated(LARGE), classes=21841),
        "dinat_large_384": replace(dilated(LARGE, AT_384), img_size=384),
        "dinat_large_384_11x11": replace(dilated(LARGE), img_size=384, kernel=11),
        "dinat_large_21k_11x11": replace(dilated(LARGE), kernel=11, classes=21841),
        "dinat_s_tiny": dilated(SWIN_TINY),
        "dinat_s_small": dilated(SWIN_SMALL),
        "dinat_s_base": dilated(SWIN_BASE),
        "dinat_s_large": dilated(SWIN_LARGE),
        "dinat_s_large_21k": replace(dilated(SWIN_LARGE), classes=21841),
        "dinat_s_large_384": replace(dilated(SWIN_LARGE, AT_384), img_size=384),
        "nat_isotropic_small": replace(ISO_SMALL, dilation=1),
        "nat_isotropic_base": replace(ISO_BASE, dilation=1),
        "dinat_isotropic_small": ISO_SMALL,
        "dinat_isotropic_base": ISO_BASE,
        "vitrpb_small": replace(ISO_SMALL, kernel=None),
        "vitrpb_base": replace(ISO_BASE, kernel=None),
    },
    tiny=Config(16, (2, 1), (2, 4), mlp_ratio=2, dilations=((1, 2), (1,)), kernel=3, img_size=36, classes=10),
    published={
        "nat_mini": Published(parameters=19_984_174, stated_gmacs=2.7, top1=81.8),
        "nat_tiny": Published(parameters=27_901_582, stated_gmacs=4.3, top1=83.2),
        "nat_small": Published(parameters=50_743_297, stated_gmacs=7.8, top1=83.7),
        "nat_base": Published(parameters=89_769_652, stated_gmacs=13.7, top1=84.3),
        "dinat_mini": Published(parameters=19_984_174, stated_gmacs=2.7, top1=81.8),
        "dinat_tiny": Published(parameters=27_901_582, stated_gmacs=4.3, top1=82.7),
        "dinat_small": Published(parameters=50_719_681, stated_gmacs=7.8, top1=83.8),
        "dinat_base": Published(parameters=89_769_652, stated_gmacs=13.7, top1=84.4),
        "dinat_large": Published(parameters=200_943_514, top1=86.6),
        "dinat_large_384": Published(parameters=200_943_514, stated_gmacs=89.7, top1=87.4),
        "dinat_large_384_11x11": Published(parameters=201_144_250, top1=87.5),
        "dinat_s_tiny": Published(parameters=28_288_354, stated_gmacs=4.5, top1=81.8),
        "dinat_s_small": Published(parameters=49_606_258, top1=83.5),
        "dinat_s_base": Published(parameters=87_768_224, top1=83.8),
        "dinat_s_large": Published(parameters=196_532_476, stated_gmacs=34.5, top1=86.5),
        "dinat_s_large_384": Published(parameters=196_532_476, stated_gmacs=101.5, top1=87.4),
        "dinat_isotropic_small": Published(parameters=21_999_736, stated_gmacs=4.3, top1=80.8),
        "dinat_isotropic_base": Published(parameters=86_465_800, top1=82.1),
    },
    keys="the reference's, bare: patch_embed.{proj,norm}, levels.l.blocks.i.{norm1,attn.{rpb,qkv,proj},norm2,mlp.fc1,"
    "mlp.fc2,gamma1,gamma2}, levels.l.downsample.{reduction,norm}, norm, head; DiNAT_s and the isotropic ones say "
    "layers for levels, and ViT-rpb holds relative_position_index beside rpb",
)
