"""Runs a golden case of OverLoCK."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import overlock

GIVEN = {
    "embed_dim": ("widths", 4),
    "depth": ("depths", 4),
    "sub_depth": ("focus_depths", 2),
    "sub_num_heads": ("focus_heads", 2),
    "kernel_size": ("kernels", 4),
    "mlp_ratio": ("mlp_ratio", 4),
    "sub_mlp_ratio": ("focus_mlp_ratio", 2),
    "ls_init_value": ("layer_scale", 4),
    "smk_size": ("small_kernel", 0),
    "res_scale": ("scale_residual", 0),
    "projection": ("projection", 0),
    "use_ds": ("aux", 0),
    "deploy": ("deploy", 0),
    "in_chans": ("in_chans", 0),
    "num_classes": ("classes", 0),
}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, base_x and base_ctx: the maps of the base and of the overview net."""
    given = case["config"]
    known = {}
    for key, (name, count) in GIVEN.items():
        if key in given:  # one value for all stages, or one for each
            value = given[key]
            known[name] = tuple(value) if isinstance(value, list) else (value,) * count if count else value
    model = overlock.OverLoCK(replace(overlock.PAPER.variants[given.get("factory", "overlock_t")], **known)).eval()
    own = {k: v for k, v in model.state_dict().items() if any(p in k for p in [*case["keep"], "num_batches_tracked"])}
    zoo.load_checkpoint(model, {**own, **weights})
    x, overview = model.overview(inputs["x"])
    logits = model.head(model.focus(x, overview)).flatten(1)
    return {"logits": logits, "base_x": x, "base_ctx": overview}
