"""Thirteen poolings that make one vector [B, C] of tokens [B, N, C], each as its paper's probe is built.

They are what efficient probing is compared with; keys and constants are those of billpsomas/efficient-probing at
b8f4fb84 (poolings/). Each takes any count of tokens unless it says otherwise.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.layers import vit


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] as [B, H, N, C / H]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of q [B, M, C] to k and v [B, N, C] in heads, scaled by their width: [B, M, C]."""
    out = F.scaled_dot_product_attention(heads_of(q, heads), heads_of(k, heads), heads_of(v, heads))
    return out.transpose(1, 2).flatten(2)


@torch.fx.wrap
def square_map(x: Tensor) -> Tensor:
    """Tokens [B, n * n, C] in row-major order as a map [B, C, n, n]."""
    side = math.isqrt(int(x.shape[1]))
    if side * side != x.shape[1]:
        raise CompiledAttnError(
            "the tokens make no square map",
            where="zoo.layers.poolings.square_map",
            facts=f"there are {x.shape[1]} tokens, {side} x {side} is {side * side}",
            do="give the patch tokens of a square picture, without the class token",
        )
    return x.transpose(1, 2).unflatten(2, (side, side))


class SelfAttention(vit.Attention):
    """Multi-head self attention whose q, k and v have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.qkv = nn.Linear(width, 3 * width, bias=False)


class Abmilp(nn.Module):
    """Attention-based multiple instance learning (Ilse et al., arXiv 1802.04712), behind one head of self attention.

    attended: "both", scores and sum are of the attended tokens; "map", only the scores are; "none", no self attention.
    positions: the side of the square of patches whose sine and cosine positions are added for the scores, 0 for none.
    patches_only drops the first token.
    """

    def __init__(
        self,
        width: int,
        attended: str = "both",
        activation: str = "tanh",
        depth: int = 2,
        positions: int = 0,
        patches_only: bool = False,
    ) -> None:
        super().__init__()
        self.attended = attended
        self.patches_only = patches_only
        self.pos_embed = None
        if positions:
            self.pos_embed = nn.Parameter(grid_positions(width, positions, not patches_only), requires_grad=False)
        self.self_attn = nn.Identity() if attended == "none" else SelfAttention(width, 1)
        act = nn.Tanh if activation == "tanh" else nn.ReLU
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), act())]
        self.attention_predictor = nn.Sequential(*hidden, nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 1:] if self.patches_only else x
        seen = self.self_attn(x)
        graded = x if self.attended == "none" else seen
        graded = graded if self.pos_embed is None else graded + self.pos_embed
        weights = self.attention_predictor(graded).softmax(dim=1)  # [B, N, 1]
        return ((seen if self.attended == "both" else x) * weights).sum(dim=1)


def grid_positions(width: int, side: int, first: bool) -> Tensor:
    """Positions [1, side * side, C] by sine and cosine as in MAE, columns before rows; first: a row of zeros leads."""
    rate = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * rate  # [side, C / 4]
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, C / 2]
    columns, rows = line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    table = torch.cat([columns, rows], dim=2).flatten(0, 1)
    table = torch.cat([table.new_zeros(1, width), table]) if first else table
    return table[None].float()


class SimPool(nn.Module):
    """SimPool (Psomas et al., arXiv 2309.06891): the mean asks, the normalised tokens answer; values have no map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_patches = nn.LayerNorm(width, eps=1e-6)
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_patches(x)
        return attend(self.wq(x.mean(1, keepdim=True)), self.wk(normed), normed, 1)[:, 0]


class SimPoolWithoutLinear(nn.Module):
    """SimPool without its maps, in 12 heads."""

    def __init__(self, width: int, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.norm_patches = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        query = self.norm_patches(x.mean(1, keepdim=True))
        return attend(query, self.norm_patches(x), x, self.heads)[:, 0]


class Clip(nn.Module):
    """CLIP's pooling (Radford et al., arXiv 2103.00020): self attention of the mean and `tokens` tokens, its row 0."""

    def __init__(self, width: int, tokens: int = 196, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.pos_embed = nn.Parameter(torch.randn(tokens + 1, width) * width**-0.5)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.pos_embed
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1), self.heads))[:, 0]


