"""MOAT: "MOAT: Alternating Mobile Convolution and Attention Brings Strong Vision Models", Yang et al., ICLR 2023.

https://arxiv.org/abs/2210.01820. A Transformer block whose MLP is replaced by an inverted bottleneck with a depthwise
convolution and put in front of attention: it mixes neighbours, widens, and halves the map, so nothing else has to.

Reference: google-research/deeplab2 at 64bc1c1a6505b6cd1779b65f9127180840b8a4fa (TensorFlow:
model/pixel_encoder/moat.py, model/layers/moat_blocks.py, model/layers/moat_attention.py).
Known differences: maps are [B, C, Y, X]; the table of relative positions is resized and indexed at every call, where
the reference does so once when it builds (and so ignores a table that is loaded later); no stochastic depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.layers.conv import initialise
from compiled_attn.zoo.paper import Paper, Published

BATCH_EPSILON = 1e-3
LAYER_EPSILON = 1e-5
KERNEL = 3


@dataclass(frozen=True)
class Config:
    """stem: channels of the convolutions in front. By stage: widths C, depths, whether its blocks attend, strides,
    windows (None: attention over the whole map; maps must be multiples of a window), positions P (tables of relative
    positions have 2 P - 1 entries along each side).

    expansion: inner channels over C; excite: squeeze-and-excitation's channels over C, in blocks that do not attend;
    head_width: D; pool: side of the shortcut's average; relative: whether there are tables at all; global_at_end: the
    last block of a stage attends to the whole map; classes: None for a backbone, which gives the maps of all stages.
    """

    stem: tuple[int, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    attends: tuple[bool, ...] = (False, False, True, True)
    strides: tuple[int, ...] = (2, 2, 2, 2)
    windows: tuple[tuple[int, int] | None, ...] = (None, None, None, None)
    positions: tuple[int | None, ...] = (None, None, 14, 7)
    relative: bool = True
    global_at_end: bool = False
    expansion: int = 4
    excite: float | None = 0.25
    head_width: int = 32
    pool: int = 2
    img_size: int = 224
    in_chans: int = 3
    classes: int | None = 1000


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow's SAME does: what is odd goes behind."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad_same(x, self.kernel_size[0], self.stride[0]))


class SqueezeExcitation(nn.Module):
    """Channels of a map scaled by a small network of their means."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.reduce_conv2d = nn.Conv2d(width, hidden, 1)
        self.expand_conv2d = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = F.silu(self.reduce_conv2d(x.mean(dim=(2, 3), keepdim=True)))
        return torch.sigmoid(self.expand_conv2d(squeezed)) * x


