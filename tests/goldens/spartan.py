"""Runs a golden case of SpaRTAN."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo.spartan import Config, SpaRTAN


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, last_map, and layersK_out: what the K-th of the flat sequence of blocks and steps gives."""
    given = case["config"]
    depths = tuple(given.get("layer_depths", Config.depths))
    first = given.get("init_dim", 32)
    later = given.get("dims") or [first * 2**i for i in range(1, len(depths))]
    config = Config(
        widths=(first, *later),
        depths=depths,
        expansion=tuple(given.get("expand_ratios", Config.expansion)),
        classes=given.get("num_classes", 1000),
    )
    model = SpaRTAN(config).eval()
    own = {k: v for k, v in model.state_dict().items() if any(p in k for p in [*case["keep"], "num_batches_tracked"])}
    zoo.load_checkpoint(model, {**own, **weights})
    x, maps = model.conv(inputs["x"]), {}
    for number, layer in enumerate(model.layers):
        x = layer(x)
        maps[f"layers{number}_out"] = x
    return {"logits": model.linear(x.mean((2, 3))), "last_map": x, **maps}
