"""Small networks that several test files compile: a convolution, batch norm, attention as people write it, a head."""

import torch
from torch import nn


class Attention(nn.Module):
    """Multi-head self attention on [B, N, width], scaled before the product, softmax written out, with dropout."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * (width // self.heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((self.drop(weights) @ v).transpose(1, 2).reshape(batch, tokens, width))


class Net(nn.Module):
    """Pictures [B, 3, 16, 16] to {"logits": [B, 5], "tokens": [B, 16, 16]}. `broken`: a graph break in the middle."""

    def __init__(self, dropout: float = 0.0, *, broken: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, 4)
        self.bn = nn.BatchNorm2d(16)
        self.norm = nn.LayerNorm(16)
        self.attn = Attention(16, 2, dropout)
        self.head = nn.Linear(16, 5)
        self.broken = broken

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        if self.broken:
            torch._dynamo.graph_break()
        x = x + self.attn(self.norm(x))
        return {"logits": self.head(x.mean(1)), "tokens": x}


def pictures(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16)


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest of b (and at least to 1e-3)."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-3)).item()
