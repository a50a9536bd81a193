"""Runs a golden case of NiNformer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo.ninformer import Config, NiNformer

GIVEN = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "in_channels": "in_chans",
    "num_classes": "classes",
    "d_model": "width",
    "d_ffn": "hidden",
    "num_layers": "depth",
}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and tokens: what the last block gives."""
    given = case["config"]
    model = NiNformer(Config(**{name: given[key] for key, name in GIVEN.items() if key in given})).eval()
    own = {k: v for k, v in model.state_dict().items() if any(part in k for part in case["keep"])}
    zoo.load_checkpoint(model, {**own, **weights})
    tokens = model.tokens(inputs["x"])
    return {"logits": model.classifier(tokens.mean(1)), "tokens": tokens}
