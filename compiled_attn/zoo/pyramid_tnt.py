"""PyramidTNT: "PyramidTNT: Improved Transformer-in-Transformer Baselines with Pyramid Architecture", Han et al., 2022.

https://arxiv.org/abs/2201.00978. TNT with a convolutional stem and four stages: between them, four neighbouring patches
become one, their words as well as their tokens; the words are heard only at the beginning of each stage.

Reference: huawei-noah/Efficient-AI-Backbones at f90e129b645c3b1684fe07cd361cd557d0ad71f7 (tnt_pytorch/pyramid_tnt.py).
Known differences: no dropout and no stochastic depth; picture sizes that the positions do not fit are refused in words.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.layers.vit import Mlp, initialise
from compiled_attn.zoo.paper import Paper, Published
from compiled_attn.zoo.tnt import Excitation

SIDE = 4  # words along each side of a patch
REDUCTIONS = (4, 2, 1, 1)  # of keys and values, along each side, by stage
STEP = 64  # pixels along each side that one patch of the last stage stands for


@dataclass(frozen=True)
class Config:
    """Widths (channels) and heads of sentences (outer) and words (inner), and depths, each by stage."""

    outer_widths: tuple[int, ...]
    inner_widths: tuple[int, ...]
    outer_heads: tuple[int, ...]
    inner_heads: tuple[int, ...]
    depths: tuple[int, ...]
    img_size: int | tuple[int, int] = 256
    in_chans: int = 3
    classes: int = 1000
    mlp_ratio: float = 4
    qkv_bias: bool = False
    excite: bool = False

    def __post_init__(self) -> None:
        if any(size % STEP for size in self.sides):
            raise CompiledAttnError(
                "PyramidTNT has no such picture size",
                where="zoo.pyramid_tnt.Config",
                facts=f"img_size is {self.img_size}, the last stage's patches stand for {STEP} x {STEP} pixels",
                do=f"give multiples of {STEP}",
            )

    @property
    def sides(self) -> tuple[int, int]:
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)


class Attention(nn.Module):
    """Self attention of tokens [B, N, C] whose keys and values may be means of `reduction` x `reduction` squares."""

    def __init__(self, width: int, heads: int, bias: bool, reduction: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.reduction = reduction
        self.q = nn.Linear(width, width, bias=bias)
        self.kv = nn.Linear(width, 2 * width, bias=bias)
        self.proj = nn.Linear(width, width)
        if reduction > 1:
            self.linear = nn.Linear(width, width)
            self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, grid: tuple[int, int], positions: Tensor | None = None) -> Tensor:
        """positions [1, H, N, M] is added to the logits."""
        seen = x
        if self.reduction > 1:
            means = F.avg_pool2d(x.transpose(1, 2).unflatten(2, grid), self.reduction)
            seen = self.norm(self.linear(means.flatten(2).transpose(1, 2)))
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, N, D]
        k, v = self.kv(seen).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=positions)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """TNT's block without class token, the words' norms over a whole patch; `words` is 0 where they are not heard."""

    def __init__(self, config: Config, stage: int, words: int) -> None:
        super().__init__()
        outer, inner = config.outer_widths[stage], config.inner_widths[stage]
        self.words = words
        if words:
            self.inner_norm1 = nn.LayerNorm(words * inner)
            self.inner_attn = Attention(inner, config.inner_heads[stage], config.qkv_bias)
            self.inner_norm2 = nn.LayerNorm(words * inner)
            self.inner_mlp = Mlp(inner, int(config.mlp_ratio * inner))
            self.proj_norm1 = nn.LayerNorm(words * inner)
            self.proj = nn.Linear(words * inner, outer, bias=False)
            self.proj_norm2 = nn.LayerNorm(outer)
        self.outer_norm1 = nn.LayerNorm(outer)
        self.outer_attn = Attention(outer, config.outer_heads[stage], config.qkv_bias, REDUCTIONS[stage])
        self.outer_norm2 = nn.LayerNorm(outer)
        self.outer_mlp = Mlp(outer, int(config.mlp_ratio * outer))
        self.se_layer = Excitation(outer) if config.excite else None

    def forward(
        self, sentences: Tensor, tokens: Tensor, grid: tuple[int, int], positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sentences [B, N, M * c]: the words of each patch, word-major; tokens [B, N, C]."""
        if self.words:
            shape = (self.words, -1)
            words = self.inner_norm1(sentences).unflatten(2, shape).flatten(0, 1)  # [B * N, M, c]
            sentences = sentences + self.inner_attn(words, (SIDE, SIDE)).reshape(sentences.shape)
            sentences = sentences + self.inner_mlp(self.inner_norm2(sentences).unflatten(2, shape)).flatten(2)
            tokens = tokens + self.proj_norm2(self.proj(self.proj_norm1(sentences)))
        tokens = tokens + self.outer_attn(self.outer_norm1(tokens), grid, positions)
        thought = self.outer_mlp(self.outer_norm2(tokens))
        if self.se_layer is not None:
            thought = thought + self.se_layer(thought)
        return sentences, tokens + thought


