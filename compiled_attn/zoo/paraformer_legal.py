"""Paraformer: "Attentive deep neural networks for legal document retrieval", section 4.2.

Nguyen et al., Artificial Intelligence and Law 2022, https://arxiv.org/abs/2212.13899. A pretrained encoder reads the
question and every sentence of an article; one attention with sparsemax over the sentences mixes what answers the
question, and a linear map says whether the article is relevant. (Not the speech recogniser of the same name.)

Reference: nguyenthanhasia/paraformer at 0222c25994b2bc1c052de7e793b8f05fdd2d526b (model.py, computation_units.py).
Known differences: no dropout; texts come as token ids, batches of articles too (`real` names the sentences that are
there), and are encoded as one ragged batch, their real tokens packed; the encoder has gradients, which the reference's
`encode` never gives it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compiled_attn.zoo.layers.sparsemax import sparsemax
from compiled_attn.zoo.layers.text import PAD, Text, TextEncoder
from compiled_attn.zoo.paper import Paper, Published

CLASSES = 2  # not relevant, relevant


@dataclass(frozen=True)
class Config:
    """text: the encoder; query, sentences, words: sizes of drawn inputs (no parameter depends on them)."""

    text: Text
    query: int = 16
    sentences: int = 6
    words: int = 24


class Transformer(nn.Module):
    """sentence-transformers' name for the encoder."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.auto_model = TextEncoder(text)


class SentenceEncoder(nn.Module):
    """Token ids [B, N] to sentence vectors [B, C]: the mean of the rows of real tokens, zeros where there is none."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.add_module("0", Transformer(text))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.get_submodule("0").auto_model(ids)
        return rows.sum(dim=1) / (ids != PAD).sum(dim=1, keepdim=True).clamp(min=1)


class GeneralAttention(nn.Module):
    """Luong's general attention (arXiv 1508.04025) with sparsemax, neither scaled nor masked.

    query [B, M, C], context [B, N, C] to (tanh of a map of [mix, mapped query] [B, M, C], weights [B, M, N]); real
    [B, N]: which rows of the context are there, all where None.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(width, width, bias=False)
        self.linear_out = nn.Linear(2 * width, width, bias=False)

    def forward(self, query: Tensor, context: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        query = self.linear_in(query)
        weights = sparsemax(only(query @ context.transpose(1, 2), real))
        return torch.tanh(self.linear_out(torch.cat([weights @ context, query], dim=-1))), weights


@torch.fx.wrap
def only(scores: Tensor, real: Tensor | None) -> Tensor:
    """Scores [B, M, N] whose rows that are not there, by real [B, N], get no weight of a sparsemax."""
    if real is None:
        return scores
    return scores.where(real.unsqueeze(1), scores.amin(dim=-1, keepdim=True) - 2)  # none gets any 1 below the best


@torch.fx.wrap
def without(article: Tensor, real: Tensor | None) -> Tensor:
    """Ids [B, N, T] with pads for sentences that are not there, by real [B, N]: nothing is computed for these."""
    return article if real is None else article.where(real.unsqueeze(-1), PAD)


class Paraformer(nn.Module):
    """Questions [B, L] and articles [B, N, T] (token ids, 1 pads) to logits [B, 2]; class 1 is "relevant"."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.plm = SentenceEncoder(config.text)
        self.general_attn = GeneralAttention(config.text.width)
        self.classifier = nn.Linear(config.text.width, CLASSES)

    def sentences(self, article: Tensor) -> Tensor:
        """Vectors [B, N, C] of the sentences of articles [B, N, T]: they depend on no question, so keep them."""
        return self.plm(article.flatten(0, 1)).unflatten(0, article.shape[:2])

    def relate(self, query: Tensor, sentences: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits [B, 2] of question vectors [B, C] and sentence vectors [B, N, C]."""
        return self.classifier(self.general_attn(query.unsqueeze(1), sentences, real)[0].squeeze(1))

    def forward(self, query: Tensor, article: Tensor, real: Tensor | None = None) -> Tensor:
        return self.relate(self.plm(query), self.sentences(without(article, real)), real)


def texts(config: Config, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random token ids of questions [B, query] and articles [B, sentences, words], of random lengths."""

    def draw(*shape: int) -> Tensor:
        ids = torch.randint(PAD + 3, config.text.vocabulary, shape, generator=generator)
        lengths = torch.randint(2, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
        return ids.where(torch.arange(shape[-1]) < lengths, PAD)

    return draw(batch, config.query), draw(batch, config.sentences, config.words)


MPNET = Text(30527)
XLMR = Text(250002, relative=False)
IDLE: Mapping[str, str] = {
    "pooler.dense.weight": "the sentence's vector is the mean of its rows, the encoder's pooler is not read",
    "pooler.dense.bias": "as pooler.dense.weight",
    ".k.bias": "it adds one number to all scores of a query, which softmax ignores",
}

# Counts measured on the reference (card of Paraformer).
PAPER = Paper(
    title="Attentive deep neural networks for legal document retrieval",
    year=2022,
    link="https://arxiv.org/abs/2212.13899",
    reference="nguyenthanhasia/paraformer@0222c25994b2bc1c052de7e793b8f05fdd2d526b",
    model=Paraformer,
    variants={"mpnet_base": Config(MPNET), "xlmr_multilingual": Config(XLMR)},
    tiny=Config(Text(60, width=16, depth=1, heads=2, hidden=32, positions=20), query=7, sentences=4, words=9),
    published={"mpnet_base": Published(111_257_474)},
    keys="the released checkpoint's state_dict: plm.0.auto_model (transformers' encoder), general_attn, classifier, "
    "without its int64 buffer embeddings.position_ids",
    inputs=texts,
    idle=IDLE,
)
