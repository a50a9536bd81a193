"""The record of a paper: what it is, its variants as rows of Config, and the figures that it and its code give."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Published:
    """One row of a paper's table.

    parameters: exact count, measured on the reference code; gmacs: 1e9 multiply-accumulates of one picture, measured;
    stated_gmacs: the same as the paper prints it; top1: ImageNet-1k accuracy in per cent; images_per_second: as stated,
    on the device that the paper names.
    """

    parameters: int
    gmacs: float | None = None
    stated_gmacs: float | None = None
    top1: float | None = None
    images_per_second: int | None = None


def pictures(config: Any, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random pictures [B, in_chans, img_size, img_size]: what most papers' networks take."""
    return (torch.randn((batch, config.in_chans, config.img_size, config.img_size), generator=generator),)


@dataclass(frozen=True)
class Paper:
    """A paper of the zoo.

    model builds the network of one Config. published holds the table's rows by variant. keys says what the checkpoints
    are called and hold. weights names, for the variants that this package carries weights for, the file under
    zoo/weights/. inputs draws arguments for a Config, each with the batch as its first dimension. idle: how the keys of
    parameters end that no output depends on, by the paper's own equations, each with the reason.
    """

    title: str
    year: int
    link: str
    reference: str
    model: Callable[[Any], nn.Module]
    variants: Mapping[str, Any]
    tiny: Any
    published: Mapping[str, Published]
    keys: str
    weights: Mapping[str, str] = field(default_factory=dict)
    inputs: Callable[[Any, int, torch.Generator], tuple[Tensor, ...]] = pictures
    idle: Mapping[str, str] = field(default_factory=dict)
