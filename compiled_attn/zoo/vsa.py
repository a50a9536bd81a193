"""VSA: "VSA: Learning Varied-Size Window Attention in Vision Transformers", Zhang, Xu, Zhang and Tao, ECCV 2022.

https://arxiv.org/abs/2204.08446, on the backbone of ViTAEv2 (arXiv 2202.10108). Queries keep their windows; each head
moves and scales the rectangle that a window's keys and values are sampled from, as read off the window's mean.

Reference: ViTAE-Transformer/ViTAE-VSA at 75dc9867ffdcf2b91e484f371dd1aba3e6989d7c (Image-Classification/vitaev2_vsa).
Known differences: no dropout and no stochastic depth (off at inference); sample points are computed from the map's own
size, so that pictures of any size run whose maps are no smaller than a window, where the reference refuses all but one.
"""

import math
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
    """One entry a stage: widths of its tokens; embeds of each dilated convolution; depths, heads and groups of normal
    cells; reduction_heads and reduction_groups of its reduction cell; ratios of size, kernels and dilations of that.

    wide: the convolutions beside reduction cells are twice as wide as tokens; cpe: convolutional positions.
    """

    embeds: tuple[int, ...] = (64, 64, 128, 256)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 8, 2)
    heads: tuple[int, ...] = (2, 4, 8, 16)
    reduction_heads: tuple[int, ...] = (2, 2, 4, 8)
    groups: tuple[int, ...] = (1, 32, 64, 128)
    reduction_groups: tuple[int, ...] = (1, 16, 32, 64)
    ratios: tuple[int, ...] = (4, 2, 2, 2)
    kernels: tuple[int, ...] = (7, 3, 3, 3)
    dilations: tuple[tuple[int, ...], ...] = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))
    wide: bool = False
    cpe: bool = True
    window: int = 7
    mlp_ratio: float = 4
    img_size: int = 224
    in_chans: int = 3
    classes: int = 1000


