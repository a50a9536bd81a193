"""Runs a golden case of RMT."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import rmt

FACTORIES = {"RMT_T3": rmt.T, "RMT_S": rmt.S, "RMT_M2": rmt.B, "RMT_L6": rmt.L}
GIVEN = {
    "embed_dims": "widths",
    "depths": "depths",
    "num_heads": "heads",
    "init_values": "starts",
    "heads_ranges": "ranges",
    "mlp_ratios": "mlp_ratios",
    "chunkwise_recurrents": "decomposed",
    "layerscales": "scaled",
    "layer_init_values": "layer_scale",
    "projection": "projection",
    "token_label": "token_labels",
    "in_chans": "in_chans",
    "num_classes": "classes",
}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and what stage i hands on (`layer<i>_out`, channels last)."""
    given = case["config"]
    known = {name: given[key] for key, name in GIVEN.items() if key in given}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    known.setdefault("token_labels", any(key.startswith("aux_head") for key in weights))
    model, outputs = rmt.RMT(replace(FACTORIES[given.get("factory", "RMT_S")], **known)).eval(), {}
    own = {key: x for key, x in model.state_dict().items() if "Relpos." in key or key.endswith("num_batches_tracked")}
    zoo.load_checkpoint(model, own | dict(weights))
    for i, stage in enumerate(model.layers):
        stage.register_forward_hook(lambda _stage, _given, out, i=i: outputs.update({f"layer{i}_out": out}))
    outputs["logits"] = model(inputs["x"])
    return outputs
