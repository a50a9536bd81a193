"""Runs a golden case of EViT (and of plain DeiT, which is EViT that keeps everything)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo.evit import Config, EViT


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and kept_patches_j: ascending patch numbers [B, K] that the j-th shrinking block kept."""
    given = case["config"]
    depth = given.get("depth", 12)
    rates = tuple(given.get("keep_rate", (1,)))
    model = EViT(
        Config(
            width=given["embed_dim"],
            heads=given["num_heads"],
            depth=depth,
            img_size=given.get("img_size", 224),
            patch_size=given.get("patch_size", 16),
            in_chans=given.get("in_chans", 3),
            classes=given.get("num_classes", 1000),
            mlp_ratio=given.get("mlp_ratio", 4),
            keep_rate=rates * depth if len(rates) == 1 else rates,
            fuse=given.get("fuse_token", False),
        )
    ).eval()
    zoo.load_checkpoint(model, weights)
    x = inputs["x"]
    logits, kept = model.forward_with_kept(x)
    patches = (x.shape[2] // model.config.patch_size) * (x.shape[3] // model.config.patch_size)
    numbers = model.patch_numbers(kept, patches)
    return {"logits": logits, **{f"kept_patches_{j}": n for j, n in enumerate(numbers, start=1)}}
