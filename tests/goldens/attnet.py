"""Runs a golden case of AttNet."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import attnet

GIVEN = {
    "dims": "widths",
    "depths": "depths",
    "exp_rates": "expansion",
    "kernel_sizes": "kernels",
    "glu_dconv": "glu_conv",
    "glu_norm": "glu_norm",
    "use_layer_scale": "layer_scale",
    "conv_bias": "bias",
    "num_classes": "classes",
}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and stageK: the map that stage K, counted from 1, ends with."""
    given = case["config"]
    base = attnet.PAPER.variants[given.get("factory", "AttNet_T2").lower()]
    known = {name: given[key] for key, name in GIVEN.items() if key in given}
    stages = len(known.get("depths", base.depths))
    for name in ("glu_conv", "glu_norm"):
        if isinstance(known.get(name), bool):
            known[name] = [known[name]] * stages
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    model = attnet.AttNet(replace(base, **known)).eval()
    own = {k: v for k, v in model.state_dict().items() if any(p in k for p in [*case["keep"], "num_batches_tracked"])}
    zoo.load_checkpoint(model, {**own, **weights})
    maps = model.features(inputs["x"])
    logits = model.head(model.norm(maps[-1].mean((2, 3))))
    return {"logits": logits, **{f"stage{i}": x for i, x in enumerate(maps, start=1)}}
