"""Runs a golden case of Attentive CNN or of one of its ablations."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo.attentive_cnn import Config, build


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Probabilities over the group, the vectors, the weights of sentences, and the ids with pads put in."""
    given = case["config"]
    articles = inputs["article_tokens"]
    learned = "dense_4.kernel" in weights
    model = build(
        Config(
            vocabulary=given["vocab"],
            embedding=given.get("d_embedding", 512),
            width=given.get("d_cnn", 512),
            hidden=given.get("d_q", 200),
            kernel=given.get("kernel_size", 3),
            epsilon=given.get("layernorm_eps", 1e-6),
            article="flat" if articles.ndim == 3 else "softmax" if learned else "sparsemax",
        )
    ).eval()
    zoo.load_checkpoint(model, weights)
    query = padded(inputs["query_tokens"], inputs.get("query_len"))
    lengths = inputs.get("sentence_len", inputs.get("article_len"))
    articles = padded(articles, lengths)
    vector = model.query(query)
    vectors, shares = model.article(articles)
    return {
        "probs": model(query, articles).softmax(dim=-1),
        "query_rep": vector,
        "article_rep": vectors,
        "sentence_weights": shares,
        "query_tokens_used": query,
        "article_tokens_used": articles,
    }


def padded(ids: Tensor, lengths: Tensor | None) -> Tensor:
    """The ids [..., L] with 0 from lengths [...] on."""
    return ids if lengths is None else ids * (torch.arange(ids.shape[-1]) < lengths.unsqueeze(-1))
