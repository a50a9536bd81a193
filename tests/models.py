"""Stock models of timm and transformers in small random configurations, as users have them: no class changed.

Weights are drawn so that attention matters: with the libraries' own initial values the scores are nearly equal and layer
scale hides the blocks, so that a wrong scale or bias would pass a comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

ATTENTION = ("eager", "sdpa")


@dataclass(frozen=True)
class Case:
    """A stock model and what to call it with. batch: the name of the inputs whose first dimension is the batch."""

    name: str
    library: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    attention: tuple[str, ...] = ATTENTION
    blocks: int = 2
    fixed: dict[str, Any] = field(default_factory=dict)

    def model(self, attention: str, seed: int = 0) -> nn.Module:
        """The model in inference mode with lively weights; attention is "eager" or "sdpa"."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build(attention).eval()
            enliven(model)
        return model

    def example(self, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.inputs(batch)

    def dynamic(self) -> dict[str, dict[int, str]]:
        return {name: {0: "batch"} for name in self.inputs(2)}


def enliven(model: nn.Module) -> None:
    """Draws every parameter anew: matrices so that signals keep their size, vectors away from 0 and from each other."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and min(parameter.shape[-2:]) > 1:
                fan_in = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]
                parameter.normal_(std=1.5 / fan_in**0.5)
            else:
                parameter.uniform_(0.4, 1.2)


def timm_model(name: str, attention: str, **config: Any) -> nn.Module:
    """A timm model whose attention is written out (eager) or fused (sdpa)."""
    import torchvision_shim  # noqa: F401

    timm = __import__("timm")
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(attention == "sdpa", attention == "sdpa")
    try:
        model: nn.Module = timm.create_model(name, num_classes=10, **config)
    finally:
        timm.layers.set_fused_attn(before)
    return model


def pictures(batch: int, side: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(batch, 3, side, side)}


def timm_case(name: str, side: int, blocks: int, attention: tuple[str, ...] = ATTENTION, **config: Any) -> Case:
    """A timm case; `side` in pixels."""

    def build(chosen: str) -> nn.Module:
        return timm_model(name, chosen, **config)

    return Case(name, "timm", build, functools.partial(pictures, side=side), attention, blocks)


def transformers_model(name: str, attention: str, **config: Any) -> nn.Module:
    import torchvision_shim  # noqa: F401

    transformers = __import__("transformers")
    kind = getattr(transformers, name)
    return kind._from_config(kind.config_class(**config), attn_implementation=attention)  # type: ignore[no-any-return]


def transformers_case(
    name: str, blocks: int, inputs: Callable[[int], dict[str, torch.Tensor]], **config: Any
) -> Case:
    def build(chosen: str) -> nn.Module:
        return transformers_model(name, chosen, **config)

    return Case(name, "transformers", build, inputs, ATTENTION, blocks)


def pixels(batch: int, side: int = 32) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, side, side)}


def masked_pixels(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32), "noise": torch.rand(batch, 16)}


def words(batch: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, 12, dtype=torch.int64)
    mask[-1, 9:] = 0
    return {"input_ids": torch.randint(0, 99, (batch, 12)), "attention_mask": mask}


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
}
PICTURE: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 8}

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        timm_case("vit_base_patch16_224", 48, 2, depth=2, embed_dim=32, num_heads=2, img_size=48),
        timm_case("deit_small_patch16_224", 48, 2, depth=2, embed_dim=32, num_heads=2, img_size=48),
        timm_case("deit3_small_patch16_224", 48, 2, depth=2, embed_dim=32, num_heads=2, img_size=48),
        timm_case("vit_small_patch14_dinov2", 42, 2, depth=2, embed_dim=32, num_heads=2, img_size=42),
        timm_case("beit_base_patch16_224", 48, 2, depth=2, embed_dim=32, num_heads=2, img_size=48),
        timm_case("eva02_tiny_patch14_224", 42, 2, depth=2, embed_dim=32, num_heads=2, img_size=42),
        timm_case(
            "swin_tiny_patch4_window7_224", 56, 4, depths=(2, 2), embed_dim=16, num_heads=(2, 4), img_size=56,
            window_size=7,
        ),
        timm_case("convit_tiny", 48, 3, ("eager",), depth=3, local_up_to_layer=1, embed_dim=16, num_heads=2, img_size=48),
        timm_case("cait_xxs24_224", 48, 3, depth=1, embed_dim=32, num_heads=2, img_size=48),
        timm_case("xcit_nano_12_p16_224", 48, 2, depth=1, cls_attn_layers=1, embed_dim=32, num_heads=2, img_size=48),
        timm_case("crossvit_tiny_240", 240, 4, ("eager",), depth=((1, 1, 0),), embed_dim=(16, 32), num_heads=(2, 2)),
        transformers_case("ViTModel", 2, pixels, **PICTURE),
        transformers_case("DeiTModel", 2, pixels, **PICTURE),
        transformers_case("Dinov2Model", 2, pixels, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
                          image_size=32, patch_size=8),
        transformers_case("BertModel", 2, words, **SMALL, vocab_size=99, max_position_embeddings=16),
        transformers_case("ViTMAEModel", 2, masked_pixels, **PICTURE),
        transformers_case("CLIPVisionModel", 2, pixels, **PICTURE),
    )
}  # fmt: skip
