"""RMT: "RMT: Retentive Networks Meet Vision Transformers", Fan et al., CVPR 2024, https://arxiv.org/abs/2309.11523.

Manhattan self attention: every head adds to its logits a decay per step of distance |dy| + |dx| between two patches, so
that each head has a reach of its own. Where the map is large, attention goes along rows first, then along columns.

Reference: qhfan/RMT at 32ea21417a4d82ba6481f930f94cb4696dda0a8e (classfication_release/RMT.py, and, for the networks
with token labels, classification_token_label_release/RMT.py).
Known differences: no dropout and no stochastic depth; with token labels, training returns both heads' logits without
mixing tokens of two pictures. The released file of RMT-S with token labels is said to have 27,992,240 parameters (an
auxiliary head on 1024 features); the released code, which is followed here, builds 27,480,240.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn import ops
from compiled_attn.zoo.layers.conv import depthwise
from compiled_attn.zoo.layers.vit import initialise
from compiled_attn.zoo.paper import Paper, Published

EPSILON = 1e-6  # of every LayerNorm
AUXILIARY = 0.5  # weight of the token labels' head in the answer


@dataclass(frozen=True)
class Config:
    """By stage: widths C, depths, heads H, starts and ranges of the heads' decay, mlp_ratios, whether attention goes
    along rows and columns (decomposed) and whether branches are scaled (scaled, from layer_scale).

    projection: width in front of the classes. token_labels: a second head on every position.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    ranges: tuple[float, ...]
    mlp_ratios: tuple[float, ...]
    decomposed: tuple[bool, ...]
    scaled: tuple[bool, ...] = (False, False, False, False)
    starts: tuple[float, ...] = (2, 2, 2, 2)
    layer_scale: float = 1e-6
    projection: int = 1024
    token_labels: bool = False
    img_size: int = 224
    in_chans: int = 3
    classes: int = 1000


@dataclass(frozen=True)
class Position:
    """What a stage's blocks know of the places of a Y x X map.

    cos, sin: [Y, X, 1, D / 2], of a position's number in the row-major map times each angle; decay: [H], added to the
    logits for every step of distance.
    """

    cos: Tensor
    sin: Tensor
    decay: Tensor


