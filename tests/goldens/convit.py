"""Runs a golden case of ConViT."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo.convit import Config, ConViT


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits; what each block i gives (`block<i>`), and for gated ones what attention alone gives (`gpsa<i>`)."""
    given = case["config"]
    size = given.get("img_size", 224)
    config = Config(
        width=given.get("embed_dim", 48),
        heads=given.get("num_heads", 12),
        depth=given.get("depth", 12),
        local_blocks=given.get("local_up_to_layer", 10),
        img_size=tuple(size) if isinstance(size, list) else size,
        patch_size=given.get("patch_size", 16),
        in_chans=given.get("in_chans", 3),
        classes=given.get("num_classes", 1000),
        mlp_ratio=given.get("mlp_ratio", 4),
        qkv_bias=given.get("qkv_bias", False),
        positions=given.get("use_pos_embed", True),
        locality=given.get("locality_strength", 1.0),
        epsilon=given.get("norm_eps", 1e-6),
    )
    model = ConViT(config).eval()
    zoo.load_checkpoint(model, weights)
    outputs: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _block, _given, out, i=i: outputs.update({f"block{i}": out}))
        if i < config.local_blocks:
            block.attn.register_forward_hook(lambda _attn, _given, out, i=i: outputs.update({f"gpsa{i}": out}))
    outputs["logits"] = model(inputs["x"])
    return outputs
