"""FAN with TAP and ADL: "Robustifying Token Attention for Vision Transformers", Guo, Stutz & Schiele, ICCV 2023.

https://arxiv.org/abs/2303.11126, on the fully attentional networks of Zhou et al., "Understanding the Robustness in
Vision Transformers", ICML 2022, https://arxiv.org/abs/2204.12451. Token-aware average pooling (TAP) lets every token
choose how much of its neighbourhood to average before attention; the attention diversification loss (ADL) keeps the
tokens' attention from agreeing with its mean. FAN's second half of a block gates channels by attention among them.

Reference: guoyongcs/TAPADL at 6e4dbff1de818fd28197251e9e0d4b8bc9b93d28 (TAPADL_FAN/models, main.py).
Known differences: no dropout and no stochastic depth (both are off in the reference at inference); no Swin backbone and
no squeezing MLP; the loss is right for a batch of one, where the reference averages over the other axis. As there, TAP
lays tokens out in a square whatever the picture's shape.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.zoo.layers.conv import LayerNorm2d, conv_norm, depthwise, to_square
from compiled_attn.zoo.layers.vit import EPSILON, Mlp, initialise
from compiled_attn.zoo.paper import Paper, Published

STEMS = {16: (8, 4, 2, 1), 8: (4, 2, 1), 4: (4, 1)}  # by patch size, what the width is divided by in each convolution
FREQUENCIES = 32  # of each of the two coordinates

torch.fx.wrap("to_square")
torch.fx.wrap("fourier")


@dataclass(frozen=True)
class Config:
    """widths, heads: of each block; where the width changes, the block before it halves the map.

    scales: K averages that TAP chooses among, None for plain FAN; hybrid: blocks of each stage of a ConvNeXt that
    makes the patches, with `hybrid_widths`, () for convolutions; class_layers: blocks that only the class token
    attends in; tokens_norm: their second norm is of all tokens; eta: what layer scales begin with.
    """

    widths: tuple[int, ...]
    heads: tuple[int, ...]
    scales: int | None = 4
    hybrid: tuple[int, ...] = ()
    hybrid_widths: tuple[int, ...] = (128, 256)
    hybrid_patch_size: int = 2
    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    classes: int = 1000
    mlp_ratio: float = 4
    bias: bool = True
    class_layers: int = 2
    tokens_norm: bool = True
    eta: float = 1.0


class DilationPredictor(nn.Module):
    """How much of each scale every position of a map [B, C, Y, X] takes: [B, K, Y, X], with a sum of one."""

    def __init__(self, width: int, scales: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(width, scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(scales),
            nn.Conv2d(scales, scales, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.proj(x), dim=1)


class TokenMixing(nn.Module):
    """Self attention among tokens [B, N, C]."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.q = nn.Linear(width, width, bias=bias)
        self.kv = nn.Linear(width, 2 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each [B, H, N, D]."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def probabilities(self, x: Tensor) -> Tensor:
        """Who attends to whom, [B, H, N, N]: what the loss is of."""
        q, k, _ = self.heads_of(x)
        return torch.softmax(q * self.scale @ k.transpose(2, 3), dim=3)

    def forward(self, x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*self.heads_of(x), scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class DWConv(nn.Module):
    """Two depthwise 3x3 convolutions with GELU (erf) and a batch norm between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = depthwise(width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = depthwise(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(F.gelu(self.conv1(x))))


class ConvMlp(nn.Module):
    """Two linear maps; what `DWConv` makes of the map between them is added, and there is no other activation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(hidden))
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = DWConv(hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.fc1(x)
        convolved = self.dwconv(x.transpose(1, 2).unflatten(2, (height, width)))
        return self.fc2(x + self.gamma * convolved.flatten(2).transpose(1, 2))


class ChannelProcessing(nn.Module):
    """FAN's channel attention, the efficient form: one gate for every channel of tokens [B, N, C]."""

    def __init__(self, width: int, heads: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.mlp_v = ConvMlp(width, hidden)
        self.norm_v = nn.LayerNorm(width, eps=EPSILON)
        self.q = nn.Linear(width, width, bias=bias)

    def gates(self, x: Tensor) -> Tensor:
        """Gates [B, 1, C]: each channel's weights over tokens against the mean of its head's."""
        query = torch.softmax(self.q(x), dim=1).unflatten(2, (self.heads, -1))  # [B, N, H, D]
        key = torch.softmax(x, dim=1).unflatten(2, (self.heads, -1)).mean(3, keepdim=True)
        affinity = (query * key).sum(1)  # [B, H, D]
        return (torch.sigmoid(affinity) * self.temperature[:, :, 0]).flatten(1).unsqueeze(1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.gates(x) * self.norm_v(self.mlp_v(x, height, width))


class OverlapPatchEmbed(nn.Module):
    """A map [B, C, Y, X] to one of half the size and another width."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, wider, 3, stride=2, padding=1)
        self.norm = LayerNorm2d(wider, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class Block(nn.Module):
    """Attention among pooled tokens, then channel processing, each scaled and added, on a map [B, C, Y, X]."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        width, heads = config.widths[index], config.heads[index]
        wider = config.widths[min(index + 1, len(config.widths) - 1)]
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = TokenMixing(width, heads, config.bias)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = ChannelProcessing(width, heads, int(width * config.mlp_ratio), config.bias)
        self.gamma1 = nn.Parameter(torch.full((width,), config.eta))
        self.gamma2 = nn.Parameter(torch.full((width,), config.eta))
        self.scales = config.scales
        self.dilation_predictor = DilationPredictor(width, config.scales) if config.scales else None
        self.downsample = OverlapPatchEmbed(width, wider) if wider != width else None

    def pooled(self, tokens: Tensor) -> Tensor:
        """Token-aware average pooling (section 3.1): every token's own mixture of averages over growing squares."""
        if self.dilation_predictor is None:
            return tokens
        x = to_square(tokens)
        mask = self.dilation_predictor(x)
        out = mask[:, :1] * x
        for dilation in range(1, self.scales):
            out = out + mask[:, dilation : dilation + 1] * dilated_mean(x, dilation)
        return out.flatten(2).transpose(1, 2)

    def attended(self, x: Tensor) -> Tensor:
        """The tokens [B, N, C] that attention sees."""
        return self.norm1(self.pooled(x.flatten(2).transpose(1, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.updated(x, self.attended(x))

    def updated(self, x: Tensor, attended: Tensor) -> Tensor:
        """The next map, given what `attended` makes of this one."""
        height, width = x.shape[2], x.shape[3]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.gamma1 * self.attn(attended)
        tokens = tokens + self.gamma2 * self.mlp(self.norm2(tokens), height, width)
        x = tokens.transpose(1, 2).unflatten(2, (height, width))
        return x if self.downsample is None else self.downsample(x)


class ClassAttention(nn.Module):
    """Attention of the first token to all of [B, N, C]: [B, 1, C] (CaiT, arXiv 2103.17239)."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.q(x[:, :1]), self.k(x), self.v(x))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class ClassAttentionBlock(nn.Module):
    """Only the class token attends and is transformed; the others are normed, and added to themselves."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.widths[-1]
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = ClassAttention(width, config.heads[-1], config.bias)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.gamma1 = nn.Parameter(torch.full((width,), config.eta))
        self.gamma2 = nn.Parameter(torch.full((width,), config.eta))
        self.tokens_norm = config.tokens_norm

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.gamma1 * torch.cat([self.attn(normed), normed[:, 1:]], dim=1)
        x = self.norm2(x) if self.tokens_norm else torch.cat([self.norm2(x[:, :1]), x[:, 1:]], dim=1)
        return x + torch.cat([self.gamma2 * self.mlp(x[:, :1]), x[:, 1:]], dim=1)


class ConvPatchEmbed(nn.Module):
    """Patches by a stack of strided 3x3 convolutions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths = [config.in_chans, *(config.widths[0] // part for part in STEMS[config.patch_size])]
        steps: list[nn.Module] = []
        for before, width in pairwise(widths):
            steps += [conv_norm(before, width), nn.GELU()]
        self.proj = nn.Sequential(*steps[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class SampleNorm2d(LayerNorm2d):
    """LayerNorm over channels by the sample variance, of divisor C - 1.

    The reference's norm takes it for maps whose channels lie last in memory, and behind its first norm all do.
    """

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + self.eps)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, norm, pointwise MLP, scaled and added (arXiv 2201.03545)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))
        self.conv_dw = depthwise(width, 7)
        self.norm = SampleNorm2d(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Conv2d(width, 4 * width, 1), "fc2": nn.Conv2d(4 * width, width, 1)})

    def forward(self, x: Tensor) -> Tensor:
        branch = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm(self.conv_dw(x)))))
        return x + branch * self.gamma[:, None, None]


class ConvNeXtStage(nn.Module):
    """Blocks, behind a step to half the size unless the stage is the first."""

    def __init__(self, before: int, width: int, depth: int) -> None:
        super().__init__()
        step = nn.Sequential(SampleNorm2d(before), nn.Conv2d(before, width, 2, stride=2))
        self.downsample = step if before != width else nn.Identity()
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvNeXt(nn.Module):
    """The stem and the first stages of a ConvNeXt."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths = [config.hybrid_widths[0], *config.hybrid_widths]
        self.stem = nn.Sequential(nn.Conv2d(config.in_chans, widths[0], 4, stride=4), LayerNorm2d(widths[0]))
        self.stages = nn.Sequential(
            *(ConvNeXtStage(*pair, depth) for pair, depth in zip(pairwise(widths), config.hybrid, strict=True))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


class HybridEmbed(nn.Module):
    """Patches by a ConvNeXt and a strided convolution."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        side = config.hybrid_patch_size
        self.backbone = ConvNeXt(config)
        self.proj = nn.Conv2d(config.hybrid_widths[-1], config.widths[0], side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.backbone(x))


class FourierPositions(nn.Module):
    """Sines and cosines of both coordinates, mapped to the width: [1, C, Y, X]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * FREQUENCIES, width, 1)

    def forward(self, height: int, width: int) -> Tensor:
        return self.token_projection(fourier(height, width, self.token_projection.weight))


class FAN(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes]; with TAP the count of tokens must be a square."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = HybridEmbed(config) if config.hybrid else ConvPatchEmbed(config)
        self.pos_embed = FourierPositions(config.widths[0])
        self.blocks = nn.Sequential(*(Block(config, i) for i in range(len(config.widths))))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.widths[-1]))
        self.cls_attn_blocks = nn.Sequential(*(ClassAttentionBlock(config) for _ in range(config.class_layers)))
        self.norm = nn.LayerNorm(config.widths[-1], eps=EPSILON)
        self.head = nn.Linear(config.widths[-1], config.classes) if config.classes else nn.Identity()
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        """Patches with positions [B, C, y, x]."""
        x = self.patch_embed(x)
        return x + self.pos_embed(x.shape[2], x.shape[3])

    def classify(self, x: Tensor) -> Tensor:
        """Logits from the last block's map [B, C, y, x]."""
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        tokens = self.cls_attn_blocks(torch.cat([cls, x.flatten(2).transpose(1, 2)], dim=1))
        return self.head(self.norm(tokens)[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.blocks(self.embed(x)))

    def forward_with_attention(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and every block's attention [B, H, N, N] for `attention_diversification_loss`."""
        x, attentions = self.embed(x), []
        for block in self.blocks:
            attended = block.attended(x)
            attentions.append(block.attn.probabilities(attended))
            x = block.updated(x, attended)
        return self.classify(x), attentions


def attention_diversification_loss(attentions: Sequence[Tensor], threshold: float = 2) -> Tensor:
    """How much the tokens' attention agrees with its mean over tokens (section 3.2), a scalar.

    attentions: [B, H, N, N] of each layer; probabilities up to threshold / N do not count.
    """
    total = attentions[0].new_zeros(())
    for attention in attentions:
        rows = attention.mean(1)  # [B, N, N]
        least = threshold / rows.shape[2]
        mean = rows.mean(1, keepdim=True)
        rows, mean = rows * (rows > least), mean * (mean > least)
        total = total + F.cosine_similarity(mean, rows, dim=-1).mean()
    return total / (len(attentions) + 1e-6)


def dilated_mean(x: Tensor, dilation: int) -> Tensor:
    """The mean of the nine pixels in a dilated 3x3 square, zeros outside the map counted, by rows and then columns."""
    padded = F.pad(x, (dilation,) * 4)
    rows = padded[:, :, : -2 * dilation] + padded[:, :, dilation:-dilation] + padded[:, :, 2 * dilation :]
    return (rows[..., : -2 * dilation] + rows[..., dilation:-dilation] + rows[..., 2 * dilation :]) / 9


def fourier(height: int, width: int, like: Tensor) -> Tensor:
    """Positions [1, 64, Y, X]: of the row and then of the column, sine and cosine in turn at falling frequencies."""
    index = torch.arange(FREQUENCIES, device=like.device, dtype=torch.float32)
    periods = 10_000 ** (2 * torch.div(index, 2, rounding_mode="floor") / FREQUENCIES)

    def waves(size: int) -> Tensor:  # [size, 32]
        places = torch.arange(1, size + 1, device=like.device, dtype=torch.float32)
        angles = (places / (places[-1:] + 1e-6) * (2 * math.pi))[:, None] / periods
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)

    rows = waves(height).T[:, :, None].expand(-1, -1, width)
    columns = waves(width).T[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns])[None].to(like.dtype)


def network(width: int, depth: int, heads: int, hybrid: tuple[int, ...] = ()) -> Config:
    return Config((width,) * depth, (heads,) * depth, hybrid=hybrid)


SIZES = {
    "fan_tiny_12_p16_224": network(192, 12, 4),
    "fan_small_12_p16_224": network(384, 12, 8),
    "fan_base_18_p16_224": network(448, 18, 8),
    "fan_large_24_p16_224": network(480, 24, 10),
    "fan_tiny_8_p4_hybrid": network(192, 8, 8, (3, 3)),
    "fan_small_12_p4_hybrid": network(384, 10, 8, (3, 3)),
    "fan_base_16_p4_hybrid": network(448, 16, 8, (3, 3)),
    "fan_large_16_p4_hybrid": network(480, 22, 10, (3, 5)),
    "fan_Xlarge_16_p4_hybrid": Config((528,) * 20 + (768,) * 3, (11,) * 20 + (16,) * 3, hybrid=(3, 7)),
}

# Parameters and multiply-accumulates as measured on the reference (card of FAN and TAP), TAP's with four scales, the
# latter where norms and products alone explain them to a thousandth; accuracy: both papers.
PAPER = Paper(
    title="Robustifying Token Attention for Vision Transformers",
    year=2023,
    link="https://arxiv.org/abs/2303.11126",
    reference="guoyongcs/TAPADL@6e4dbff1de818fd28197251e9e0d4b8bc9b93d28",
    model=FAN,
    variants={f"tap_{name}": config for name, config in SIZES.items()}
    | {name: replace(config, scales=None) for name, config in SIZES.items()},
    tiny=replace(network(16, 2, 2, (1, 1)), scales=3, hybrid_widths=(8, 16), img_size=64, classes=10, mlp_ratio=2),
    published={
        "tap_fan_tiny_12_p16_224": Published(7_404_688),
        "tap_fan_small_12_p16_224": Published(28_513_048, 5.52),
        "tap_fan_base_18_p16_224": Published(54_643_360, 10.76),
        "tap_fan_large_24_p16_224": Published(80_992_468),
        "tap_fan_tiny_8_p4_hybrid": Published(7_523_752),
        "tap_fan_small_12_p4_hybrid": Published(26_257_704, 7.04),
        "tap_fan_base_16_p4_hybrid": Published(50_735_528, 11.86, top1=84.3),
        "tap_fan_large_16_p4_hybrid": Published(77_238_644),
        "fan_tiny_12_p16_224": Published(7_319_920, top1=79.2),
        "fan_small_12_p16_224": Published(28_345_336, top1=82.5),
        "fan_base_18_p16_224": Published(54_350_320, 10.70, top1=83.6),
        "fan_large_24_p16_224": Published(80_574_100, top1=83.9),
        "fan_tiny_8_p4_hybrid": Published(7_467_240, top1=80.1),
        "fan_small_12_p4_hybrid": Published(26_117_944, top1=83.5),
        "fan_base_16_p4_hybrid": Published(50_475_048, 11.81, top1=83.9),
        "fan_large_16_p4_hybrid": Published(76_855_140, top1=84.3),
    },
    keys="cls_token, patch_embed.{backbone.{stem,stages.s.{downsample,blocks.i}},proj} or patch_embed.proj.i.{0,1}, "
    "pos_embed.token_projection, blocks.i.{norm1,attn.{q,kv,proj},gamma1,norm2,mlp.{temperature,mlp_v,norm_v,q},gamma2,"
    "dilation_predictor.proj}, cls_attn_blocks.i, norm, head",
    idle={
        "mlp.q.bias": "it moves all tokens of a channel alike, and the softmax is over tokens",
        "attn.k.bias": "it moves all scores of a query alike, and the softmax is over them",
    },
)