class Attention(nn.Module):
    """Multi-head self attention over a map, with a bias for every head and difference of place."""

    def __init__(self, width: int, head_width: int, positions: int | None) -> None:
        super().__init__()
        self.heads = width // head_width
        self.scale = head_width**-0.5
        self.q, self.k, self.v = (nn.Linear(width, self.heads * head_width) for _ in range(3))
        self.o = nn.Linear(self.heads * head_width, width)
        side = 0 if positions is None else 2 * positions - 1
        table = None if positions is None else nn.Parameter(0.02 * torch.randn(self.heads, side, side))
        self.register_parameter("relative_position_embedding", table)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, Y * X, C] of a `grid` of Y x X to the same."""
        q, k, v = (linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        table = self.relative_position_embedding
        bias = None if table is None else relative_bias(table, grid[0], grid[1])[None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.o(out.transpose(1, 2).flatten(2))


class MobileConvolution(nn.Module):
    """Widen, mix neighbours channel by channel, narrow; beside a shortcut that averages where the stride is not one."""

    def __init__(self, config: Config, stage: int, channels: int, stride: int) -> None:
        super().__init__()
        width = config.widths[stage]
        inner = config.expansion * width
        self.stride = stride
        self.pool = config.pool
        self.shortcut_conv = nn.Conv2d(channels, width, 1) if channels != width else None
        self.pre_norm = batch_norm(channels)
        self.expand_conv = nn.Conv2d(channels, inner, 1, bias=False)
        self.expand_norm = batch_norm(inner)
        self.depthwise_conv = SameConv2d(inner, inner, KERNEL, stride=stride, groups=inner, bias=False)
        self.depthwise_norm = batch_norm(inner)
        excited = config.excite is not None and not config.attends[stage]
        self.se = SqueezeExcitation(inner, max(1, int(config.excite * width))) if excited else None
        self.shrink_conv = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.stride == 1 else average_pool_same(x, self.pool, self.stride)
        if self.shortcut_conv is not None:
            shortcut = self.shortcut_conv(shortcut)
        x = F.gelu(self.expand_norm(self.expand_conv(self.pre_norm(x))))
        x = F.gelu(self.depthwise_norm(self.depthwise_conv(x)))
        if self.se is not None:
            x = self.se(x)
        return shortcut + self.shrink_conv(x)


class Block(MobileConvolution):
    """A mobile convolution, then attention with its residual (section 3.1, figure 1)."""

    def __init__(self, config: Config, stage: int, channels: int, stride: int, window: tuple[int, int] | None) -> None:
        super().__init__(config, stage, channels, stride)
        width = config.widths[stage]
        self.window = window
        self.attention_norm = nn.LayerNorm(width, eps=LAYER_EPSILON)
        self.attention = Attention(width, config.head_width, config.positions[stage] if config.relative else None)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        height, width = x.shape[2], x.shape[3]
        window = self.window or (height, width)
        tokens = self.attention_norm(x.permute(0, 2, 3, 1))
        if self.window is None:
            out = self.attention(tokens.flatten(1, 2), window).unflatten(1, window)
        else:
            out = from_windows(self.attention(to_windows(tokens, window), window), window, height, width)
        return x + out.permute(0, 3, 1, 2)


class Stem(nn.Module):
    """Convolutions with batch norm and GELU between, none behind the last; the first has stride 2."""

    def __init__(self, in_chans: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.depth = len(widths)
        for i, (channels, width) in enumerate(zip((in_chans, *widths), widths, strict=False)):
            self.add_module(f"conv_{i}", SameConv2d(channels, width, KERNEL, stride=2 if i == 0 else 1))
            if i < self.depth - 1:
                self.add_module(f"norm_{i}", batch_norm(width))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x = getattr(self, f"conv_{i}")(x)
            if i < self.depth - 1:
                x = F.gelu(getattr(self, f"norm_{i}")(x))
        return x


class MOAT(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes], or as a backbone to the maps of the stem and all stages."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config.in_chans, config.stem)
        channels = config.stem[-1]
        for stage, depth in enumerate(config.depths):
            for i in range(depth):
                stride = config.strides[stage] if i == 0 else 1
                self.add_module(block_name(stage, i), self.block(stage, i, channels, stride))
                channels = config.widths[stage]
        self.final_layer_norm = nn.LayerNorm(channels, eps=LAYER_EPSILON) if config.classes is not None else None
        self.logits_head = nn.Conv2d(channels, config.classes, 1) if config.classes is not None else None
        initialise(self, fan_out=False)

    def block(self, stage: int, index: int, channels: int, stride: int) -> nn.Module:
        config = self.config
        if not config.attends[stage]:
            return MobileConvolution(config, stage, channels, stride)
        everywhere = config.global_at_end and index == config.depths[stage] - 1
        return Block(config, stage, channels, stride, None if everywhere else config.windows[stage])

    def features(self, x: Tensor) -> list[Tensor]:
        """The maps [B, C, Y, X] behind the stem and behind every stage."""
        maps = [self.stem(x)]
        for stage, depth in enumerate(self.config.depths):
            x = maps[-1]
            for i in range(depth):
                x = getattr(self, block_name(stage, i))(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        maps = self.features(x)
        if self.logits_head is None:
            return maps
        pooled = self.final_layer_norm(maps[-1].mean(dim=(2, 3)))
        return self.logits_head(pooled[:, :, None, None]).flatten(1)


def block_name(stage: int, index: int) -> str:
    return f"block_{stage:02}_{index:02}"


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BATCH_EPSILON, momentum=0.01)


def same_padding(sizes: Sequence[int], kernel: int, stride: int) -> list[int]:
    """(left, right, top, bottom) for a map of these last two sizes, so that the result has ceil(size / stride)."""
    padding: list[int] = []
    for size in reversed(sizes):
        rest = size % stride
        total = max(kernel - (stride if rest == 0 else rest), 0)  # a number for symbolic multiples, too
        padding += [total // 2, total - total // 2]
    return padding


@torch.fx.wrap
def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    return F.pad(x, same_padding(x.shape[2:], kernel, stride))


@torch.fx.wrap
def average_pool_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Means over what of each window lies on the map; windows are placed as SAME places them."""
    padding = same_padding(x.shape[2:], kernel, stride)
    if not any(padding):
        return F.avg_pool2d(x, kernel, stride)
    covered = F.avg_pool2d(F.pad(x.new_ones(1, 1, *x.shape[2:]), padding), kernel, stride)
    return F.avg_pool2d(F.pad(x, padding), kernel, stride) / covered


@torch.fx.wrap
def relative_bias(table: Tensor, height: int, width: int) -> Tensor:
    """[H, Y * X, Y * X] from a table [H, a, b], resized bilinearly: the entry of (y' - y, x' - x) for key y', x'."""
    if table.shape[1:] != (2 * height - 1, 2 * width - 1):
        size = (2 * height - 1, 2 * width - 1)
        table = F.interpolate(table[None], size=size, mode="bilinear", align_corners=False)[0]
    y, x = (torch.arange(size, device=table.device) for size in (height, width))
    down, right = y[None, :] - y[:, None] + height - 1, x[None, :] - x[:, None] + width - 1
    return table[:, down[:, None, :, None], right[None, :, None, :]].flatten(3, 4).flatten(1, 2)


