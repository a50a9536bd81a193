"""TNT: "Transformer in Transformer", Han et al., NeurIPS 2021, https://arxiv.org/abs/2103.00112.

Each patch ("sentence") is itself a short sequence of small squares ("words"): in every block a narrow transformer mixes
the words of each patch by themselves, and what it finds is added to that patch's token of a Vision Transformer.

Reference: huawei-noah/Efficient-AI-Backbones at f90e129b645c3b1684fe07cd361cd557d0ad71f7 (tnt_pytorch/tnt.py).
Known differences: no dropout and no stochastic depth; a picture of another size gets bicubically resized positions,
where the reference refuses.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.zoo.layers.vit import Mlp, initialise, resize_positions
from compiled_attn.zoo.paper import Paper, Published

torch.fx.wrap("resize_positions")


@dataclass(frozen=True)
class Config:
    """outer_width, inner_width: channels of sentences and of words; inner_stride: pixels from word to word.

    excite: each block scales its MLP's output by what the mean of all tokens says (off in the published networks).
    """

    outer_width: int
    inner_width: int
    outer_heads: int
    inner_heads: int
    depth: int = 12
    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    inner_stride: int = 4
    in_chans: int = 3
    classes: int = 1000
    mlp_ratio: float = 4
    qkv_bias: bool = False
    excite: bool = False


class Attention(nn.Module):
    """Multi-head self attention of tokens [B, N, C]; queries and keys are one matrix, values another."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qk = nn.Linear(width, 2 * width, bias=bias)
        self.v = nn.Linear(width, width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        v = self.v(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Excitation(nn.Module):
    """Tokens [B, N, C] scaled channel by channel by a small network of their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width // 4
        self.fc = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(dim=1, keepdim=True)) * x


class Block(nn.Module):
    """Words among themselves, words into their sentence, sentences among themselves (section 2.2, equations 4 to 9)."""

    def __init__(self, config: Config, words: int) -> None:
        super().__init__()
        outer, inner = config.outer_width, config.inner_width
        self.inner_norm1 = nn.LayerNorm(inner)
        self.inner_attn = Attention(inner, config.inner_heads, config.qkv_bias)
        self.inner_norm2 = nn.LayerNorm(inner)
        self.inner_mlp = Mlp(inner, int(config.mlp_ratio * inner))
        self.proj_norm1 = nn.LayerNorm(words * inner)
        self.proj = nn.Linear(words * inner, outer, bias=False)
        self.proj_norm2 = nn.LayerNorm(outer)
        self.outer_norm1 = nn.LayerNorm(outer)
        self.outer_attn = Attention(outer, config.outer_heads, config.qkv_bias)
        self.outer_norm2 = nn.LayerNorm(outer)
        self.outer_mlp = Mlp(outer, int(config.mlp_ratio * outer))
        self.se_layer = Excitation(outer) if config.excite else None

    def forward(self, words: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Words [B * N, M, c] of N patches, and tokens [B, 1 + N, C] with the class token first, to the same."""
        words = words + self.inner_attn(self.inner_norm1(words))
        words = words + self.inner_mlp(self.inner_norm2(words))
        sentences = words.reshape(tokens.shape[0], tokens.shape[1] - 1, -1)  # word-major
        heard = self.proj_norm2(self.proj(self.proj_norm1(sentences)))
        tokens = torch.cat([tokens[:, :1], tokens[:, 1:] + heard], dim=1)
        tokens = tokens + self.outer_attn(self.outer_norm1(tokens))
        thought = self.outer_mlp(self.outer_norm2(tokens))
        if self.se_layer is not None:
            thought = thought + self.se_layer(thought)
        return words, tokens + thought


class WordEmbed(nn.Module):
    """Pictures [B, channels, Y, X] to the words [B * N, M, c] of every patch, by a convolution that ends at its border.

    What a picture has beyond whole patches, at its right and lower border, is not seen.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.inner_width, kernel_size=7, padding=3, stride=config.inner_stride)

    def forward(self, pictures: Tensor, grid: tuple[int, int]) -> Tensor:
        side = self.patch_size
        whole = pictures[:, :, : grid[0] * side, : grid[1] * side]
        patches = whole.unflatten(3, (grid[1], side)).unflatten(2, (grid[0], side))  # [B, channels, y, side, x, side]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # [B * N, channels, side, side]
        return self.proj(patches).flatten(2).transpose(1, 2)


class TNT(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        outer, inner, side = config.outer_width, config.inner_width, config.patch_size
        height, width = config.img_size if isinstance(config.img_size, tuple) else (config.img_size,) * 2
        self.grid = (height // side, width // side)
        patches, words = math.prod(self.grid), math.ceil(side / config.inner_stride) ** 2
        self.patch_embed = WordEmbed(config)
        self.proj_norm1 = nn.LayerNorm(words * inner)
        self.proj = nn.Linear(words * inner, outer)
        self.proj_norm2 = nn.LayerNorm(outer)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, outer))
        self.outer_tokens = nn.Parameter(torch.zeros(1, patches, outer), requires_grad=False)  # never read
        self.outer_pos = nn.Parameter(torch.zeros(1, 1 + patches, outer))
        self.inner_pos = nn.Parameter(torch.zeros(1, words, inner))
        self.blocks = nn.ModuleList(Block(config, words) for _ in range(config.depth))
        self.norm = nn.LayerNorm(outer)
        self.head = nn.Linear(outer, config.classes)
        initialise(self)
        for positions in (self.outer_pos, self.inner_pos):
            nn.init.trunc_normal_(positions, std=0.02)

    def embed(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Words [B * N, M, c] and tokens [B, 1 + N, C], both with positions."""
        batch, side = pictures.shape[0], self.config.patch_size
        grid = (pictures.shape[2] // side, pictures.shape[3] // side)
        words = self.patch_embed(pictures, grid) + self.inner_pos
        sentences = words.reshape(batch, grid[0] * grid[1], -1)
        tokens = self.proj_norm2(self.proj(self.proj_norm1(sentences)))
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1)
        return words, tokens + resize_positions(self.outer_pos, 1, grid, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        words, tokens = self.embed(x)
        for block in self.blocks:
            words, tokens = block(words, tokens)
        return self.head(self.norm(tokens)[:, 0])


# Accuracy and GMACs as the card of TNT has them; the paper gives no exact count for the tiny network.
PAPER = Paper(
    title="Transformer in Transformer",
    year=2021,
    link="https://arxiv.org/abs/2103.00112",
    reference="huawei-noah/Efficient-AI-Backbones@f90e129b645c3b1684fe07cd361cd557d0ad71f7",
    model=TNT,
    variants={
        "tnt_ti": Config(outer_width=192, inner_width=12, outer_heads=3, inner_heads=2),
        "tnt_s": Config(outer_width=384, inner_width=24, outer_heads=6, inner_heads=4),
        "tnt_b": Config(outer_width=640, inner_width=40, outer_heads=10, inner_heads=4),
    },
    tiny=Config(
        outer_width=32, inner_width=8, outer_heads=4, inner_heads=2, depth=2, img_size=32, inner_stride=8, classes=10
    ),
    published={
        "tnt_s": Published(parameters=23_843_848, gmacs=5.245, stated_gmacs=5.2, top1=81.5),
        "tnt_b": Published(parameters=65_554_120, gmacs=14.096, stated_gmacs=14.1, top1=82.9),
    },
    keys="cls_token, outer_tokens (frozen, never read, and counted), outer_pos, inner_pos, patch_embed.proj, "
    "proj_norm1, proj, proj_norm2, blocks.i.{inner_norm1,inner_attn,inner_norm2,inner_mlp,proj_norm1,proj,proj_norm2,"
    "outer_norm1,outer_attn,outer_norm2,outer_mlp} with attn.{qk,v,proj}, norm, head",
    idle={"outer_tokens": "frozen at zero in the reference, whose forward never reads it"},
)
