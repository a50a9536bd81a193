"""ConViT: "Improving Vision Transformers with Soft Convolutional Inductive Biases", d'Ascoli et al., ICML 2021.

https://arxiv.org/abs/2103.10697. The first blocks mix, head by head, ordinary attention with attention by position
alone, which starts out as a convolution; a learned gate lets each head leave that start. The class token enters after
them.

Reference: facebookresearch/convit at 0a9340aaf50dd101c2d3766e575f24085afc92ed (convit.py).
Known differences: attention by position is applied as two one-dimensional mixings, which is exact (its logits are a sum
of a row's and a column's part), so the grid need not be square; attention rows, whose sum is one, are not divided by
their sum again; a picture of another size gets bicubically resized positions, where the reference refuses; no dropout.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.zoo.layers.vit import Mlp, PatchEmbed, initialise, resize_positions
from compiled_attn.zoo.paper import Paper, Published

torch.fx.wrap("resize_positions")


@dataclass(frozen=True)
class Config:
    """width: C; heads: H; local_blocks: the first blocks, whose attention is gated and which see no class token.

    locality: the strength of the start as a convolution; epsilon: of every LayerNorm.
    """

    width: int
    heads: int
    depth: int = 12
    local_blocks: int = 10
    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    classes: int = 1000
    mlp_ratio: float = 4
    qkv_bias: bool = False
    positions: bool = True
    locality: float = 1.0
    epsilon: float = 1e-6


class SelfAttention(nn.Module):
    """Multi-head self attention of tokens [B, N, C]; `grid` is not asked."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        del grid
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GatedPositionalSelfAttention(nn.Module):
    """(1 - g) softmax(q k^T / sqrt(D)) v + g softmax(w . r) v, g = sigmoid(gate), r = (dx, dy, dx^2 + dy^2) (eq. 7)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.qk = nn.Linear(width, 2 * width, bias=config.qkv_bias)
        self.v = nn.Linear(width, width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.pos_proj = nn.Linear(3, config.heads)  # its bias is the same for all keys: softmax takes it out
        self.gating_param = nn.Parameter(torch.ones(config.heads))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, Y * X, C] of a `grid` of Y x X patches to the same."""
        q, k = split_heads(self.qk(x), 2, self.heads)
        (v,) = split_heads(self.v(x), 1, self.heads)
        gate = torch.sigmoid(self.gating_param)[:, None, None]
        by_content = F.scaled_dot_product_attention(q, k, v)  # [B, H, N, D]
        out = (1 - gate) * by_content + gate * self.by_position(v, grid)
        return self.proj(out.transpose(1, 2).flatten(2))

    def by_position(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Values [B, H, N, D] mixed along columns and rows: softmax over the grid is the product of those over each."""
        right, down, spread = self.pos_proj.weight.unbind(1)  # of dx, dy and the squared distance, [H] each
        columns = distance_attention(right, spread, grid[1])[:, None]  # [H, 1, X, X]
        rows = distance_attention(down, spread, grid[0])  # [H, Y, Y]
        mixed = columns @ v.unflatten(2, grid)  # [B, H, Y, X, D]
        return (rows @ mixed.flatten(3)).unflatten(3, (grid[1], v.shape[3])).flatten(2, 3)

    def start_as_convolution(self, strength: float) -> None:
        """Head h looks at one of sqrt(H) x sqrt(H) neighbours, and hands its values on unchanged (section 3)."""
        side = int(self.heads**0.5)
        centre = (side - 1) / 2 if side % 2 == 0 else side // 2
        with torch.no_grad():
            nn.init.eye_(self.v.weight)
            for head in range(side * side):
                shift = torch.tensor((2 * (head // side - centre), 2 * (head % side - centre), -1.0))
                self.pos_proj.weight[head] = shift
            self.pos_proj.weight *= strength


class Block(nn.Module):
    def __init__(self, config: Config, local: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.epsilon)
        self.attn = GatedPositionalSelfAttention(config) if local else SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.epsilon)
        self.mlp = Mlp(config.width, int(config.mlp_ratio * config.width))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))


class ConViT(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        height, width = config.img_size if isinstance(config.img_size, tuple) else (config.img_size,) * 2
        self.grid = (height // config.patch_size, width // config.patch_size)
        self.patch_embed = PatchEmbed(config.width, config.patch_size, config.in_chans)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid), config.width)) if config.positions else None
        self.blocks = nn.ModuleList(Block(config, i < config.local_blocks) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.epsilon)
        self.head = nn.Linear(config.width, config.classes)
        initialise(self)
        for block in self.blocks[: config.local_blocks]:
            block.attn.start_as_convolution(config.locality)

    def embed(self, pictures: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch tokens [B, N, C] with positions, and their grid (y, x)."""
        patches = self.patch_embed(pictures)  # [B, C, y, x]
        grid = (patches.shape[2], patches.shape[3])
        tokens = patches.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            tokens = tokens + resize_positions(self.pos_embed, 0, grid, self.grid)
        return tokens, grid

    def forward(self, x: Tensor) -> Tensor:
        x, grid = self.embed(x)
        for index, block in enumerate(self.blocks):
            if index == self.config.local_blocks:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            x = block(x, grid)
        return self.head(self.norm(x)[:, 0])


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B, N, parts * C] to that many [B, H, N, C / H]."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


@torch.fx.wrap
def distance_attention(slope: Tensor, curvature: Tensor, size: int) -> Tensor:
    """[H, size, size]: softmax over keys m of slope * (m - n) + curvature * (m - n)^2; slope and curvature are [H]."""
    index = torch.arange(size, device=slope.device)
    distance = (index[None, :] - index[:, None]).to(slope.dtype)
    return torch.softmax(slope[:, None, None] * distance + curvature[:, None, None] * distance.square(), dim=-1)


# Accuracy as the paper states it. No GMACs: the reference's figures count position terms that are not computed here.
PAPER = Paper(
    title="ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
    year=2021,
    link="https://arxiv.org/abs/2103.10697",
    reference="facebookresearch/convit@0a9340aaf50dd101c2d3766e575f24085afc92ed",
    model=ConViT,
    variants={
        "convit_tiny": Config(width=192, heads=4),
        "convit_tiny_plus": Config(width=256, heads=4),
        "convit_small": Config(width=432, heads=9),
        "convit_small_plus": Config(width=576, heads=9),
        "convit_base": Config(width=768, heads=16),
        "convit_base_plus": Config(width=1024, heads=16),
    },
    tiny=Config(width=32, heads=4, depth=2, local_blocks=1, img_size=32, patch_size=8, classes=10),
    published={
        "convit_tiny": Published(parameters=5_710_512, top1=73.1),
        "convit_tiny_plus": Published(parameters=9_972_912, top1=76.7),
        "convit_small": Published(parameters=27_777_322, top1=81.3),
        "convit_small_plus": Published(parameters=48_979_882, top1=82.2),
        "convit_base": Published(parameters=86_540_040, top1=82.4),
        "convit_base_plus": Published(parameters=153_134_856, top1=82.5),
    },
    keys="timm 0.3.2's, a bare state dict: cls_token, pos_embed, patch_embed.proj, blocks.i.{norm1,attn,norm2,mlp.fc1,"
    "mlp.fc2}, norm, head; attn.{qk,v,proj,pos_proj,gating_param} in the first blocks, attn.{qkv,proj} in the last two",
    idle={"attn.pos_proj.bias": "one number for all keys of a head, so softmax takes it out"},
)
