"""SASRec: "Self-Attentive Sequential Recommendation".

Kang and McAuley, ICDM 2018, https://arxiv.org/abs/1808.09781. Causal self attention over the items that a user has
seen predicts the next; an item's score is its own embedding times the last step's feature.

References: kang205/SASRec at e3738967fddab206d6eeb4fda433e7a7034dd8b1 (TensorFlow; model.py, modules.py) and the port
that it names, pmixer/SASRec.pytorch at fde8a9c08febc2c898dc269b1d98ab762c50d2be (python/model.py) with its history.
Four layouts of the block were published, three of them under the same keys: see LAYOUTS.
Known differences: no dropout (off in the references at inference).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ops import pack_tokens, ragged_attention, unpack_tokens
from compiled_attn.zoo.layers.keras import Conv1D, Dense
from compiled_attn.zoo.layers.mha import MultiheadAttention
from compiled_attn.zoo.paper import Paper, Published

EPSILON = 1e-8  # of every LayerNorm


@dataclass(frozen=True)
class Config:
    """items: ids run from 1 to items, 0 pads on the left; length: the longest sequence; width: C; depth: blocks.

    layout: a name of LAYOUTS. norm_first: the norms stand before attention and MLP ("port2025" only).
    """

    items: int
    length: int = 200
    width: int = 50
    depth: int = 2
    heads: int = 1
    layout: str = "port2025"
    norm_first: bool = False


class PointWiseFeedForward(nn.Module):
    """Two maps of width C with a ReLU between; the weights are kernels of one step [C, C, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 1)
        self.conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.conv1.weight.squeeze(2), self.conv1.bias))
        return F.linear(x, self.conv2.weight.squeeze(2), self.conv2.bias)


class Recommender(nn.Module):
    """Item ids [B, L] to scores, by the features of the last step."""

    def features(self, sequence: Tensor) -> Tensor:
        """Features [B, L, C] of every step."""
        raise NotImplementedError

    def table(self) -> Tensor:
        """The items' embeddings [items + 1, C] that score."""
        raise NotImplementedError

    def score(self, features: Tensor, items: Tensor | None = None) -> Tensor:
        """Scores of the last step of features [B, L, C]: of all ids [B, items + 1], or of `items` [I] or [B, I]."""
        last, table = features[:, -1], self.table()
        if items is None:
            return last @ table.T
        return (table[items] @ last.unsqueeze(-1)).squeeze(-1)

    def forward(self, sequence: Tensor, items: Tensor | None = None) -> Tensor:
        return self.score(self.features(sequence), items)


class SASRec(Recommender):
    """Item ids [B, L] to scores; the port since May 2025. Pads are no special rows: later items attend to them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, depth = config.width, range(config.depth)
        self.config = config
        self.item_emb = nn.Embedding(config.items + 1, width, padding_idx=0)
        self.pos_emb = self.positions()
        self.attention_layernorms = nn.ModuleList(nn.LayerNorm(width, eps=EPSILON) for _ in depth)
        self.attention_layers = nn.ModuleList(MultiheadAttention(width, config.heads) for _ in depth)
        self.forward_layernorms = nn.ModuleList(nn.LayerNorm(width, eps=EPSILON) for _ in depth)
        self.forward_layers = nn.ModuleList(PointWiseFeedForward(width) for _ in depth)
        self.last_layernorm = nn.LayerNorm(width, eps=EPSILON)
        initialise(self)

    def positions(self) -> nn.Embedding:
        return nn.Embedding(self.config.length + 1, self.config.width, padding_idx=0)

    def embed(self, sequence: Tensor) -> Tensor:
        """Scaled items with their positions, which count from 1 in the window and are 0 for pads: [B, L, C]."""
        place = torch.ones_like(sequence).cumsum(dim=1) * (sequence != 0)
        return self.item_emb(sequence) * self.config.width**0.5 + self.pos_emb(place)

    def block(self, index: int, x: Tensor) -> Tensor:
        attention, mlp = self.attention_layers[index], self.forward_layers[index]
        norm1, norm2 = self.attention_layernorms[index], self.forward_layernorms[index]
        if self.config.norm_first:
            x = x + attention(norm1(x), causal=True)
            return x + mlp(norm2(x))
        x = norm1(x + attention(x, causal=True))
        return norm2(x + mlp(x))

    def features(self, sequence: Tensor) -> Tensor:
        x = self.embed(sequence)
        for index in range(self.config.depth):
            x = self.block(index, x)
        return self.last_layernorm(x)

    def table(self) -> Tensor:
        return self.item_emb.weight


class SASRec2024(SASRec):
    """The port from June 2024: the norms stand on the query and on the MLP's input, and the residuals start there."""

    def block(self, index: int, x: Tensor) -> Tensor:
        query = self.attention_layernorms[index](x)
        x = self.forward_layernorms[index](query + self.attention_layers[index](query, x, causal=True))
        return x + self.forward_layers[index](x)


class SASRec2020(SASRec2024):
    """The port from 2020: positions count from 0, pads have one too; rows of pads are zero between blocks.

    As keys they are not masked: a zero row keeps the weight exp of its bias.
    """

    def positions(self) -> nn.Embedding:
        return nn.Embedding(self.config.length, self.config.width)

    def embed(self, sequence: Tensor) -> Tensor:
        place = torch.ones_like(sequence).cumsum(dim=1) - 1
        return self.item_emb(sequence) * self.config.width**0.5 + self.pos_emb(place)

    def features(self, sequence: Tensor) -> Tensor:
        real = (sequence != 0).unsqueeze(-1)
        x = self.embed(sequence) * real
        for index in range(self.config.depth):
            x = self.block(index, x) * real
        return self.last_layernorm(x)


