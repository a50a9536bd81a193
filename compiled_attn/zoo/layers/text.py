"""The text encoders MPNet (Song et al., arXiv 2004.09297) and XLM-R (Conneau et al., arXiv 1911.02116).

Keys are those of transformers' MPNetModel and XLMRobertaModel. Token ids are [B, N]; id 1 pads. Real tokens alone go
through the layers, T packed rows [T, C], text behind text.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ops import pack_tokens, ragged_attention, unpack_tokens

PAD = 1
MASKED = -3e4  # the score of a pad as key: its softmax is zero in every precision, float16 can hold it
BUCKETS, FARTHEST = 32, 128  # of MPNet's relative positions


@dataclass(frozen=True)
class Text:
    """width: C; hidden: of the MLP; positions: rows of the table, of which the first two are no position.

    relative: attention has MPNet's bias by relative position and its keys; otherwise the encoder is XLM-R.
    """

    vocabulary: int
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 514
    epsilon: float = 1e-5
    relative: bool = True


class Texts(NamedTuple):
    """Where packed rows belong. real [B, N] bool: which tokens are no pads; place [T]: text * N + position.

    begins [B + 1]: where each text begins; bias [B, H, N, N]: MPNet's, which hides pads too; XLM-R has None.
    """

    real: Tensor
    place: Tensor
    begins: Tensor
    bias: Tensor | None

    def spread(self, x: Tensor) -> Tensor:
        """Rows [T, C] at their places [B, N, C], zeros for pads."""
        return unpack_tokens(x, self.place, x.new_zeros(self.real.shape[0], self.real.shape[1], x.shape[1]))


class Embeddings(nn.Module):
    """Words with their positions; XLM-R adds the one row of a table of token types. Gives packed rows and `Texts`."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(text.vocabulary, text.width, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(text.positions, text.width, padding_idx=PAD)
        self.token_type_embeddings = None if text.relative else nn.Embedding(1, text.width)
        self.LayerNorm = nn.LayerNorm(text.width, eps=text.epsilon)

    def forward(self, ids: Tensor) -> tuple[Tensor, Texts]:
        real = ids != PAD
        count = real.cumsum(dim=1) * real + PAD  # real tokens count from 2, pads stand at 1
        x = self.word_embeddings(ids) + self.position_embeddings(count)
        if self.token_type_embeddings is not None:
            x = x + self.token_type_embeddings.weight[0]
        rows, place, begins = pack_tokens(x, real)
        return self.LayerNorm(rows), Texts(real, place, begins, None)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, texts: Texts) -> Tensor:
    """Attention in heads of q, k, v [T, C] within each text: [T, C]. Where there is a bias, at their places."""
    if texts.bias is None:
        q, k, v = (t.unflatten(1, (heads, -1)) for t in (q, k, v))
        begins, longest = texts.begins, texts.real.shape[1]
        return ragged_attention(q, k, v, begins, begins, scale=q.shape[2] ** -0.5, longest=longest).flatten(1)
    q, k, v = (texts.spread(t).unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=texts.bias).transpose(1, 2).flatten(2)
    return out.flatten(0, 1)[texts.place]


class MPNetHeads(nn.Module):
    """Attention with its output map."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.heads = text.heads
        self.q = nn.Linear(text.width, text.width)
        self.k = nn.Linear(text.width, text.width)
        self.v = nn.Linear(text.width, text.width)
        self.o = nn.Linear(text.width, text.width)

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        return self.o(attend(self.q(x), self.k(x), self.v(x), self.heads, texts))


class MPNetAttention(nn.Module):
    """Attention, its residual, and the norm behind."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.attn = MPNetHeads(text)
        self.LayerNorm = nn.LayerNorm(text.width, eps=text.epsilon)

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        return self.LayerNorm(x + self.attn(x, texts))


class RobertaHeads(nn.Module):
    """Attention without its output map."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.heads = text.heads
        self.query = nn.Linear(text.width, text.width)
        self.key = nn.Linear(text.width, text.width)
        self.value = nn.Linear(text.width, text.width)

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        return attend(self.query(x), self.key(x), self.value(x), self.heads, texts)


class Output(nn.Module):
    """A map, the residual, and the norm behind."""

    def __init__(self, in_features: int, text: Text) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, text.width)
        self.LayerNorm = nn.LayerNorm(text.width, eps=text.epsilon)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dense(x))


class RobertaAttention(nn.Module):
    """Attention, its residual, and the norm behind."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.add_module("self", RobertaHeads(text))
        self.output = Output(text.width, text)

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        return self.output(self.get_submodule("self")(x, texts), x)


class Intermediate(nn.Module):
    """The first map of the MLP, with GELU (erf)."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.dense = nn.Linear(text.width, text.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """A post-norm block."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.attention = MPNetAttention(text) if text.relative else RobertaAttention(text)
        self.intermediate = Intermediate(text)
        self.output = Output(text.hidden, text)

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        x = self.attention(x, texts)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    """The blocks, which share one table of relative positions."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(text) for _ in range(text.depth))
        self.relative_attention_bias = nn.Embedding(BUCKETS, text.heads) if text.relative else None

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        if self.relative_attention_bias is not None:
            place = torch.ones_like(texts.real[0], dtype=torch.int64).cumsum(dim=0)
            table = self.relative_attention_bias(bucket(place[None, :] - place[:, None])).permute(2, 0, 1)  # [H, N, N]
            texts = texts._replace(bias=table.where(texts.real[:, None, None], MASKED))
        for layer in self.layer:
            x = layer(x, texts)
        return x


def bucket(offset: Tensor) -> Tensor:
    """The row of the table for key position minus query position: 8 exact and 8 logarithmic rows to either side."""
    side = BUCKETS // 2
    exact = side // 2
    far = offset.abs()
    share = torch.log(far.clamp(min=1).float() / exact) / math.log(FARTHEST / exact)
    grown = (exact + (share * (side - exact)).long()).clamp(max=side - 1)
    return (offset > 0) * side + torch.where(far < exact, far, grown)


class Pooler(nn.Module):
    """A map in the checkpoints that nothing here reads."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.dense = nn.Linear(text.width, text.width)


class TextEncoder(nn.Module):
    """Ids [B, N] to hidden rows [B, N, C], zero for pads."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.embeddings = Embeddings(text)
        self.encoder = Encoder(text)
        self.pooler = Pooler(text)

    def forward(self, ids: Tensor) -> Tensor:
        x, texts = self.embeddings(ids)
        return texts.spread(self.encoder(x, texts))
