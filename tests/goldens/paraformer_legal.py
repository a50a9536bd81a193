"""Runs a golden case of Paraformer (legal retrieval), on MPNet or on XLM-R."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo.layers.text import PAD, Text
from compiled_attn.zoo.paraformer_legal import Config, Paraformer


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, the vectors, the attention over sentences, and the attention alone on the probe's vectors."""
    given = next((value for value in case["config"].values() if isinstance(value, dict)), {})
    relative = not any(".self.query." in key for key in weights)
    text = Text(
        vocabulary=given.get("vocab_size", 30527 if relative else 250002),
        width=given.get("hidden_size", 768),
        depth=given.get("num_hidden_layers", 12),
        heads=given.get("num_attention_heads", 12),
        hidden=given.get("intermediate_size", 3072),
        positions=given.get("max_position_embeddings", 514),
        epsilon=given.get("layer_norm_eps", 1e-5),
        relative=relative,
    )
    model = Paraformer(Config(text)).eval()
    zoo.load_checkpoint(model, weights)
    outputs: dict[str, Tensor] = {}
    if "query" in inputs:
        query = padded(inputs["query"], inputs.get("query_len"))
        article = padded(inputs["article"], inputs.get("sentence_len")).transpose(0, 1)  # [N, B, T] in the reference
        vector, vectors = model.plm(query), model.sentences(article)
        mixed, shares = model.general_attn(vector.unsqueeze(1), vectors)
        outputs = {"logits": model(query, article), "query_vec": vector, "sentence_vecs": vectors}
        outputs |= {"attn_weights": shares, "attn_output": mixed}
    if "probe_query" in inputs:
        out, shares = model.general_attn(inputs["probe_query"], inputs["probe_context"])
        outputs |= {"probe_out": out, "probe_weights": shares}
    return outputs


def padded(ids: Tensor, lengths: Tensor | None) -> Tensor:
    """The ids [..., L] with pads from lengths [...] on."""
    return ids if lengths is None else ids.where(torch.arange(ids.shape[-1]) < lengths.unsqueeze(-1), PAD)
