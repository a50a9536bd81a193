"""Lets torchvision be imported beside a torch that it was not built for: it registers rules for two ops of its own.

Import this module before timm or transformers' image models.
"""

from __future__ import annotations

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def install() -> torch.library.Library | None:
    """Defines torchvision's two ops where its compiled part can not; None where they are there already."""
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    return library


LIBRARY = install()
