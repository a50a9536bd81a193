"""Runs a golden case of DaViT."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import davit

GIVEN = {
    "embed_dims": "widths",
    "num_heads": "heads",
    "depths": "depths",
    "window_size": "window",
    "mlp_ratio": "mlp_ratio",
    "img_size": "img_size",
    "in_chans": "in_chans",
    "num_classes": "classes",
    "overlapped_patch": "overlapped",
    "attention_types": "kinds",
}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and last_tokens: the last stage's map as tokens [B, N, C]."""
    given = case["config"]
    known = {name: given[key] for key, name in GIVEN.items() if key in given}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    row = davit.PAPER.variants.get(str(given.get("factory", "")).lower(), davit.TINY)
    model = davit.DaViT(replace(row, **known)).eval()
    zoo.load_checkpoint(model, weights)
    return {"logits": model(inputs["x"]), "last_tokens": model.features(inputs["x"]).flatten(1, 2)}
