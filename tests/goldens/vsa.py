"""Runs a golden case of VSA on ViTAEv2."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import vsa

GIVEN = {
    "embed_dims": "embeds",
    "token_dims": "widths",
    "NC_depth": "depths",
    "NC_heads": "heads",
    "RC_heads": "reduction_heads",
    "NC_group": "groups",
    "RC_group": "reduction_groups",
    "downsample_ratios": "ratios",
    "kernel_size": "kernels",
    "dilations": "dilations",
    "wide_pcm": "wide",
    "cpe": "cpe",
    "window_size": "window",
    "mlp_ratio": "mlp_ratio",
    "img_size": "img_size",
    "in_chans": "in_chans",
    "num_classes": "classes",
}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and tokens: the last stage's map as tokens [B, N, C]."""
    given = case["config"]
    known = {name: _frozen(given[key]) for key, name in GIVEN.items() if key in given}
    row = vsa.PAPER.variants.get(str(given.get("factory", "")).lower(), vsa.S)
    model = vsa.ViTAEv2(replace(row, **known)).eval()
    counted = {key: value for key, value in model.state_dict().items() if not value.is_floating_point()}
    zoo.load_checkpoint(model, {**counted, **weights})
    return {"logits": model(inputs["x"]), "tokens": model.features(inputs["x"]).flatten(1, 2)}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