class Siglip(nn.Module):
    """SigLIP's pooling (Zhai et al., arXiv 2303.15343): a learned query, and an MLP with its residual, no norm."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = vit.Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(self.latent).expand(x.shape[0], -1, -1)
        x = self.proj(attend(query, *self.kv(x).chunk(2, dim=-1), self.heads))
        return (x + self.mlp(x))[:, 0]


class Aim(nn.Module):
    """AIM's probe (El-Nouby et al., arXiv 2401.08541): batch norm of the tokens, and a learned query with no map."""

    def __init__(self, width: int, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.bn = nn.BatchNorm1d(width, affine=False, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        return attend(self.cls_token.expand(x.shape[0], -1, -1), self.k(x), self.v(x), self.heads)[:, 0]


class ChannelGate(nn.Module):
    """CBAM's gate of channels: mean and maximum of the map through one bottleneck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, max(1, int(width / 16 + 0.5)), 1, bias=False)
        self.fc2 = nn.Conv2d(self.fc1.out_channels, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        most = self.fc2(F.relu(self.fc1(x.amax((2, 3), keepdim=True))))
        return x * torch.sigmoid(mean + most)


class ConvNorm(nn.Module):
    """A convolution that keeps the map's size, without bias, and its batch norm."""

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class SpatialGate(nn.Module):
    """CBAM's gate of places: mean and maximum over channels through a 7x7 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvNorm(2, 1, 7)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.conv(seen))


class Cbam(nn.Module):
    """CBAM (Woo et al., arXiv 1807.06521) on the square map, with its residual, then the mean of what is positive."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channel = ChannelGate(width)
        self.spatial = SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        x = square_map(x)
        return F.relu(self.spatial(self.channel(x)) + x).mean((2, 3))


class ScaleNorm(nn.Module):
    """LayerNorm whose shift `beta` is a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.register_buffer("beta", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.gamma, self.beta)


class Coca(nn.Module):
    """CoCa's pooling (Yu et al., arXiv 2205.01917): 196 learned queries in 8 heads, one head of keys and values.

    The reference reads query 0 alone, so only that one is computed; the others are kept for the checkpoint.
    """

    def __init__(self, width: int, queries: int = 196, heads: int = 8, head_width: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.norm = ScaleNorm(width)
        self.img_queries = nn.Parameter(torch.randn(queries, width))
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query = self.to_q(self.norm(self.img_queries[:1])).unflatten(1, (self.heads, -1))  # [1, H, D]
        k, v = self.to_kv(x).chunk(2, dim=-1)  # [B, N, D]: the heads stand where queries do
        out = F.scaled_dot_product_attention(query.expand(x.shape[0], -1, -1), k, v)
        return self.to_out(out.flatten(1))


class ClassAttention(nn.Module):
    """The class token's attention to the class token and the patches (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(self.q(x[:, :1]), self.k(x), self.v(x), self.heads))


class ClassBlock(nn.Module):
    """CaiT's class-attention block with its LayerScale: only the class token changes."""

    def __init__(self, width: int, heads: int, scale: float = 1e-5) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((width,), scale))
        self.gamma_2 = nn.Parameter(torch.full((width,), scale))
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = ClassAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = vit.Mlp(width, 4 * width)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        token = token + self.gamma_1 * self.attn(self.norm1(torch.cat([token, x], dim=1)))
        return token + self.gamma_2 * self.mlp(self.norm2(token))


class Cait(nn.Module):
    """CaiT's class attention (Touvron et al., arXiv 2103.17239): one block in 4 heads."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks_token_only = nn.ModuleList([ClassBlock(width, heads)])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        token = self.cls_token.expand(x.shape[0], -1, -1)
        for block in self.blocks_token_only:
            token = block(x, token)
        return self.norm(token)[:, 0]


class DinoBlock(nn.Module):
    """A pre-norm ViT block with LayerNorm's own eps of 1e-5 and no bias of q, k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = vit.Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DinoVit(nn.Module):
    """One more ViT block in 8 heads, then the mean over tokens."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.dino_block = DinoBlock(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.dino_block(x).mean(dim=1)


class CrossAttention(nn.Module):
    """Attention of query tokens to others, q and [k, v] mapped with bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        return self.proj(attend(self.q(query), *self.kv(x).chunk(2, dim=-1), self.heads))


class CrossBlock(nn.Module):
    """Cross attention to normalised tokens and an MLP; the query itself enters attention as it is."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.xattn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = vit.Mlp(width, 4 * width)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        query = query + self.xattn(query, self.norm1(x))
        return query + self.mlp(self.norm2(query))


class Jepa(nn.Module):
    """V-JEPA's attentive probe (Bardes et al., arXiv 2404.08471): one cross-attention block with a learned query."""

    def __init__(self, width: int, heads: int = 12) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.cross_attention_block = CrossBlock(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.cross_attention_block(self.query_tokens.expand(x.shape[0], -1, -1), x)[:, 0]


class Dolg(nn.Module):
    """DOLG's local branch (Yang et al., arXiv 2108.02927): unit features weighted by a softplus score, their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv1(x.transpose(1, 2).unsqueeze(3)))  # [B, C, N, 1]
        score = F.softplus(self.conv2(F.relu(x)))
        return (score * F.normalize(x, dim=1)).mean((2, 3))


class CaeAttention(nn.Module):
    """Attention of q to k and v, each with a map of its own without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.proj(attend(self.q(q), self.k(k), self.v(v), self.heads))


class Cae(nn.Module):
    """CAE's attentive probe (Chen et al., arXiv 2202.03026): q, k and v each with a norm; norm2_cross is never used."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.zeros(1, 1, width))
        self.norm1_q = nn.LayerNorm(width)
        self.norm1_k = nn.LayerNorm(width)
        self.norm1_v = nn.LayerNorm(width)
        self.norm2_cross = nn.LayerNorm(width)
        self.cross_attn = CaeAttention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        query = self.norm1_q(self.query_token).expand(x.shape[0], -1, -1)
        return self.cross_attn(query, self.norm1_k(x), self.norm1_v(x))[:, 0]
