"""FocalNet: "Focal Modulation Networks", Yang et al., NeurIPS 2022, https://arxiv.org/abs/2203.11926.

In place of attention, every position's query is multiplied by a modulator: the sum of contexts of growing reach, made
by a chain of depthwise convolutions and ended by the whole map's mean, each with a gate per position.

Reference: microsoft/FocalNet at e8514bdcfe1eb6e7e110403e9f2972c67dfed1c3 (classification/focalnet.py, configs/*.yaml).
Known differences: no dropout and no stochastic depth (both are off in the reference at inference); the global context
is one mean over the map, where the reference averages rows of columns.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.zoo.layers.vit import Mlp, initialise
from compiled_attn.zoo.paper import Paper, Published

GROWTH = 2  # of the kernel from one focal level to the next, in pixels


@dataclass(frozen=True)
class Config:
    """width: C of the first stage, doubled by every later one; depths: blocks of each stage; patch_size: in pixels.

    levels, windows: L focal levels of each stage, the first with kernel `window`, each 2 wider than the one before.
    conv_embed: overlapping convolutions make and merge patches; post_norm: norms follow modulation and MLP;
    layer_scale: what the scales of a block begin with, None for no scales; norm_in_modulation: a norm before its last
    linear map; normalize: the modulator is the mean of its L + 1 contexts and not their sum; classes 0: no head.
    """

    width: int
    depths: tuple[int, ...]
    levels: tuple[int, ...]
    windows: tuple[int, ...]
    patch_size: int = 4
    img_size: int = 224
    in_chans: int = 3
    classes: int = 1000
    mlp_ratio: float = 4
    conv_embed: bool = False
    post_norm: bool = False
    layer_scale: float | None = None
    norm_in_modulation: bool = False
    normalize: bool = False


class FocalModulation(nn.Module):
    """Focal modulation (section 3.2, equations 4 to 7) of a map [B, Y, X, C]."""

    def __init__(self, width: int, levels: int, window: int, norm: bool, normalize: bool) -> None:
        super().__init__()
        self.parts = (width, width, levels + 1)
        self.share = 1 / (levels + 1) if normalize else 1.0
        self.f = nn.Linear(width, sum(self.parts))
        self.h = nn.Conv2d(width, width, 1)
        self.proj = nn.Linear(width, width)
        kernels = [window + GROWTH * level for level in range(levels)]
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, k, padding=k // 2, groups=width, bias=False), nn.GELU())
            for k in kernels
        )
        self.ln = nn.LayerNorm(width) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        query, context, gates = self.f(x).permute(0, 3, 1, 2).split(self.parts, 1)  # [B, C or L + 1, Y, X]
        modulator = 0
        for level, layer in enumerate(self.focal_layers):
            context = layer(context)
            modulator = modulator + context * gates[:, level : level + 1]
        whole = F.gelu(context.mean((2, 3), keepdim=True))
        modulator = (modulator + whole * gates[:, -1:]) * self.share
        x = (query * self.h(modulator)).permute(0, 2, 3, 1)
        return self.proj(x if self.ln is None else self.ln(x))


class Block(nn.Module):
    """Modulation and MLP of a map [B, Y, X, C], each with its residual and a norm before or, `post_norm`, behind it."""

    def __init__(self, config: Config, stage: int) -> None:
        super().__init__()
        width = config.width * 2**stage
        self.post_norm = config.post_norm
        self.norm1 = nn.LayerNorm(width)
        self.modulation = FocalModulation(
            width, config.levels[stage], config.windows[stage], config.norm_in_modulation, config.normalize
        )
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        scaled = config.layer_scale is not None
        self.gamma_1 = nn.Parameter(torch.full((width,), config.layer_scale)) if scaled else 1.0
        self.gamma_2 = nn.Parameter(torch.full((width,), config.layer_scale)) if scaled else 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = x + self.gamma_1 * self.norm1(self.modulation(x))
            return x + self.gamma_2 * self.norm2(self.mlp(x))
        x = x + self.gamma_1 * self.modulation(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A strided convolution of [B, channels, Y, X] and a norm: patches [B, y, x, C]."""

    def __init__(self, in_chans: int, width: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks on a map [B, Y, X, C] and, but for the last stage, the step to [B, Y / 2, X / 2, 2 C]."""

    def __init__(self, config: Config, stage: int) -> None:
        super().__init__()
        width = config.width * 2**stage
        step = (3, 2, 1) if config.conv_embed else (2, 2, 0)
        last = stage == len(config.depths) - 1
        self.blocks = nn.Sequential(*(Block(config, stage) for _ in range(config.depths[stage])))
        self.downsample = None if last else PatchEmbed(width, 2 * width, *step)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x.permute(0, 3, 1, 2))


class FocalNet(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes]; no position embedding, so any size."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        stem = (7, 4, 2) if config.conv_embed else (config.patch_size, config.patch_size, 0)
        width = config.width * 2 ** (len(config.depths) - 1)
        self.patch_embed = PatchEmbed(config.in_chans, config.width, *stem)
        self.layers = nn.Sequential(*(Stage(config, i) for i in range(len(config.depths))))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.classes) if config.classes else nn.Identity()
        initialise(self)

    def tokens(self, x: Tensor) -> Tensor:
        """The last map's positions [B, y * x, C], normed."""
        return self.norm(self.layers(self.patch_embed(x)).flatten(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x).mean(1))


def pyramid(width: int, third: int, levels: int, window: int = 3) -> Config:
    """Four stages of 2, 2, `third` and 2 blocks."""
    return Config(width, (2, 2, third, 2), (levels,) * 4, (window,) * 4)


def iso(width: int) -> Config:
    """Twelve blocks on patches of 16 pixels."""
    return Config(width, (12,), (3,), (3,), patch_size=16)


def big(width: int, levels: int, window: int) -> Config:
    """The networks that were trained on ImageNet-22k."""
    base = pyramid(width, 18, levels, window)
    return replace(base, conv_embed=True, post_norm=True, layer_scale=1e-4, classes=21_842)


# Parameters and GMACs as measured on the reference (card of FocalNet), where that gives those without a head, the
# head's added; images per second on a V100 and accuracy: tables 1 and 3 of the paper.
PAPER = Paper(
    title="Focal Modulation Networks",
    year=2022,
    link="https://arxiv.org/abs/2203.11926",
    reference="microsoft/FocalNet@e8514bdcfe1eb6e7e110403e9f2972c67dfed1c3",
    model=FocalNet,
    variants={
        "focalnet_tiny_srf": pyramid(96, 6, 2),
        "focalnet_tiny_lrf": pyramid(96, 6, 3),
        "focalnet_small_srf": pyramid(96, 18, 2),
        "focalnet_small_lrf": pyramid(96, 18, 3),
        "focalnet_base_srf": pyramid(128, 18, 2),
        "focalnet_base_lrf": pyramid(128, 18, 3),
        "focalnet_tiny_iso": iso(192),
        "focalnet_small_iso": iso(384),
        "focalnet_base_iso": replace(iso(768), post_norm=True, layer_scale=1e-4),
        "focalnet_large_fl3": big(192, 3, 5),
        "focalnet_large_fl4": replace(big(192, 4, 3), normalize=True),
        "focalnet_xlarge_fl3": big(256, 3, 5),
        "focalnet_xlarge_fl4": big(256, 4, 3),
        "focalnet_huge_fl3": replace(big(352, 3, 3), norm_in_modulation=True),
        "focalnet_huge_fl4": replace(big(352, 4, 3), norm_in_modulation=True),
    },
    tiny=Config(16, (1, 2), (2, 2), (3, 3), img_size=32, classes=10),
    published={
        "focalnet_tiny_srf": Published(28_427_116, 4.42, 4.4, 82.1, 743),
        "focalnet_tiny_lrf": Published(28_647_928, 4.49, 4.5, 82.3, 696),
        "focalnet_small_srf": Published(49_891_216, 8.62, 8.6, 83.4, 434),
        "focalnet_small_lrf": Published(50_342_440, 8.74, 8.7, 83.5, 406),
        "focalnet_base_srf": Published(88_148_144, 15.28, 15.3, 83.7, 280),
        "focalnet_base_lrf": Published(88_749_768, 15.43, 15.4, 83.9, 269),
        "focalnet_tiny_iso": Published(5_880_280, stated_gmacs=1.1, top1=74.1, images_per_second=2334),
        "focalnet_small_iso": Published(22_376_344, 4.31, 4.3, 80.9, 920),
        "focalnet_base_iso": Published(87_237_400, 16.94, 16.9, 82.4, 300),
        "focalnet_large_fl3": Published(239_134_898),
        "focalnet_large_fl4": Published(239_315_402),
        "focalnet_xlarge_fl3": Published(364_033_120 + 2049 * 21_842),
        "focalnet_xlarge_fl4": Published(364_273_784 + 2049 * 21_842),
        "focalnet_huge_fl3": Published(683_747_424 + 2817 * 21_842),
        "focalnet_huge_fl4": Published(686_460_664 + 2817 * 21_842),
    },
    keys="patch_embed.{proj,norm}, layers.s.{blocks.i.{norm1,modulation.{f,h,proj,focal_layers.l.0,ln},norm2,mlp.fc1,"
    "mlp.fc2,gamma_1,gamma_2},downsample.{proj,norm}}, norm, head; the files hold them under `model`",
)