def on_map(layer: nn.Module, x: Tensor) -> Tensor:
    """Convolutions of a map [B, Y, X, C]."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class VariedSizeWindowAttention(nn.Module):
    """Maps [B, Y, X, channels] to [B, Y, X, C] (section 3.2). Zeros fill the last windows behind the projection."""

    def __init__(self, channels: int, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.scale = (channels // heads) ** -0.5
        self.sampling_offsets = self.regression(channels)
        self.sampling_scales = self.regression(channels)
        self.qkv = nn.Conv2d(channels, 3 * width, kernel_size=1)
        self.proj = nn.Conv2d(width, width, kernel_size=1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", swin_index(window))

    def regression(self, channels: int) -> nn.Sequential:
        """x and y of each head and window, [B, 2 H, windows of Y, windows of X], from the window's mean."""
        return nn.Sequential(
            nn.AvgPool2d(self.window, self.window), nn.LeakyReLU(), nn.Conv2d(channels, 2 * self.heads, kernel_size=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        filling = (0, -width % self.window, 0, -height % self.window)
        x = x.permute(0, 3, 1, 2)
        qkv = F.pad(self.qkv(x), filling).unflatten(1, (3, self.heads, -1))  # [B, 3, H, D, Y', X']
        filled = F.pad(x, filling)
        offsets, scales = self.sampling_offsets(filled), self.sampling_scales(filled)
        k, v = sampled(qkv[:, 1:], offsets, scales, self.window, height, width).unbind(1)
        q, k, v = (part.permute(0, 3, 4, 1, 2) for part in (qkv[:, 0], k, v))  # [B, Y', X', H, D]
        side = 2 * self.window - 1  # the table counts query - key, the op key - query
        bias = self.relative_position_bias_table.flip(0).t().reshape(self.heads, side, side)
        window = [self.window, self.window]
        out = local_attention(q, k, v, bias, window=window, stride=window, scale=self.scale)
        return on_map(self.proj, out.flatten(3)[:, :height, :width])


@torch.fx.wrap
def sampled(kv: Tensor, offsets: Tensor, scales: Tensor, window: int, height: int, width: int) -> Tensor:
    """Keys and values [B, 2, H, D, Y', X'] at each head's and window's own points, bilinear, zeros outside the map.

    offsets, scales [B, 2 H, y, x] as regressed for the y x x windows; height, width: the map's before it was filled.
    """
    if height < window or width < window:
        raise CompiledAttnError(
            "the map is smaller than a window",
            where="zoo.vsa.VariedSizeWindowAttention",
            facts=f"the map is {height} x {width}, the window {window} x {window}, and offsets count in whole windows",
            do="give a larger picture: at stride 32 and window 7, at least 224 x 224",
        )
    heads = kv.shape[2]
    wide = torch.promote_types(kv.dtype, torch.float32)  # points need its precision, whatever the map's
    parts = []
    for axis, (size, counted) in enumerate(((kv.shape[5], width), (kv.shape[4], height))):  # x, then y
        step = 2 / (size - 1)
        along = torch.arange(size, device=kv.device, dtype=wide).view(-1, window)  # [windows, w]
        inside = (torch.arange(window, device=kv.device, dtype=wide) - (window - 1) / 2) * step
        move, zoom = (t.to(wide).unflatten(1, (heads, 2))[:, :, axis].flatten(0, 1) for t in (offsets, scales))
        move = move / (counted // window)  # [B H, y, x]
        shape, at = (
            ((1, 1, 1, -1, window), (1, 1, 1, 1, window))
            if axis == 0
            else ((1, -1, window, 1, 1), (1, 1, window, 1, 1))
        )
        points = (
            (along * step - 1).view(shape) + inside.view(at) * zoom[:, :, None, :, None] + move[:, :, None, :, None]
        )
        parts.append(points.expand(-1, kv.shape[4] // window, window, kv.shape[5] // window, window))
    grid = torch.stack(parts, dim=5).flatten(3, 4).flatten(1, 2)  # [B H, Y', X', 2]
    maps = kv.transpose(1, 2).flatten(0, 1).flatten(1, 2).to(wide)  # [B H, 2 D, Y', X']
    found = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=True).to(kv.dtype)
    return found.unflatten(1, (2, -1)).unflatten(0, (-1, heads)).transpose(1, 2)


def swin_index(window: int) -> Tensor:
    """Where Swin's table holds the bias of query and key, [w w, w w]: (dy + w - 1) (2 w - 1) + dx + w - 1."""
    at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    apart = at[:, None] - at[None] + window - 1  # [w w, w w, 2], query - key
    return apart[..., 0] * (2 * window - 1) + apart[..., 1]


def pyramid(channels: int, widths: tuple[int, int, int], strides: tuple[int, int, int], groups: int) -> nn.Sequential:
    """Three grouped 3x3 convolutions, the convolutional branch of a cell."""
    layers: list[nn.Module] = []
    for width, stride in zip(widths, strides, strict=True):
        layers += [
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, groups=groups),
            nn.BatchNorm2d(width),
            nn.SiLU(),
        ]
        channels = width
    return nn.Sequential(*layers[:-2])


class DilatedPyramid(nn.Module):
    """Convolutions of several dilations beside each other, GELU behind each: [B, Y / ratio, X / ratio, n E]."""

    def __init__(self, channels: int, embed: int, kernel: int, ratio: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        for dilation in dilations:
            padding = math.ceil(((kernel - 1) * dilation + 1 - ratio) / 2)
            conv = nn.Conv2d(channels, embed, kernel, stride=ratio, padding=padding, dilation=dilation)
            self.convs.append(nn.Sequential(conv, nn.GELU()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([on_map(conv, x) for conv in self.convs], dim=3)


class Cell(nn.Module):
    """Varied-size window attention and a convolutional branch beside each other, then an MLP."""

    def __init__(self, channels: int, width: int, heads: int, hidden: int, eps: float, config: Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=eps)
        self.pos = nn.Conv2d(channels, channels, 7, padding=3, groups=channels) if config.cpe else None
        self.attn = VariedSizeWindowAttention(channels, width, heads, config.window)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden)

    def attend(self, x: Tensor) -> Tensor:
        return self.attn(self.norm1(x if self.pos is None else x + on_map(self.pos, x)))


class ReductionCell(Cell):
    """The map made smaller; nothing passes around its attention but the convolutional branch."""

    def __init__(self, stage: int, channels: int, config: Config) -> None:
        embed, width, ratio = config.embeds[stage], config.widths[stage], config.ratios[stage]
        dilations = config.dilations[stage]
        super().__init__(embed * len(dilations), width, config.reduction_heads[stage], width, 1e-5, config)
        inner = 2 * width if config.wide else embed
        strides = (2, 2, 1) if ratio == 4 else (2, 1, 1)
        self.PCM = pyramid(channels, (inner, inner, width), strides, config.reduction_groups[stage])
        self.PRM = DilatedPyramid(channels, embed, config.kernels[stage], ratio, dilations)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(self.PRM(x)) + on_map(self.PCM, x)
        return x + self.mlp(self.norm2(x))


class NormalCell(Cell):
    def __init__(self, stage: int, config: Config) -> None:
        width = config.widths[stage]
        hidden = int(width * config.mlp_ratio)
        super().__init__(width, width, config.heads[stage], hidden, 1e-6, config)
        self.PCM = pyramid(width, (hidden, width, width), (1, 1, 1), config.groups[stage])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x) + on_map(self.PCM, x)
        return x + self.mlp(self.norm2(x))


class Stage(nn.Module):
    def __init__(self, stage: int, channels: int, config: Config) -> None:
        super().__init__()
        self.RC = ReductionCell(stage, channels, config)
        self.NC = nn.ModuleList(NormalCell(stage, config) for _ in range(config.depths[stage]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.RC(x)
        for cell in self.NC:
            x = cell(x)
        return x


class ViTAEv2(nn.Module):
    """Pictures [B, in_chans, Y, X], sizes multiples of 32, to logits [B, classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        channels = (config.in_chans, *config.widths)
        self.layers = nn.ModuleList(Stage(i, channels[i], config) for i in range(len(config.widths)))
        self.head = nn.Linear(config.widths[-1], config.classes)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """The last stage's map [B, Y / 32, X / 32, C]."""
        x = x.permute(0, 2, 3, 1)
        for stage in self.layers:
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((1, 2)))


S = Config()
WIDE_S = replace(S, wide=True, reduction_heads=S.heads)
WIDE_48M = replace(
    WIDE_S, embeds=(96, 96, 192, 384), widths=(96, 192, 384, 768), depths=(2, 2, 11, 2), heads=(3, 6, 12, 24),
    reduction_heads=(3, 6, 12, 24),
)  # fmt: skip
WIDE_B = replace(
    WIDE_S, embeds=(128, 128, 256, 512), widths=(128, 256, 512, 1024), depths=(2, 2, 12, 2), heads=(4, 8, 16, 32),
    reduction_heads=(4, 8, 16, 32),
)  # fmt: skip

# Accuracy: the reference's README; parameters and multiply-accumulates: measured on its code.
PAPER = Paper(
    title="VSA: Learning Varied-Size Window Attention in Vision Transformers",
    year=2022,
    link="https://arxiv.org/abs/2204.08446",
    reference="ViTAE-Transformer/ViTAE-VSA@75dc9867ffdcf2b91e484f371dd1aba3e6989d7c",
    model=ViTAEv2,
    variants={
        "vitaev2_vsa_s": S,
        "vitaev2_vsa_widepcm_s": WIDE_S,
        "vitaev2_vsa_widepcm_48m": WIDE_48M,
        "vitaev2_vsa_widepcm_b": WIDE_B,
        "vitaev2_vsa_widepcm_b_ws12": replace(WIDE_B, window=12, img_size=384),
    },
    tiny=Config(
        embeds=(8, 8),
        widths=(16, 16),
        depths=(0, 1),
        heads=(2, 4),
        reduction_heads=(2, 2),
        groups=(1, 4),
        reduction_groups=(1, 4),
        ratios=(4, 2),
        kernels=(7, 3),
        dilations=((1,), (1, 2)),
        window=3,
        mlp_ratio=2,
        img_size=56,
        classes=10,
    ),
    published={
        "vitaev2_vsa_s": Published(parameters=19_773_300, top1=82.7),
        "vitaev2_vsa_widepcm_s": Published(parameters=20_342_442),
        "vitaev2_vsa_widepcm_48m": Published(parameters=51_089_119, top1=83.9),
        "vitaev2_vsa_widepcm_b": Published(parameters=93_711_532, top1=86.2),
    },
    keys="the reference's: layers.s.RC and layers.s.NC.i with {norm1,pos,attn.{qkv,proj,sampling_offsets.2,"
    "sampling_scales.2,relative_position_bias_table,relative_position_index},norm2,mlp,PCM}, RC.PRM.convs.j.0, head",
)