class Table(nn.Module):
    """TensorFlow's name for rows that ids look up."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.lookup_table = nn.Parameter(torch.empty(rows, width))


class Norm(nn.Module):
    """LayerNorm; Variable is its shift and Variable_1 its scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.Variable = nn.Parameter(torch.zeros(width))
        self.Variable_1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.Variable_1, self.Variable, EPSILON)


class SelfAttention(nn.Module):
    """Attention without an output map: queries of normalised rows, keys and values of the rows as they are.

    Rows [T, C] are the real items of all sequences, each from begins [B + 1] on.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.dense = Dense(width, width)
        self.dense_1 = Dense(width, width)
        self.dense_2 = Dense(width, width)

    def forward(self, query: Tensor, x: Tensor, begins: Tensor, longest: int) -> Tensor:
        q, k, v = (t.unflatten(1, (self.heads, -1)) for t in (self.dense(query), self.dense_1(x), self.dense_2(x)))
        scale = q.shape[2] ** -0.5
        return ragged_attention(q, k, v, begins, begins, scale=scale, causal=True, longest=longest).flatten(1)


class FeedForward(nn.Module):
    """The MLP on rows [T, C], convolutions of one step; TensorFlow's code names its scope multihead_attention too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1d = Conv1D(width, width, 1)
        self.conv1d_1 = Conv1D(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner, outer = self.conv1d, self.conv1d_1
        return F.linear(F.relu(F.linear(x, inner.kernel[0].T, inner.bias)), outer.kernel[0].T, outer.bias)


class Block(nn.Module):
    """One block of the official code, on real rows: residuals start at the normalised ones."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln = Norm(width)
        self.self_attention = SelfAttention(width, heads)
        self.ln_1 = Norm(width)
        self.multihead_attention = FeedForward(width)

    def forward(self, x: Tensor, begins: Tensor, longest: int) -> Tensor:
        query = self.ln(x)
        x = self.ln_1(query + self.self_attention(query, x, begins, longest))
        return x + self.multihead_attention(x)


class Scope(nn.Module):
    """What stands under `SASRec` in the official checkpoint."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_embeddings = Table(config.items + 1, config.width)
        self.dec_pos = Table(config.length, config.width)
        for index in range(config.depth):
            self.add_module(f"num_blocks_{index}", Block(config.width, config.heads))
        self.ln = Norm(config.width)


class OfficialSASRec(Recommender):
    """The official network: item 0 is the zero vector wherever it is read.

    Pads are masked as keys and zero as rows there; here they are left out, and zero again in front of the last norm.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.SASRec = Scope(config)
        initialise(self)

    def table(self) -> Tensor:
        table = self.SASRec.input_embeddings.lookup_table
        return torch.cat([torch.zeros_like(table[:1]), table[1:]])

    def features(self, sequence: Tensor) -> Tensor:
        real = sequence != 0
        place = torch.ones_like(sequence).cumsum(dim=1) - 1
        x = self.table()[sequence] * self.config.width**0.5 + self.SASRec.dec_pos.lookup_table[place]
        rows, where, begins = pack_tokens(x, real)
        for index in range(self.config.depth):
            rows = self.SASRec.get_submodule(f"num_blocks_{index}")(rows, begins, sequence.shape[1])
        x = unpack_tokens(rows, where, torch.zeros_like(x))
        return self.SASRec.ln(x)


LAYOUTS: Mapping[str, Callable[[Config], nn.Module]] = {
    "official": OfficialSASRec,
    "port2020": SASRec2020,
    "port2024": SASRec2024,
    "port2025": SASRec,
}


def build(config: Config) -> nn.Module:
    """The network of the layout that the Config names."""
    return LAYOUTS[config.layout](config)


def initialise(model: nn.Module) -> None:
    """Xavier normal for whatever has two dimensions or more; the row of pads is zero, as the port starts."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_normal_(parameter)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[:1].detach())


def sequences(config: Config, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random ids [B, length], each row padded on the left to a length of its own."""
    ids = torch.randint(1, config.items + 1, (batch, config.length), generator=generator)
    lengths = torch.randint(1, config.length + 1, (batch, 1), generator=generator)
    return (ids * (torch.arange(config.length) >= config.length - lengths),)


ML1M = 3416  # items of MovieLens-1M after the references' filter

# Counts measured on the references (card of SASRec).
PAPER = Paper(
    title="Self-Attentive Sequential Recommendation",
    year=2018,
    link="https://arxiv.org/abs/1808.09781",
    reference="kang205/SASRec@e3738967fddab206d6eeb4fda433e7a7034dd8b1",
    model=build,
    variants={
        "ml1m": Config(ML1M),
        "ml1m_norm_first": Config(ML1M, norm_first=True),
        "ml1m_2024": Config(ML1M, layout="port2024"),
        "ml1m_2020": Config(ML1M, layout="port2020"),
        "ml1m_official": Config(ML1M, layout="official"),
    },
    tiny=Config(items=40, length=12, width=16, depth=2, heads=2),
    published={
        "ml1m": Published(212_000),
        "ml1m_norm_first": Published(212_000),
        "ml1m_2024": Published(212_000),
        "ml1m_2020": Published(211_950),
        "ml1m_official": Published(206_850),
    },
    keys="the port's item_emb, pos_emb, attention_layernorms, attention_layers, forward_layernorms, forward_layers, "
    "last_layernorm; official: TensorFlow's variable names with dots for slashes, kernels in TensorFlow's order",
    inputs=sequences,
)
