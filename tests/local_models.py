"""Stock models whose attention is local, or might be taken for it, in small random configurations and as published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from models import Case, enliven, timm_case, timm_model, transformers_case, transformers_model
from torch import nn


@dataclass(frozen=True)
class LocalCase:
    """A stock model, and what becomes of the attentions of its small configuration.

    raised: those that become local_attention or neighborhood_apply.  plain: those that see everything.
    missed: how many stay with a sentence.  because: part of what is said of plain or missed ones.
    """

    case: Case
    raised: int
    plain: int = 0
    missed: int = 0
    because: str = ""
    attention: str = "sdpa"

    @property
    def name(self) -> str:
        return self.case.name

    def model(self, *, full: bool = False) -> nn.Module:
        """In inference mode, with lively weights; convolutions keep their signals' size."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.case.build(self.attention, full).eval()
            enliven(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 4:
                        parameter.normal_(std=1.0 / parameter[0].numel() ** 0.5)
        return model


def words(length: int) -> Callable[[int, bool], dict[str, torch.Tensor]]:
    """Token numbers without padding: `length` of them, or 512."""
    return lambda batch, full: {"input_ids": torch.randint(0, 99, (batch, 512 if full else length))}


def pictures(batch: int, full: bool) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, *[224 if full else 64] * 2)}


def any_size(name: str, side: int, full: int = 224, **config: Any) -> Case:
    """A timm case whose model is not told the size of its pictures."""
    case = timm_case(name, side, 0, full=full)
    return replace(case, build=lambda attention, whole: timm_model(name, attention, **({} if whole else config)))


def text_case(name: str, **small: Any) -> Case:
    """A language model. Published ones fill memory: instead of them a wider one of two layers with a window of 128."""
    large = {**small, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
    large["sliding_window"] = 128

    def build(attention: str, whole: bool) -> nn.Module:
        return transformers_model(name, attention, **(large if whole else small))

    return replace(transformers_case(name, 0, words(24), **small), build=build)


ONE: dict[str, Any] = {"depths": (2,), "embed_dim": 16, "num_heads": (2,)}
TWO: dict[str, Any] = {"depths": (2, 1), "embed_dim": 16, "num_heads": (2, 2)}
DAVIT: dict[str, Any] = {"depths": (1,), "embed_dims": (16,), "num_heads": (2,)}
CONVIT: dict[str, Any] = {"depth": 2, "local_up_to_layer": 1, "embed_dim": 16, "num_heads": 2}
STEMS: dict[str, Any] = {"stem_width": (8, 16), "embed_dim": (16, 32, 32, 64), "depths": (1, 1, 1, 1)}
SWIN: dict[str, Any] = {
    "image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2], "window_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99, "sliding_window": 6, "use_cache": False,
}  # fmt: skip
GEMMA = {**TEXT, "layer_types": ["sliding_attention", "full_attention"]}
MAP = "every query sees the whole map of"

LOCAL_CASES: dict[str, LocalCase] = {
    case.name: case
    for case in (
        LocalCase(timm_case("swin_tiny_patch4_window7_224", 56, 0, **TWO), 2, plain=1, because=f"{MAP} 7 x 7"),
        LocalCase(timm_case("swin_s3_tiny_224", 112, 0, **ONE, window_size=((7, 14),)), 2),
        LocalCase(timm_case("swinv2_tiny_window8_256", 64, 0, full=256, **ONE), 2),
        LocalCase(timm_case("swinv2_cr_tiny_224", 64, 0, **ONE, window_size=4), 2),
        LocalCase(timm_case("maxvit_tiny_tf_224", 64, 0, depths=(1,), embed_dim=(32,), stem_width=16), 2),
        LocalCase(timm_case("coatnet_0_rw_224", 64, 0, **STEMS), 0, plain=2, because=f"{MAP} "),
        LocalCase(any_size("halonet26t", 256, 256), 3),
        LocalCase(any_size("sehalonet33ts", 256, 256), 4),
        LocalCase(any_size("davit_tiny", 64, **DAVIT), 1, plain=1, because="over channels"),
        LocalCase(timm_case("volo_d1_224", 64, 0), 4, plain=16),
        LocalCase(timm_case("tnt_s_patch16_224", 64, 0, depth=1), 0, plain=2),
        LocalCase(timm_case("convit_tiny", 48, 0, **CONVIT), 0, plain=2),
        LocalCase(transformers_case("SwinModel", 0, pictures, **SWIN), 2, plain=1),
        LocalCase(transformers_case("Swinv2Model", 0, pictures, **SWIN), 2, plain=1, attention="eager"),
        LocalCase(text_case("MistralModel", **TEXT), 2),
        LocalCase(text_case("Gemma3TextModel", **GEMMA), 1, plain=1),
        LocalCase(text_case("Gemma2Model", **GEMMA), 1, plain=1, attention="eager"),
    )
}  # fmt: skip
