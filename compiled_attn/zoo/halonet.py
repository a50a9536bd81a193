"""HaloNet: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", Vaswani et al., CVPR 2021.

https://arxiv.org/abs/2103.12731. Convolutions of a ResNet give way to attention of blocks: the queries of a block share
one window of keys, the block with a halo around it, and fewer queries than keys make it a downsampling.

Reference: timm 1.0.31 (layers/halo_attn.py, models/byoanet.py, models/byobnet.py), the one public form with weights;
the authors gave out no code.
Known differences: no dropout and no stochastic depth (off at inference); no branch starts at zero; a map need not be a
multiple of the block (the last block is cut, its window still counts zeros), where the reference refuses.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ops import local_attention
from compiled_attn.zoo.paper import Paper, Published

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu}


@dataclass(frozen=True)
class Stage:
    """depth blocks of `width` channels, attention in those that `attends` counts; ratio: of the narrow part's width."""

    depth: int
    width: int
    attends: tuple[int, ...] = ()
    ratio: float = 0.25
    heads: int = 8


@dataclass(frozen=True)
class Config:
    """block, halo: sides in pixels; stem: channels of each of its convolutions, stem_kernel: of the only one.

    gate: "se", "eca" or None, behind 3x3 convolutions, which have groups of group_size channels (0: one group);
    dim_head: width of queries' heads, None for the values'; features: channels in front of the head, None as they are.
    """

    stages: tuple[Stage, ...]
    block: int = 8
    halo: int = 3
    act: str = "relu"
    stem: tuple[int, ...] = (24, 32, 64)
    stem_kernel: int = 3
    stem_pool: bool = True
    gate: str | None = None
    group_size: int = 0
    dim_head: int | None = None
    features: int | None = None
    img_size: int = 256
    in_chans: int = 3
    classes: int = 1000


class ConvNorm(nn.Module):
    """Convolution, batch norm and, unless None, an activation."""

    def __init__(
        self, channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1, act: str | None = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if self.act is None else ACTIVATIONS[self.act](x)


class SqueezeExcite(nn.Module):
    """Each channel times a gate that the mean of all channels gives (Hu et al., arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = divisible(channels / 16, least_share=0)
        self.fc1 = nn.Conv2d(channels, hidden, kernel_size=1)
        self.fc2 = nn.Conv2d(hidden, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class EfficientChannels(nn.Module):
    """Each channel times a gate that the means of its neighbours among the channels give (arXiv 1910.03151)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reach = int(abs(math.log2(channels) + 1) / 2)
        kernel = max(reach if reach % 2 else reach + 1, 3)
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid()  # [B, 1, C]
        return x * gate.transpose(1, 2).unsqueeze(3)


GATES: dict[str, type[nn.Module]] = {"se": SqueezeExcite, "eca": EfficientChannels}


class RelativeEmbeddings(nn.Module):
    """Embeddings of the distance between a row or column of the window and one of the block, each from its start."""

    def __init__(self, window: int, dim: int) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim))
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=dim**-0.5)

    def forward(self, q: Tensor, halo: int) -> Tensor:
        """Unscaled q [B, Y, X, H, D] to its logits for rows, then columns, [B, Y, X, H, 2 (2 w - 1)].

        Entry r of either is for keys r - (w - 1) pixels away; here the window begins a halo in front of the block.
        """
        tables = [F.pad(table[halo:], (0, 0, 0, halo)) for table in (self.height_rel, self.width_rel)]
        return q @ torch.cat(tables).transpose(0, 1)


