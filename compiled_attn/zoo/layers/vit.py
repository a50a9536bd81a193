"""The parts of the Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) that later papers cite.

Keys are those of timm 0.4.12, which DeiT's and EViT's checkpoints use. Tokens are [B, N, C], pictures
[B, channels, Y, X].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6  # of every LayerNorm


class PatchEmbed(nn.Module):
    """Picture to patch tokens [B, C, y, x]: one linear map of every `patch_size` x `patch_size` square."""

    def __init__(self, width: int, patch_size: int, in_chans: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.proj(pictures)


class Attention(nn.Module):
    """Multi-head self attention (section 3.1 and appendix A), softmax(q k^T / sqrt(D)) v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of tokens x [B, N, C], each [B, H, N, D]."""
        batch, tokens, width = x.shape
        split = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*self.heads_of(x), scale=self.scale)  # [B, H, N, D]
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear maps with GELU (erf) between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block: attention and MLP, each with its residual (equations 2 and 3)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def resize_positions(
    positions: Tensor, prefix: int, grid: tuple[int, int], old_grid: tuple[int, int] | None = None
) -> Tensor:
    """Positions [1, prefix + n, C] of a grid, square unless told, for a grid of y x x patches: [1, prefix + y*x, C].

    Bicubic with align_corners=False; the prefix rows stay as they are. The same count of patches keeps them unchanged.
    """
    height, width = grid
    count = positions.shape[1] - prefix
    if count == height * width:
        return positions
    old = positions[:, prefix:].transpose(1, 2).unflatten(2, old_grid or (round(count**0.5),) * 2)
    new = F.interpolate(old, size=(height, width), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :prefix], new.flatten(2).transpose(1, 2)], dim=1)


def initialise(model: nn.Module) -> None:
    """Truncated normal of std 0.02 for linear maps and embeddings, zero biases, as DeiT and EViT start."""
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_token", "dist_token", "pos_embed")):
            nn.init.trunc_normal_(parameter, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
