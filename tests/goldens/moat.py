"""Runs a golden case of MOAT."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import moat

GIVEN = {
    "stem_size": "stem",
    "num_blocks": "depths",
    "hidden_size": "widths",
    "expansion_rate": "expansion",
    "se_ratio": "excite",
    "head_size": "head_width",
    "stage_stride": "strides",
    "position_embedding_size": "positions",
    "pool_size": "pool",
    "global_attention_at_end_of_moat_stage": "global_at_end",
    "in_chans": "in_chans",
    "num_classes": "classes",
}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and the endpoints: `stage1` behind the stem, `stage<i + 2>` behind stage i; `res`, their GELU."""
    given = case["config"]
    known = {name: given[key] for key, name in GIVEN.items() if key in given}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    name = given.get("name", "moat0").split("_pretrain")[0].split("_finetune")[0]
    base = moat.PAPER.variants.get(name.replace("moat", "moat_"), moat.PAPER.variants["moat_0"])
    relative = given.get("relative_position_embedding_type", "2d_multi_head") is not None
    config = replace(base, relative=relative and not given.get("remove_position_embedding", False), **known)
    if "block_type" in given:
        config = replace(config, attends=tuple(kind == "moat" for kind in given["block_type"]))
    if given.get("window_size"):
        config = replace(config, windows=tuple(tuple(window) if window else None for window in given["window_size"]))
    if not any(key.startswith("logits_head") for key in weights):
        config = replace(config, classes=None)
    model = moat.MOAT(config).eval()
    counts = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    zoo.load_checkpoint(model, counts | dict(weights))
    maps = dict(enumerate(model.features(inputs["x"]), start=1))
    outputs = {f"stage{i}": x for i, x in maps.items()} | {f"res{i}": F.gelu(x) for i, x in maps.items()}
    return outputs if config.classes is None else outputs | {"logits": model(inputs["x"])}