@torch.fx.wrap
def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """A map [B, Y, X, C] to tokens [B * windows, window tokens, C]."""
    height, width = x.shape[1], x.shape[2]
    if height % window[0] or width % window[1]:
        raise CompiledAttnError(
            "the windows do not tile the map",
            where="zoo.moat.Block",
            facts=f"the map is {height} x {width}, windows are {window[0]} x {window[1]}",
            do="give a picture whose maps are multiples of the windows, or attend to the whole map (windows None)",
        )
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))  # [B, rows, wy, columns, wx, C]
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


@torch.fx.wrap
def from_windows(x: Tensor, window: tuple[int, int], height: int, width: int) -> Tensor:
    """The inverse of `to_windows`: a map [B, Y, X, C]."""
    x = x.unflatten(0, (-1, height // window[0], width // window[1])).unflatten(3, window)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


WIDE = {"moat_0": ((64, 64), (96, 192, 384, 768), (2, 3, 7, 2), 224)}
WIDE["moat_1"] = ((64, 64), (96, 192, 384, 768), (2, 6, 14, 2), 224)
WIDE["moat_2"] = ((128, 128), (128, 256, 512, 1024), (2, 6, 14, 2), 384)
WIDE["moat_3"] = ((160, 160), (160, 320, 640, 1280), (2, 12, 28, 2), 512)
WIDE["moat_4"] = ((256, 256), (256, 512, 1024, 2048), (2, 12, 28, 2), 512)
for _index, _width in enumerate((32, 40, 56, 80)):
    _widths = (_width, 2 * _width, 4 * _width, 8 * _width)
    WIDE[f"tiny_moat_{_index}"] = ((_width, _width), _widths, (2, 3, 7, 2), 256)

WITH = {name: Config(stem, widths, depths, img_size=size) for name, (stem, widths, depths, size) in WIDE.items()}
WITHOUT = {f"{name}_without_positions": replace(config, relative=False) for name, config in WITH.items()}

# Parameters: the reference's tests, and the card; accuracy: the reference's list of checkpoints. Its operation counts
# hold more than products and normalisations, so they are not repeated here.
PAPER = Paper(
    title="MOAT: Alternating Mobile Convolution and Attention Brings Strong Vision Models",
    year=2023,
    link="https://arxiv.org/abs/2210.01820",
    reference="google-research/deeplab2@64bc1c1a6505b6cd1779b65f9127180840b8a4fa",
    model=MOAT,
    variants=WITH | WITHOUT,
    tiny=Config(
        stem=(8, 8),
        widths=(12, 16, 16),
        depths=(1, 2, 1),
        attends=(False, True, True),
        strides=(2, 2, 2),
        windows=(None, (3, 2), None),
        positions=(None, 4, 2),
        global_at_end=True,
        head_width=8,
        img_size=48,
        classes=10,
    ),
    published={
        "moat_0": Published(parameters=27_846_892, top1=83.3),
        "moat_1": Published(parameters=41_598_448, top1=84.2),
        "moat_2": Published(parameters=73_422_408, top1=87.5),
        "moat_3": Published(parameters=189_958_040, top1=88.4),
        "moat_4": Published(parameters=483_214_184, top1=89.1),
        "tiny_moat_0": Published(parameters=3_355_348, top1=76.6),
        "tiny_moat_1": Published(parameters=5_122_895, top1=79.2),
        "tiny_moat_2": Published(parameters=9_772_741, top1=81.7),
        "tiny_moat_3": Published(parameters=19_534_390, top1=83.3),
        "moat_0_without_positions": Published(parameters=27_777_544, top1=83.0),
        "moat_1_without_positions": Published(parameters=41_467_864, top1=84.1),
        "moat_2_without_positions": Published(parameters=73_248_296, top1=87.2),
        "moat_3_without_positions": Published(parameters=189_536_280, top1=88.2),
        "moat_4_without_positions": Published(parameters=482_539_368, top1=88.9),
        "tiny_moat_0_without_positions": Published(parameters=3_332_232, top1=76.0),
        "tiny_moat_1_without_positions": Published(parameters=5_094_000, top1=78.9),
        "tiny_moat_2_without_positions": Published(parameters=9_732_288, top1=81.3),
        "tiny_moat_3_without_positions": Published(parameters=19_476_600, top1=83.0),
    },
    keys="TensorFlow's names without `moat/`, the stem's under `stem`, slashes as dots: stem.{conv_0,norm_0,conv_1}, "
    "block_SS_BB.{pre_norm,expand_conv,expand_norm,depthwise_conv,depthwise_norm,se.reduce_conv2d,se.expand_conv2d,"
    "shrink_conv,shortcut_conv,attention_norm,attention.{q,k,v,o,relative_position_embedding}}, final_layer_norm, "
    "logits_head; kernels as torch lays them out, gamma and beta as weight and bias",
)
