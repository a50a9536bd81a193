"""Attentive CNN: "Attentive deep neural networks for legal document retrieval", section 4.1.

Nguyen et al., Artificial Intelligence and Law 2022, https://arxiv.org/abs/2212.13899; first in Kien et al., "Answering
Legal Questions by Learning Neural Attentive Text Representation", COLING 2020. A question and every sentence of an
article are read by a convolution and one learned attention over tokens; the article is a sparse mean of its sentences,
weighted by how much of their attention falls on real words.

References: KienPM/legal_doc_retrieval at 899984e266e6920e6714401f61ec378eb8b7ba5a (model/han_sparsemax_model.py) and
KienPM/COLIEE_task3 at 963bc0f0 (model/han_model.py, model/flat_model.py), both TensorFlow.
Known differences: no dropout (off in the references at inference); `forward` gives the products of question and
articles, of which the references' probabilities are the softmax over the group; any lengths and counts are taken.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ops import unpack_tokens
from compiled_attn.zoo.layers.keras import Conv1D, Dense, Embedding, LayerNormalization
from compiled_attn.zoo.layers.sparsemax import sparsemax
from compiled_attn.zoo.paper import Paper, Published


@dataclass(frozen=True)
class Config:
    """vocabulary: ids run from 0, which pads; embedding, width, hidden: of words, of the convolution, of attention.

    query, sentences, words: how long texts are in training (no parameter depends on it). article: a name of ARTICLES.
    """

    vocabulary: int
    embedding: int = 512
    width: int = 512
    hidden: int = 200
    kernel: int = 3
    epsilon: float = 1e-6
    query: int = 40
    sentences: int = 30
    words: int = 25
    article: str = "sparsemax"


class AttentiveCNN(nn.Module):
    """Questions [B, L] and G articles each [B, G, S, T] (ids, 0 pads) to the products of their vectors [B, G].

    Pads are no special words within a text: the convolution sees their row of the embedding, and they take a share of
    the attention over tokens. Empty sentences are sentences too.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.config = config
        self.embedding = Embedding(config.vocabulary, config.embedding)
        self.conv1d = Conv1D(config.embedding, width, config.kernel)
        self.layer_normalization = LayerNormalization(width, config.epsilon)
        self.dense = Dense(width, hidden)
        self.dense_1 = Dense(hidden, 1)
        self.conv1d_1 = Conv1D(config.embedding, width, config.kernel)
        self.layer_normalization_1 = LayerNormalization(width, config.epsilon)
        self.dense_2 = Dense(width, hidden)
        self.dense_3 = Dense(hidden, 1)

    def query(self, ids: Tensor) -> Tensor:
        """Vectors [B, C] of questions [B, L]."""
        x = self.layer_normalization(F.relu(self.conv1d(self.embedding(ids))))
        return attend(x, self.dense, self.dense_1)[0]

    def text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [M, C] of sentences [M, T], and what each of their tokens weighs [M, T]."""
        x = self.layer_normalization_1(F.relu(self.conv1d_1(self.embedding(ids))))
        return attend(x, self.dense_2, self.dense_3)

    def sentences(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [B, G, S, C] of the sentences of articles [B, G, S, T], and what their tokens weigh [B, G, S, T].

        Those that have words are packed and read; all empty ones are alike, and one of them is read for all.
        """
        grouped = ids.flatten(0, 1)  # [B * G, S, T]
        place = (grouped != 0).any(dim=2).flatten().nonzero().squeeze(1)
        empty = torch.zeros_like(grouped[0, :1])
        vectors, shares = self.text(torch.cat([empty, grouped.flatten(0, 1)[place]]))
        vectors, shares = (
            unpack_tokens(x[1:], place, x[0].expand(grouped.shape[0], grouped.shape[1], -1)) for x in (vectors, shares)
        )
        return vectors.unflatten(0, ids.shape[:2]), shares.unflatten(0, ids.shape[:2])

    def article(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [B, G, C] of articles [B, G, S, T], and what each of their sentences weighs [B, G, S]."""
        vectors, shares = self.sentences(ids)
        real = (ids != 0).to(shares.dtype)
        count = real.sum(dim=-1)
        weights = sparsemax((shares * real).sum(dim=-1) / count.clamp(min=1))
        return combine(vectors, weights), weights

    def forward(self, query: Tensor, articles: Tensor) -> Tensor:
        return (self.article(articles)[0] @ self.query(query).unsqueeze(-1)).squeeze(-1)


class HierarchicalAttention(AttentiveCNN):
    """The ablation whose sentences are weighed as tokens are: by a learned attention over their vectors."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.dense_4 = Dense(config.width, config.hidden)
        self.dense_5 = Dense(config.hidden, 1)

    def article(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return attend(self.sentences(ids)[0], self.dense_4, self.dense_5)


class FlatAttention(AttentiveCNN):
    """The ablation without sentences: articles [B, G, T], one attention over all their tokens."""

    def article(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        vectors, weights = self.text(ids.flatten(0, 1))
        return vectors.unflatten(0, ids.shape[:2]), weights.unflatten(0, ids.shape[:2])


def attend(x: Tensor, hidden: nn.Module, score: nn.Module) -> tuple[Tensor, Tensor]:
    """The mean [..., C] of rows x [..., N, C] by their learned weights, and these [..., N]."""
    weights = score(torch.tanh(hidden(x))).squeeze(-1).softmax(dim=-1)
    return combine(x, weights), weights


def combine(x: Tensor, weights: Tensor) -> Tensor:
    """Rows x [..., N, C] added up by weights [..., N]."""
    return (weights.unsqueeze(-2) @ x).squeeze(-2)


ARTICLES: Mapping[str, Callable[[Config], nn.Module]] = {
    "sparsemax": AttentiveCNN,
    "softmax": HierarchicalAttention,
    "flat": FlatAttention,
}


def build(config: Config) -> nn.Module:
    """The network whose way to read an article the Config names."""
    return ARTICLES[config.article](config)


def texts(config: Config, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Questions [B, query] and three articles each [B, 3, sentences, words], of random lengths, sentences empty too."""

    def draw(*shape: int, least: int) -> Tensor:
        ids = torch.randint(1, config.vocabulary, shape, generator=generator)
        lengths = torch.randint(least, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
        return ids * (torch.arange(shape[-1]) < lengths)

    if config.article == "flat":
        return draw(batch, config.query, least=1), draw(batch, 3, config.words, least=1)
    return draw(batch, config.query, least=1), draw(batch, 3, config.sentences, config.words, least=0)


VIETNAMESE = Config(31450)
SHIFT = "one number added to all scores of a softmax changes nothing"

# Counts measured on the references (card of Attentive CNN).
PAPER = Paper(
    title="Attentive deep neural networks for legal document retrieval",
    year=2022,
    link="https://arxiv.org/abs/2212.13899",
    reference="KienPM/legal_doc_retrieval@899984e266e6920e6714401f61ec378eb8b7ba5a",
    model=build,
    variants={
        "vietnamese": VIETNAMESE,
        "coliee": replace(VIETNAMESE, vocabulary=3102),
        "coliee_softmax": Config(2245, query=150, sentences=35, article="softmax"),
        "coliee_flat": Config(2235, embedding=200, query=150, words=1000, article="flat"),
    },
    tiny=Config(50, embedding=16, width=24, hidden=12, query=9, sentences=4, words=6),
    published={"vietnamese": Published(17_883_938), "coliee": Published(3_369_762)},
    keys="Keras' weight names with dots for slashes, kernels in its order: un-numbered for questions, then sentences",
    inputs=texts,
    idle={"dense_1.bias": SHIFT, "dense_3.bias": SHIFT},
)
