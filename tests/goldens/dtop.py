"""Runs a golden case of DToP on SegViT's or SETR's host."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo.dtop import Config, DToP, feature_map


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The maps, every stage's features and canvas, and which tokens had left behind every auxiliary head."""
    given = case["config"]
    backbone, head = given["backbone"], given["decode_head"]
    others = given.get("auxiliary_head", [])
    depth = backbone.get("num_layers", 12)
    size = head.get("img_size", backbone.get("img_size", 512))
    model = DToP(
        Config(
            width=backbone.get("embed_dims", 768),
            heads=backbone.get("num_heads", 12),
            depth=depth,
            img_size=size if isinstance(size, int) else size[0],
            patch_size=backbone.get("patch_size", 16),
            in_chans=backbone.get("in_channels", 3),
            classes=head["num_classes"],
            stages=tuple(i % depth for i in backbone.get("out_indices", (depth - 1,))),
            thresholds=tuple(float(other.get("thresh", 1.0)) for other in others),
            channels=head["channels"],
            head_heads=head.get("num_heads", 6),
            layers=head.get("layers_per_decoder", 2),
            mlp_ratio=backbone.get("mlp_ratio", 4),
            host="setr" if head.get("type") == "SETRUPHead" else "segvit",
        )
    ).eval()
    own = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    zoo.load_checkpoint(model, own | {key: value for key, value in weights.items() if "loss_decode" not in key})
    pictures = next(iter(inputs.values()))
    x, grid = model.backbone.embed(pictures)
    stages = model.stages(x)
    count = grid[0] * grid[1]
    canvases = [stage.canvas[:, :, -count:] for stage in stages]
    outputs = {"pred": model.maps(stages[-1], grid, pictures), "attn_canvas_final": canvases[-1]}
    for i, (stage, canvas) in enumerate(zip(stages, canvases, strict=True)):
        outputs |= {f"feat{i}": feature_map(stage, grid), f"aux{i}_canvas": canvas}
    for i, after in enumerate(stages[1:]):
        none = torch.zeros(len(pictures), count, dtype=torch.bool)
        outputs[f"pruned_after_aux{i}"] = none if after.live is None else ~after.live.here[:, -count:]
    return outputs
