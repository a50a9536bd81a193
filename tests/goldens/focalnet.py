"""Runs a golden case of FocalNet."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import focalnet

GIVEN = {
    "embed_dim": "width",
    "depths": "depths",
    "focal_levels": "levels",
    "focal_windows": "windows",
    "patch_size": "patch_size",
    "img_size": "img_size",
    "in_chans": "in_chans",
    "num_classes": "classes",
    "mlp_ratio": "mlp_ratio",
    "use_conv_embed": "conv_embed",
    "use_postln": "post_norm",
    "use_postln_in_modulation": "norm_in_modulation",
    "normalize_modulator": "normalize",
}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and tokens: what the last norm gives."""
    given = case["config"]
    known = {name: given[key] for key, name in GIVEN.items() if key in given}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    if "use_layerscale" in given:
        known["layer_scale"] = given.get("layerscale_value", 1e-4) if given["use_layerscale"] else None
    base = focalnet.PAPER.variants.get(given.get("factory", ""), focalnet.PAPER.variants["focalnet_tiny_srf"])
    if "num_classes" not in given and "head.bias" in weights:
        known["classes"] = weights["head.bias"].shape[0]
    model = focalnet.FocalNet(replace(base, **known)).eval()
    own = {k: v for k, v in model.state_dict().items() if any(part in k for part in case["keep"])}
    zoo.load_checkpoint(model, {**own, **weights})
    tokens = model.tokens(inputs["x"])
    return {"logits": model.head(tokens.mean(1)), "tokens": tokens}
