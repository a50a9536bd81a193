"""Runs a golden case of SASRec, whichever of the four layouts its keys and commit name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo.sasrec import Config, build

PORT_2024 = ("33bc1d8", "9f6a02b")  # the commits whose model is that of June 2024


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features of every step, scores of the given items, and the sequence with what its length leaves out as 0."""
    given = {**case["config"], **case["config"].get("args", {})}
    model = build(
        Config(
            items=given["item_num"],
            length=given.get("maxlen", 200),
            width=given.get("hidden_units", 50),
            depth=given.get("num_blocks", 2),
            heads=given.get("num_heads", 1),
            layout=layout(case, weights, given.get("maxlen", 200)),
            norm_first=given.get("norm_first", False),
        )
    ).eval()
    zoo.load_checkpoint(model, weights)
    sequence = inputs["seq"]
    if "seq_len" in inputs:
        place = torch.arange(sequence.shape[1])
        sequence = sequence * (place >= sequence.shape[1] - inputs["seq_len"][:, None])
    features = model.features(sequence)
    outputs = {"log_feats": features, "seq_used": sequence}
    return outputs | {"logits": model.score(features, inputs.get("item_indices"))}


def layout(case: Mapping[str, Any], weights: Mapping[str, Tensor], length: int) -> str:
    if "item_emb.weight" not in weights:
        return "official"
    if weights["pos_emb.weight"].shape[0] == length:
        return "port2020"
    commit = case["repo"].partition("@")[2]
    return "port2024" if commit.startswith(PORT_2024) or "2024" in case["variant"] else "port2025"