class Stem(nn.Module):
    """Pictures to sentences [B, N, M * c] and tokens [B, N, C] of patches of 8 x 8 pixels."""

    def __init__(self, in_chans: int, outer: int, inner: int) -> None:
        super().__init__()
        self.common_conv = nn.Sequential(*convolution(in_chans, 2 * inner, 2))
        self.inner_convs = nn.Sequential(*convolution(2 * inner, inner, 1))
        self.outer_convs = nn.Sequential(
            *convolution(2 * inner, 4 * inner, 2),
            *convolution(4 * inner, 8 * inner, 2),
            *convolution(8 * inner, outer, 1),
        )

    def forward(self, pictures: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        common = self.common_conv(pictures)
        words = self.inner_convs(common).unflatten(3, (grid[1], SIDE)).unflatten(2, (grid[0], SIDE))
        sentences = words.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # from [B, c, y, SIDE, x, SIDE]
        return sentences, self.outer_convs(common).flatten(2).transpose(1, 2)


class SentenceAggregation(nn.Module):
    """Tokens [B, y * x, C] to a grid of half the size along each side."""

    def __init__(self, width: int, to: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Sequential(nn.Conv2d(width, to, kernel_size=3, stride=2, padding=1))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.conv(self.norm(tokens).transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


class WordAggregation(SentenceAggregation):
    """Sentences [B, y * x, M * c]: the 8 x 8 words of four patches become the 4 x 4 words of one."""

    def forward(self, sentences: Tensor, grid: tuple[int, int]) -> Tensor:
        words = self.norm(sentences.unflatten(2, (SIDE, SIDE, -1)))
        words = words.unflatten(1, (grid[0] // 2, 2, grid[1] // 2, 2))  # [B, y/2, 2, x/2, 2, SIDE, SIDE, c]
        four = words.permute(0, 1, 3, 7, 2, 5, 4, 6).flatten(6, 7).flatten(4, 5)  # [B, y/2, x/2, c, 8, 8]
        merged = self.conv(four.flatten(0, 2))  # [B * N / 4, c', SIDE, SIDE]
        count = (grid[0] // 2) * (grid[1] // 2)
        return merged.permute(0, 2, 3, 1).reshape(sentences.shape[0], count, -1)


class Stage(nn.Module):
    """Blocks that share one learned table of relative positions."""

    def __init__(self, config: Config, stage: int) -> None:
        super().__init__()
        depth, reduction = config.depths[stage], REDUCTIONS[stage]
        hearing = 2 if depth > 6 else 1
        self.blocks = nn.ModuleList(Block(config, stage, words=SIDE * SIDE if i < hearing else 0) for i in range(depth))
        patches = math.prod(side // 8 for side in config.sides) // 4**stage
        self.relative_pos = nn.Parameter(torch.randn(1, config.outer_heads[stage], patches, patches // reduction**2))

    def forward(self, sentences: Tensor, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            sentences, tokens = block(sentences, tokens, grid, self.relative_pos)
        return sentences, tokens


class PyramidTNT(nn.Module):
    """Pictures [B, in_chans, Y, X] of the size of `config` to logits [B, classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        outer, inner = config.outer_widths, config.inner_widths
        self.patch_embed = Stem(config.in_chans, outer[0], inner[0])
        self.outer_pos = nn.Parameter(torch.zeros(1, math.prod(side // 8 for side in config.sides), outer[0]))
        self.inner_pos = nn.Parameter(torch.zeros(1, SIDE * SIDE, inner[0]))
        pairs = range(len(config.depths) - 1)
        self.word_merges = nn.ModuleList(WordAggregation(inner[i], inner[i + 1]) for i in pairs)
        self.sentence_merges = nn.ModuleList(SentenceAggregation(outer[i], outer[i + 1]) for i in pairs)
        self.stages = nn.ModuleList(Stage(config, i) for i in range(len(config.depths)))
        self.norm = nn.LayerNorm(outer[-1])
        self.head = nn.Linear(outer[-1], config.classes)
        initialise(self)
        for positions in (self.outer_pos, self.inner_pos):
            nn.init.trunc_normal_(positions, std=0.02)

    def embed(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Sentences [B, N, M * c] and tokens [B, N, C] of the first stage, with positions."""
        check_size(pictures.shape[2], pictures.shape[3], self.config.sides)
        sentences, tokens = self.patch_embed(pictures, self.grid(0))
        return sentences + self.inner_pos.flatten(1), tokens + self.outer_pos

    def grid(self, stage: int) -> tuple[int, int]:
        """Patches along both sides in that stage."""
        return (self.config.sides[0] // 8 // 2**stage, self.config.sides[1] // 8 // 2**stage)

    def forward(self, x: Tensor) -> Tensor:
        sentences, tokens = self.embed(x)
        for index, stage in enumerate(self.stages):
            if index:
                sentences = self.word_merges[index - 1](sentences, self.grid(index - 1))
                tokens = self.sentence_merges[index - 1](tokens, self.grid(index - 1))
            sentences, tokens = stage(sentences, tokens, self.grid(index))
        return self.head(self.norm(tokens).mean(dim=1))


def convolution(channels: int, to: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, to, kernel_size=3, stride=stride, padding=1), nn.BatchNorm2d(to), nn.ReLU()


@torch.fx.wrap
def check_size(height: int, width: int, sides: tuple[int, int]) -> None:
    if (height, width) != sides:
        raise CompiledAttnError(
            "the picture does not have the network's size",
            where="zoo.pyramid_tnt.PyramidTNT",
            facts=f"the picture is {height} x {width}, the learned positions are for {sides[0]} x {sides[1]} pixels",
            do="resize the picture, or create the network with that img_size",
        )


def _row(outer: int, inner: int, heads: tuple[int, int], depths: tuple[int, ...], img_size: int = 256) -> Config:
    widening = (1, 2, 4, 4)
    return Config(
        outer_widths=tuple(outer * times for times in widening),
        inner_widths=tuple(inner * times for times in widening),
        outer_heads=tuple(heads[0] * times for times in widening),
        inner_heads=tuple(heads[1] * times for times in widening),
        depths=depths,
        img_size=img_size,
    )


PAPER = Paper(
    title="PyramidTNT: Improved Transformer-in-Transformer Baselines with Pyramid Architecture",
    year=2022,
    link="https://arxiv.org/abs/2201.00978",
    reference="huawei-noah/Efficient-AI-Backbones@f90e129b645c3b1684fe07cd361cd557d0ad71f7",
    model=PyramidTNT,
    variants={
        "ptnt_ti_192": _row(80, 5, (2, 1), (2, 6, 3, 2), 192),
        "ptnt_s_256": _row(128, 8, (4, 2), (2, 8, 4, 2)),
        "ptnt_m_256": _row(192, 12, (4, 2), (2, 8, 6, 2)),
        "ptnt_b_256": _row(256, 16, (4, 2), (2, 10, 6, 2)),
    },
    tiny=Config(
        outer_widths=(16, 16, 16, 16),
        inner_widths=(4, 4, 4, 4),
        outer_heads=(2, 2, 2, 2),
        inner_heads=(1, 2, 1, 1),
        depths=(1, 1, 1, 1),
        img_size=128,
        classes=10,
    ),
    published={
        "ptnt_ti_192": Published(parameters=10_578_529, gmacs=0.592, stated_gmacs=0.6, top1=75.2),
        "ptnt_s_256": Published(parameters=31_953_200, gmacs=3.303, stated_gmacs=3.3, top1=82.0),
        "ptnt_m_256": Published(parameters=84_943_572, gmacs=8.235, stated_gmacs=8.2, top1=83.5),
        "ptnt_b_256": Published(parameters=156_990_072, gmacs=16.01, stated_gmacs=16.0, top1=84.1),
    },
    keys="outer_pos, inner_pos, patch_embed.{common_conv,inner_convs,outer_convs}, word_merges.i, sentence_merges.i, "
    "stages.i.{relative_pos,blocks.j} as TNT's with attn.{q,kv,proj,linear,norm}, norm, head",
)
