"""Runs a golden case of TNT, or of PyramidTNT (which the reference keeps in the same folder)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo import pyramid_tnt, tnt


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and of block i of TNT the words (`inner_block<i>`) and the tokens (`outer_block<i>`)."""
    given = case["config"]
    if "ptnt" in given.get("factory", "") or "depths" in given.get("configs", given):
        return run_pyramid(given, weights, inputs)
    outputs: dict[str, Tensor] = {}
    model = tnt.TNT(
        tnt.Config(
            outer_width=given.get("outer_dim", 768),
            inner_width=given.get("inner_dim", 48),
            outer_heads=given.get("outer_num_heads", 12),
            inner_heads=given.get("inner_num_heads", 4),
            depth=given.get("depth", 12),
            img_size=size(given.get("img_size", 224)),
            patch_size=given.get("patch_size", 16),
            inner_stride=given.get("inner_stride", 4),
            in_chans=given.get("in_chans", 3),
            classes=given.get("num_classes", 1000),
            mlp_ratio=given.get("mlp_ratio", 4),
            qkv_bias=given.get("qkv_bias", False),
            excite=given.get("se", 0) > 0,
        )
    ).eval()
    zoo.load_checkpoint(model, weights)
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda _block, _given, out, i=i: outputs.update({f"inner_block{i}": out[0], f"outer_block{i}": out[1]})
        )
    outputs["logits"] = model(inputs["x"])
    return outputs


def run_pyramid(
    given: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Logits, and what stage i gives: words [B * N, 16, c] (`inner_stage<i>`) and tokens (`outer_stage<i>`)."""
    names = {"ti": "ptnt_ti_192", "s": "ptnt_s_256", "m": "ptnt_m_256", "b": "ptnt_b_256"}
    base = pyramid_tnt.PAPER.variants[names[given.get("factory", "ptnt_s").split("_")[1]]]
    rows = {"outer_dims": "outer_widths", "inner_dims": "inner_widths", "outer_heads": "outer_heads"}
    rows |= {"inner_heads": "inner_heads", "depths": "depths"}
    stages = given.get("configs", given)
    config = replace(
        base,
        **{ours: tuple(stages[theirs]) for theirs, ours in rows.items() if theirs in stages},
        img_size=size(given.get("img_size", base.img_size)),
        in_chans=given.get("in_chans", 3),
        classes=given.get("num_classes", 1000),
        mlp_ratio=given.get("mlp_ratio", 4),
        qkv_bias=given.get("qkv_bias", False),
        excite=given.get("se", 0) > 0,
    )
    model, outputs = pyramid_tnt.PyramidTNT(config).eval(), {}
    counts = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    zoo.load_checkpoint(model, counts | dict(weights))
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(
            lambda _stage, _given, out, i=i: outputs.update(
                {f"inner_stage{i}": out[0].unflatten(2, (16, -1)).flatten(0, 1), f"outer_stage{i}": out[1]}
            )
        )
    outputs["logits"] = model(inputs["x"])
    return outputs


def size(given: int | list[int]) -> int | tuple[int, int]:
    return (given[0], given[1]) if isinstance(given, list) else given
