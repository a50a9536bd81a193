"""Stock models of timm and transformers in small random configurations, as users have them: no class changed.

Weights are drawn so that attention matters: with the libraries' own initial values the scores are nearly equal and
layer scale hides the blocks, so that a wrong scale or bias would pass a comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ATTENTION = ("eager", "sdpa")


@dataclass(frozen=True)
class Case:
    """A stock model and what to call it with.

    blocks: how many attentions it holds in the small configuration.  missed: for those that can not be raised, a part
    of each sentence, in order; `unraised` is how many attentions they stand for.
    """

    name: str
    library: str
    build: Callable[[str, bool], nn.Module]
    inputs: Callable[[int, bool], dict[str, torch.Tensor]]
    blocks: int
    attention: tuple[str, ...] = ATTENTION
    missed: tuple[str, ...] = ()
    unraised: int = 0

    def model(self, attention: str = "eager", *, full: bool = False, seed: int = 0) -> nn.Module:
        """The model in inference mode with lively weights; attention is "eager" or "sdpa"; full: the published size."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build(attention, full).eval()
            enliven(model)
        return model

    def example(self, batch: int = 2, *, full: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
        """Inputs by name."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.inputs(batch, full)

    def dynamic(self) -> dict[str, dict[int, str]]:
        """dynamic_shapes with the batch symbolic."""
        return {name: {0: "batch"} for name in self.example()}


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


def timm_case(
    name: str, side: int, blocks: int, *, full: int = 224, case: dict[str, Any] | None = None, **config: Any
) -> Case:
    """A timm case of small `config`; side, full: the pictures' side in pixels, small and published."""

    def build(attention: str, whole: bool) -> nn.Module:
        return timm_model(name, attention, **({"img_size": full} if whole else {"img_size": side, **config}))

    def inputs(batch: int, whole: bool) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(batch, 3, *[full if whole else side] * 2)}

    return Case(name, "timm", build, inputs, blocks, **(case or {}))


def transformers_model(name: str, attention: str, **config: Any) -> nn.Module:
    import torchvision_shim  # noqa: F401

    transformers = __import__("transformers")
    kind = getattr(transformers, name)
    model: nn.Module = kind._from_config(kind.config_class(**config), attn_implementation=attention)
    return model


def transformers_case(
    name: str, blocks: int, inputs: Callable[[int, bool], dict[str, torch.Tensor]], **config: Any
) -> Case:
    def build(attention: str, whole: bool) -> nn.Module:
        return transformers_model(name, attention, **({} if whole else config))

    return Case(name, "transformers", build, inputs, blocks)


def pixels(batch: int, full: bool) -> dict[str, torch.Tensor]:
    side = 224 if full else 32
    return {"pixel_values": torch.randn(batch, 3, side, side)}


def noisy_pixels(batch: int, full: bool) -> dict[str, torch.Tensor]:
    """Pictures and the noise by which ViTMAE chooses what to hide, which would be drawn anew otherwise."""
    return {**pixels(batch, full), "noise": torch.rand(batch, 196 if full else 16)}


def words(batch: int, full: bool) -> dict[str, torch.Tensor]:
    """Token numbers and a padding mask."""
    length = 64 if full else 12
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - 3 :] = 0
    return {"input_ids": torch.randint(0, 99, (batch, length)), "attention_mask": mask}


ONE: dict[str, Any] = {"depth": 1, "embed_dim": 32, "num_heads": 2}
TWO: dict[str, Any] = {**ONE, "depth": 2}
WIDTH: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2}
SMALL: dict[str, Any] = {**WIDTH, "num_hidden_layers": 2, "intermediate_size": 64}
PICTURE: dict[str, Any] = {**SMALL, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}

TALKING = {"missed": ("stands between the scores",), "unraised": 1}
GATED = {
    "missed": ("stands between softmax and the product with v", "no product of queries and keys lies above"),
    "unraised": 1,
    "attention": ("eager",),
}

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        timm_case("vit_base_patch16_224", 48, 2, **TWO),
        timm_case("deit_small_patch16_224", 48, 1, **ONE),
        timm_case("deit3_small_patch16_224", 48, 1, **ONE),
        timm_case("vit_small_patch14_dinov2", 42, 1, **ONE),
        timm_case("beit_base_patch16_224", 48, 1, **ONE),
        timm_case("eva02_tiny_patch14_224", 42, 1, **ONE),
        timm_case("swin_tiny_patch4_window7_224", 56, 2, depths=(2,), embed_dim=16, num_heads=(2,)),
        timm_case("convit_tiny", 48, 2, case=GATED, depth=2, local_up_to_layer=1, embed_dim=16, num_heads=2),
        timm_case("cait_xxs24_224", 48, 3, case=TALKING, **ONE),
        timm_case("xcit_nano_12_p16_224", 48, 2, cls_attn_layers=1, **ONE),
        timm_case(
            "crossvit_tiny_240", 240, 4, full=240, case={"attention": ("eager",)},
            depth=((1, 1, 0),), embed_dim=(16, 32), num_heads=(2, 2),
        ),
        transformers_case("ViTModel", 1, pixels, **PICTURE),
        transformers_case("DeiTModel", 1, pixels, **PICTURE),
        transformers_case("Dinov2Model", 1, pixels, **WIDTH, num_hidden_layers=1, image_size=32, patch_size=8),
        transformers_case("BertModel", 2, words, **SMALL, vocab_size=99, max_position_embeddings=16),
        transformers_case("ViTMAEModel", 1, noisy_pixels, **PICTURE),
        transformers_case("CLIPVisionModel", 1, pixels, **PICTURE),
    )
}  # fmt: skip
