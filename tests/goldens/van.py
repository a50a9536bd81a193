"""Runs a golden case of VAN."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import van

GIVEN = {
    "embed_dims": "widths",
    "depths": "depths",
    "mlp_ratios": "mlp_ratios",
    "img_size": "img_size",
    "in_chans": "in_chans",
    "num_classes": "classes",
    "norm_eps": "norm_eps",
    "layer_scale_init": "layer_scale",
}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and stageK_norm: the map that stage K ends with."""
    given = case["config"]
    known = {name: given[key] for key, name in GIVEN.items() if key in given}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    model = van.VAN(replace(van.PAPER.variants[given.get("factory", "van_b1")], **known)).eval()
    own = {k: v for k, v in model.state_dict().items() if any(p in k for p in [*case["keep"], "num_batches_tracked"])}
    zoo.load_checkpoint(model, {**own, **weights})
    maps = {f"stage{i}_norm": x for i, x in enumerate(model.features(inputs["x"]), start=1)}
    return {"logits": model(inputs["x"]), **maps}
