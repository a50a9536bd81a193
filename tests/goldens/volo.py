"""Runs a golden case of VOLO."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import volo

GIVEN = {
    "layers": "depths",
    "embed_dims": "widths",
    "num_heads": "heads",
    "mlp_ratios": "mlp_ratios",
    "stem_hidden_dim": "stem",
    "img_size": "img_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "num_classes": "classes",
    "return_dense": "return_dense",
    "return_mean": "return_mean",
}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and tokens: what the last norm gives."""
    given = case["config"]
    known = {name: given[key] for key, name in GIVEN.items() if key in given}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    if "post_layers" in given:
        known["class_blocks"] = len(given["post_layers"] or ())
    model = volo.VOLO(replace(volo.PAPER.variants[given.get("factory", "volo_d1")], **known)).eval()
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    zoo.load_checkpoint(model, {**counters, **weights})
    return {"logits": model(inputs["x"]), "tokens": model.features(inputs["x"])}
