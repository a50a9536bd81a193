"""Runs a golden case of DiNAT, NAT, their Swin-shaped and isotropic families, or of neighborhood attention alone."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import dinat

GIVEN = {
    "embed_dim": "width",
    "depths": "depths",
    "depth": "depth",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "dilations": "dilations",
    "dilation": "dilation",
    "kernel_size": "kernel",
    "layer_scale": "layer_scale",
    "patch_size": "patch",
    "img_size": "img_size",
    "in_chans": "in_chans",
    "num_classes": "classes",
}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and tokens: what the last norm gives; of a layer alone, out."""
    given = case["config"]
    if "dim" in given:
        attention = dinat.NeighborhoodAttention(
            given["dim"], given["num_heads"], given["kernel_size"], given.get("dilation") or 1
        ).eval()
        zoo.load_checkpoint(attention, weights)
        return {"out": attention(inputs["x"])}
    row = dinat.PAPER.variants[given.get("factory", "dinat_mini")]
    own = {field.name for field in fields(row)}
    known = {name: _frozen(given[key]) for key, name in GIVEN.items() if key in given and name in own}
    if known.get("dilations", ()) is None:
        known["dilations"] = ()
    if known.get("dilation", 1) is None:
        known["dilation"] = 1
    model = dinat.build(replace(row, **known)).eval()
    counted = {key: value for key, value in model.state_dict().items() if not value.is_floating_point()}
    zoo.load_checkpoint(model, {**counted, **weights})
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda _module, _given, out: seen.append(out))
    return {"logits": model(inputs["x"]), "tokens": _as_stored(seen[0], case)}


def _as_stored(tokens: Tensor, case: Mapping[str, Any]) -> Tensor:
    """The map [B, Y, X, C], or, where the reference norms a sequence, [B, N, C]."""
    stored = case["outputs"].get("tokens", {"shape": tokens.shape})
    return tokens.flatten(1, 2) if len(stored["shape"]) == 3 else tokens


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
