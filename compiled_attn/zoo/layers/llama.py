"""The LLaMA decoder (Touvron et al., arXiv 2302.13971 and 2307.09288) that later papers host their attention in.

Keys are those of transformers. Tokens are [B, T], the stream is [B, T, C], queries are [B, H, T, D] and keys and values
[B, G, T, D] with G heads, each shared by H / G query heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # rotated q [B, H, T, D], k and v [B, H, T, D] -> [B, H, T, D]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon), scaled; at least in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Self attention with rotary positions and grouped queries."""

    def __init__(self, width: int, heads: int, groups: int, theta: float, factor: float) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.theta, self.factor = theta, factor
        self.q_proj = nn.Linear(width, heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, groups * self.size, bias=False)
        self.v_proj = nn.Linear(width, groups * self.size, bias=False)
        self.o_proj = nn.Linear(heads * self.size, width, bias=False)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, D], k and v [B, G, T, D] of x [B, T, C], none rotated."""
        q = self.q_proj(x).unflatten(2, (self.heads, self.size)).transpose(1, 2)
        k = self.k_proj(x).unflatten(2, (self.groups, self.size)).transpose(1, 2)
        v = self.v_proj(x).unflatten(2, (self.groups, self.size)).transpose(1, 2)
        return q, k, v

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Heads [B, *, T, D] turned by their positions, which broadcast to [B, *, T]."""
        return rotate(x, positions, self.theta, self.factor)

    def shared(self, x: Tensor) -> Tensor:
        """Keys or values [B, G, T, D] for every query head: [B, H, T, D]."""
        return x if self.groups == self.heads else x.repeat_interleave(self.heads // self.groups, dim=1)

    def join(self, out: Tensor) -> Tensor:
        """Heads [B, H, T, D] to the stream [B, T, C]."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mix: Mix) -> Tensor:
        q, k, v = self.heads_of(x)
        positions = places(x.shape[1], x)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        return self.join(mix(q, self.shared(k), self.shared(v)))


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and with its residual."""

    def __init__(self, attention: Attention, width: int, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = Mlp(width, hidden)
        self.input_layernorm = RMSNorm(width, epsilon)
        self.post_attention_layernorm = RMSNorm(width, epsilon)

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        """The stream behind this layer, from the stream before it and what attention gave."""
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, mix: Mix) -> Tensor:
        return self.add(x, self.self_attn(self.input_layernorm(x), mix))


class Decoder(nn.Module):
    """Token embedding, layers and the last norm."""

    def __init__(self, vocabulary: int, width: int, epsilon: float, layers: list[Layer]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(width, epsilon)


@torch.fx.wrap
def places(length: int, like: Tensor) -> Tensor:
    """Positions 0 to length - 1, [1, 1, T]."""
    return torch.arange(length, device=like.device)[None, None]


@torch.fx.wrap
def rotate(x: Tensor, positions: Tensor, theta: float, factor: float) -> Tensor:
    """Channels j and j + D / 2 of [..., T, D] turned as a pair by position / (factor * theta^(2 j / D))."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float32, device=x.device) / half
    angles = (positions.float() / factor)[..., None] * (1.0 / theta**exponents)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def initialise(model: nn.Module) -> None:
    """Normal of std 0.02 for linear maps and embeddings."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