class HaloAttention(nn.Module):
    """Blocks of `block` x `block` queries over the block and `halo` pixels around it (section 2.2).

    Zeros beyond the edges count as keys. Stride 2 takes every second query, or, where blocks are odd, pools the output.
    """

    def __init__(
        self, width: int, heads: int, block: int, halo: int, stride: int = 1, dim_head: int | None = None
    ) -> None:
        super().__init__()
        pools = stride > 1 and block % stride != 0
        step = 1 if pools else stride
        self.heads, self.halo, self.pool = heads, halo, stride if pools else 1
        self.dim_head = dim_head or divisible(width) // heads
        self.window, self.stride, self.block = [block + 2 * halo] * 2, [block] * 2, [block // step] * 2
        self.q = nn.Conv2d(width, heads * self.dim_head, kernel_size=1, stride=step, bias=False)
        self.kv = nn.Conv2d(width, heads * self.dim_head + width, kernel_size=1, bias=False)
        self.pos_embed = RelativeEmbeddings(self.window[0], self.dim_head)
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, kv = (conv(x).unflatten(1, (self.heads, -1)).permute(0, 3, 4, 1, 2) for conv in (self.q, self.kv))
        k, v = kv[..., : self.dim_head], kv[..., self.dim_head :]  # each head's keys, then its values
        out = local_attention(
            q,
            k,
            v,
            relative=self.pos_embed(q, self.halo),
            window=self.window,
            stride=self.stride,
            block=self.block,
            border="zero",
            scale=self.dim_head**-0.5,
        )
        out = out.flatten(3).permute(0, 3, 1, 2)
        return out if self.pool == 1 else F.avg_pool2d(out, self.pool)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut (ResNet, He et al., arXiv 1512.03385)."""

    def __init__(self, channels: int, stage: Stage, stride: int, config: Config) -> None:
        super().__init__()
        inner, act = divisible(stage.width * stage.ratio), config.act
        changes = channels != stage.width or stride != 1
        self.act = act
        self.shortcut = ConvNorm(channels, stage.width, 1, stride) if changes else None
        self.conv1_1x1 = ConvNorm(channels, inner, 1, act=act)
        self.middle(inner, stage, stride, config)
        self.conv3_1x1 = ConvNorm(inner, stage.width, 1)

    def middle(self, inner: int, _stage: Stage, stride: int, config: Config) -> None:
        groups = inner // config.group_size if config.group_size else 1
        self.conv2_kxk = ConvNorm(inner, inner, 3, stride, groups, act=config.act)
        self.attn = GATES[config.gate](inner) if config.gate else None

    def mix(self, x: Tensor) -> Tensor:
        x = self.conv2_kxk(x)
        return x if self.attn is None else self.attn(x)

    def forward(self, x: Tensor) -> Tensor:
        around = x if self.shortcut is None else self.shortcut(x)
        return ACTIVATIONS[self.act](around + self.conv3_1x1(self.mix(self.conv1_1x1(x))))


class AttentionBottleneck(Bottleneck):
    """The same with halo attention, batch norm and activation for the 3x3 convolution."""

    def middle(self, inner: int, stage: Stage, stride: int, config: Config) -> None:
        self.self_attn = HaloAttention(inner, stage.heads, config.block, config.halo, stride, config.dim_head)
        self.post_attn = nn.BatchNorm2d(inner)

    def mix(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.act](self.post_attn(self.self_attn(x)))


class HaloNet(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Sequential(OrderedDict(self.stem_layers()))
        channels = config.stem[-1]
        self.stages = nn.Sequential()
        for index, stage in enumerate(config.stages):
            blocks = nn.Sequential()
            for i in range(stage.depth):
                kind = AttentionBottleneck if i in stage.attends else Bottleneck
                blocks.append(kind(channels, stage, 2 if i == 0 and index else 1, config))
                channels = stage.width
            self.stages.append(blocks)
        features = config.features
        self.final_conv = nn.Identity() if features is None else ConvNorm(channels, features, 1, act=config.act)
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(features or channels, config.classes)))

    def stem_layers(self) -> list[tuple[str, nn.Module]]:
        """Convolutions, the first of stride 2; then a max pool of stride 2, or else the last convolution has it."""
        config, channels = self.config, self.config.in_chans
        layers: list[tuple[str, nn.Module]] = []
        for i, width in enumerate(config.stem):
            last = i == len(config.stem) - 1 and not config.stem_pool
            layers.append(
                (
                    f"conv{i + 1}",
                    ConvNorm(channels, width, config.stem_kernel, 2 if i == 0 or last else 1, act=config.act),
                )
            )
            channels = width
        return [*layers, ("pool", nn.MaxPool2d(3, stride=2, padding=1))] if config.stem_pool else layers

    def features(self, x: Tensor) -> Tensor:
        """The last stage's map [B, C, Y / 32, X / 32]."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final_conv(self.features(x)).mean((2, 3)))


def divisible(channels: float, least_share: float = 0.9) -> int:
    """The nearest multiple of 8 that is at least `least_share` of the channels."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < least_share * channels else nearest


# Accuracy: timm's; parameters and multiply-accumulates at 256 pixels: measured on it.
PAPER = Paper(
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    year=2021,
    link="https://arxiv.org/abs/2103.12731",
    reference="huggingface/pytorch-image-models@v1.0.31",
    model=HaloNet,
    variants={
        "halonet26t": Config((Stage(2, 256), Stage(2, 512), Stage(2, 1024, (1,)), Stage(2, 2048, (0, 1))), halo=2),
        "sehalonet33ts": Config(
            (Stage(2, 256), Stage(3, 512, (2,)), Stage(3, 1024, (2,)), Stage(2, 1536, (0, 1), ratio=0.333)),
            act="silu",
            stem_pool=False,
            gate="se",
            features=1280,
        ),
        "halonet50ts": Config(
            (Stage(3, 256), Stage(4, 512, (3,), heads=4), Stage(6, 1024, (1, 3, 5)), Stage(3, 2048, (1,))), act="silu"
        ),
        "eca_halonext26ts": Config(
            (Stage(2, 256), Stage(2, 512), Stage(2, 1024, (1,)), Stage(2, 2048, (0, 1))),
            halo=2,
            act="silu",
            gate="eca",
            group_size=16,
            dim_head=16,
        ),
        "halonet_h1": Config(
            tuple(Stage(d, c, tuple(range(d)), ratio=1) for d, c in ((3, 64), (3, 128), (10, 256), (3, 512))),
            stem=(64,),
            stem_kernel=7,
        ),
    },
    tiny=Config(
        (Stage(1, 32), Stage(2, 32, (0, 1), heads=2)),
        block=4,
        halo=1,
        stem=(8,),
        stem_pool=False,
        gate="se",
        img_size=32,
        classes=10,
    ),
    published={
        "halonet26t": Published(parameters=12_480_288, gmacs=3.194, top1=79.1),
        "sehalonet33ts": Published(parameters=13_691_712, gmacs=3.552, top1=81.0),
        "halonet50ts": Published(parameters=22_733_280, gmacs=5.301, top1=81.7),
        "eca_halonext26ts": Published(parameters=10_756_885, gmacs=2.441, top1=79.5),
        "halonet_h1": Published(parameters=8_100_056, gmacs=3.004),
    },
    keys="timm's: stem.convI.{conv,bn}, stages.s.b with {shortcut,conv1_1x1,conv2_kxk,conv3_1x1}.{conv,bn}, "
    "attn.{fc1,fc2} or attn.conv, self_attn.{q,kv,pos_embed.height_rel,pos_embed.width_rel}, post_attn; "
    "final_conv, head.fc",
)
