"""Runs a golden case of HaloNet."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import halonet

GIVEN = {"block_size": "block", "halo_size": "halo", "act": "act", "in_chans": "in_chans", "num_classes": "classes"}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and stage3: the last stage's map."""
    given = case["config"]
    known = {name: given[key] for key, name in GIVEN.items() if key in given}
    model = halonet.HaloNet(replace(halonet.PAPER.variants[given.get("timm_name", "halonet26t")], **known)).eval()
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    zoo.load_checkpoint(model, {**counters, **weights})
    seen: list[Tensor] = []
    model.stages.register_forward_hook(lambda _module, _given, out: seen.append(out))
    return {"logits": model(inputs["x"]), "stage3": seen[0]}