class RelativePosition(nn.Module):
    """Angles as in a rotary embedding, and log(1 - 2^(-start - range * h / H)) per step for head h (section 3.1)."""

    def __init__(self, width: int, heads: int, start: float, reach: float) -> None:
        super().__init__()
        angle = 1.0 / (10000 ** torch.linspace(0, 1, width // heads // 2))
        decay = torch.log(1 - 2 ** (-start - reach * torch.arange(heads, dtype=torch.float32) / heads))
        self.register_buffer("angle", angle.repeat_interleave(2))
        self.register_buffer("decay", decay)

    def forward(self, height: int, width: int) -> Position:
        cos, sin = raster_angles(self.angle[::2], height, width)
        return Position(cos, sin, self.decay)


class Depthwise(nn.Module):
    """A depthwise convolution of a map [B, Y, X, C] that keeps its size."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = depthwise(width, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ManhattanSelfAttention(nn.Module):
    """Attention with decay over all pairs (equation 4), or along rows and then columns with the same q and k (5)."""

    def __init__(self, width: int, heads: int, decomposed: bool) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.decomposed = decomposed
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.lepe = Depthwise(width, 5)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, position: Position) -> Tensor:
        """A map [B, Y, X, C] to the same."""
        split = (self.heads, -1)
        q = rotate(self.q_proj(x).unflatten(3, split), position)  # [B, Y, X, H, D]
        k = rotate(self.k_proj(x).unflatten(3, split), position)
        v = self.v_proj(x)
        values = v.unflatten(3, split)
        for axes in ([1], [0]) if self.decomposed else ([0, 1],):
            values = ops.decay_attention(q, k, values, position.decay, scale=self.scale, along=axes)
        return self.out_proj(values.flatten(3) + self.lepe(v))


class FeedForward(nn.Module):
    """Two linear maps with GELU (erf) and a depthwise convolution with its residual between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dwconv = Depthwise(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(self.dwconv(x) + x)


class Block(nn.Module):
    """Conditional position, attention, feed-forward, each with its residual (figure 3)."""

    def __init__(self, config: Config, stage: int) -> None:
        super().__init__()
        width = config.widths[stage]
        self.retention_layer_norm = nn.LayerNorm(width, eps=EPSILON)
        self.retention = ManhattanSelfAttention(width, config.heads[stage], config.decomposed[stage])
        self.final_layer_norm = nn.LayerNorm(width, eps=EPSILON)
        self.ffn = FeedForward(width, int(config.mlp_ratios[stage] * width))
        self.pos = Depthwise(width, 3)
        for name in ("gamma_1", "gamma_2"):
            gamma = nn.Parameter(torch.full((1, 1, 1, width), config.layer_scale)) if config.scaled[stage] else None
            self.register_parameter(name, gamma)

    def forward(self, x: Tensor, position: Position) -> Tensor:
        x = x + self.pos(x)
        attended = self.retention(self.retention_layer_norm(x), position)
        x = x + (attended if self.gamma_1 is None else self.gamma_1 * attended)
        fed = self.ffn(self.final_layer_norm(x))
        return x + (fed if self.gamma_2 is None else self.gamma_2 * fed)


class PatchMerging(nn.Module):
    """A map [B, Y, X, C] to half its size along each side, rounded up."""

    def __init__(self, width: int, to: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(width, to, kernel_size=3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(to)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class Stage(nn.Module):
    def __init__(self, config: Config, stage: int) -> None:
        super().__init__()
        width, last = config.widths[stage], stage == len(config.widths) - 1
        self.Relpos = RelativePosition(width, config.heads[stage], config.starts[stage], config.ranges[stage])
        self.blocks = nn.ModuleList(Block(config, stage) for _ in range(config.depths[stage]))
        self.downsample = None if last else PatchMerging(width, config.widths[stage + 1])

    def forward(self, x: Tensor) -> Tensor:
        position = self.Relpos(x.shape[1], x.shape[2])
        for block in self.blocks:
            x = block(x, position)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """Pictures [B, channels, Y, X] to a map [B, Y / 4, X / 4, C] by four convolutions."""

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        steps = ((in_chans, width // 2, 2), (width // 2, width // 2, 1), (width // 2, width, 2), (width, width, 1))
        layers: list[nn.Module] = []
        for channels, to, stride in steps:
            convolution = nn.Conv2d(channels, to, kernel_size=3, stride=stride, padding=1)
            layers += [convolution, nn.BatchNorm2d(to), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, pictures: Tensor) -> Tensor:
        return self.proj(pictures).permute(0, 2, 3, 1)


class RMT(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes].

    With token labels, the answer adds half of each class's best position; in training mode the pair (logits, logits of
    every position [B, N, classes]).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.in_chans, config.widths[0])
        self.layers = nn.ModuleList(Stage(config, i) for i in range(len(config.widths)))
        self.proj = nn.Linear(config.widths[-1], config.projection)
        self.norm = nn.BatchNorm2d(config.projection)
        self.head = nn.Linear(config.projection, config.classes)
        self.aux_head = nn.Linear(config.widths[-1], config.classes) if config.token_labels else None
        initialise(self)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        features = F.silu(self.norm(self.proj(x).permute(0, 3, 1, 2)))  # [B, projection, Y, X]
        logits = self.head(features.mean(dim=(2, 3)))
        if self.aux_head is None:
            return logits
        positions = self.aux_head(x.flatten(1, 2))
        return (logits, positions) if self.training else logits + AUXILIARY * positions.amax(dim=1)


def rotate(x: Tensor, position: Position) -> Tensor:
    """Neighbouring channels of [B, Y, X, H, D] turned as pairs by their position's angles."""
    even, odd = x.unflatten(4, (-1, 2)).unbind(5)
    turned = (even * position.cos - odd * position.sin, odd * position.cos + even * position.sin)
    return torch.stack(turned, dim=5).flatten(4)


@torch.fx.wrap
def raster_angles(angle: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [Y, X, 1, D / 2] of row-major position numbers times angle [D / 2]."""
    index = torch.arange(height * width, device=angle.device).to(angle.dtype)
    turn = (index[:, None] * angle).unflatten(0, (height, width))[:, :, None]
    return torch.cos(turn), torch.sin(turn)


T = Config(
    widths=(64, 128, 256, 512),
    depths=(2, 2, 8, 2),
    heads=(4, 4, 8, 16),
    ranges=(4, 4, 6, 6),
    mlp_ratios=(3, 3, 3, 3),
    decomposed=(True, True, False, False),
)
S = replace(T, depths=(3, 4, 18, 4), mlp_ratios=(4, 4, 3, 3), decomposed=(True, True, True, False))
B = replace(
    S,
    widths=(80, 160, 320, 512),
    depths=(4, 8, 25, 8),
    heads=(5, 5, 10, 16),
    ranges=(5, 5, 6, 6),
    scaled=(False, False, True, True),
)
L = replace(B, widths=(112, 224, 448, 640), heads=(7, 7, 14, 20), ranges=(6, 6, 6, 6))

# Parameters: the reference's training logs and code; accuracy: the paper's table 2.
PAPER = Paper(
    title="RMT: Retentive Networks Meet Vision Transformers",
    year=2024,
    link="https://arxiv.org/abs/2309.11523",
    reference="qhfan/RMT@32ea21417a4d82ba6481f930f94cb4696dda0a8e",
    model=RMT,
    variants={
        "rmt_t": T,
        "rmt_s": S,
        "rmt_b": B,
        "rmt_l": L,
        "rmt_s_token_labels": replace(S, token_labels=True),
        "rmt_b_token_labels": replace(B, token_labels=True),
        "rmt_l_token_labels": replace(L, token_labels=True),
    },
    tiny=Config(
        widths=(16, 16, 32),
        depths=(1, 1, 1),
        heads=(2, 1, 4),
        ranges=(4, 4, 6),
        mlp_ratios=(2, 2, 2),
        decomposed=(True, False, False),
        scaled=(False, True, False),
        layer_scale=0.1,
        starts=(2, 2, 2),
        projection=32,
        img_size=32,
        classes=10,
    ),
    published={
        "rmt_t": Published(parameters=14_334_216, gmacs=2.65, top1=82.4),
        "rmt_s": Published(parameters=26_967_240, gmacs=4.80, top1=84.1),
        "rmt_b": Published(parameters=54_154_896, gmacs=10.41, top1=85.0),
        "rmt_l": Published(parameters=95_464_864, gmacs=19.55, top1=85.5),
        "rmt_s_token_labels": Published(parameters=27_480_240, top1=84.8),
        "rmt_b_token_labels": Published(parameters=54_667_896, top1=85.6),
        "rmt_l_token_labels": Published(parameters=96_105_864, top1=86.1),
    },
    keys="patch_embed.proj.k, layers.s.{Relpos.angle,Relpos.decay,blocks.i,downsample.reduction,downsample.norm} with "
    "blocks.i.{retention_layer_norm,retention,final_layer_norm,ffn,pos,gamma_1,gamma_2}, proj, norm, head, aux_head",
)
