"""Runs a golden case of DHVT."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import dhvt

GIVEN = {
    "embed_dim": "width",
    "num_heads": "heads",
    "depth": "depth",
    "img_size": "img_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "num_classes": "classes",
    "mlp_ratio": "mlp_ratio",
}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and tokens: what the last norm gives."""
    given = case["config"]
    base = dhvt.PAPER.variants[given.get("factory", "dhvt_tiny_imagenet_patch16")]
    known = {name: given[key] for key, name in GIVEN.items() if key in given}
    model = dhvt.DHVT(replace(base, **known)).eval()
    own = {k: v for k, v in model.state_dict().items() if any(p in k for p in [*case["keep"], "num_batches_tracked"])}
    zoo.load_checkpoint(model, {**own, **weights})
    tokens = model.tokens(inputs["x"])
    return {"logits": model.head(tokens[:, 0]), "tokens": tokens}
