"""Runs a golden case of FAN, with TAP and the attention diversification loss."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import fan_tap

GIVEN = {
    "hybrid_patch_size": "hybrid_patch_size",
    "img_size": "img_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "num_classes": "classes",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "bias",
    "cls_attn_layers": "class_layers",
    "tokens_norm": "tokens_norm",
    "eta": "eta",
}


def configured(given: Mapping[str, Any]) -> fan_tap.Config:
    """What the factory builds; of TAP's, one scale where none is given."""
    factory = given.get("factory", "tap_fan_base_16_p4_hybrid")
    base = fan_tap.PAPER.variants[factory]
    known = {name: given[key] for key, name in GIVEN.items() if key in given}
    depth = given.get("depth", len(base.widths))
    if {"embed_dim", "depth", "channel_dims"} & given.keys() and len(set(base.widths)) == 1:
        known["widths"] = tuple(given.get("channel_dims") or (given.get("embed_dim", base.widths[0]),) * depth)
    heads = given.get("num_heads", list(base.heads) if depth == len(base.heads) else base.heads[0])
    known["heads"] = tuple(heads) if isinstance(heads, list) else (heads,) * depth
    if given.get("backbone"):
        known["hybrid"] = tuple(given["backbone"]["depths"])
        known["hybrid_widths"] = tuple(given["backbone"]["dims"][: len(known["hybrid"])])
    known["scales"] = given.get("num_scales", 1 if factory.startswith("tap") else None)
    return replace(base, **known)


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, last_block_map, tap_mask_blockI (scales last), and adl_thT: the loss with threshold T."""
    model = fan_tap.FAN(configured(case["config"])).eval()
    own = {k: v for k, v in model.state_dict().items() if any(p in k for p in [*case["keep"], "num_batches_tracked"])}
    zoo.load_checkpoint(model, {**own, **weights})
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        found[name] = output

    for index, block in enumerate(model.blocks):
        name = f"tap_mask_block{index}"
        if block.dilation_predictor is not None:
            block.dilation_predictor.register_forward_hook(
                lambda _module, _given, mask, name=name: keep(name, mask.permute(0, 2, 3, 1).unsqueeze(1))
            )
    classify = model.classify
    model.classify = lambda x: keep("last_block_map", x) or classify(x)
    found["logits"], attentions = model.forward_with_attention(inputs["x"])
    for name in case["outputs"]:
        if name.startswith("adl_th"):
            loss = fan_tap.attention_diversification_loss(attentions, float(name.removeprefix("adl_th")))
            found[name] = loss.reshape(1)
    return found
