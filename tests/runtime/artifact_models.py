"""The two small models whose artifacts the tests of this folder share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compiled_attn.runtime.artifact import Artifact


class Rich(nn.Module):
    """Every kind of leaf: nested inputs, bfloat16, bool, state, a fixed flag; tensors, a size and None out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)

    def forward(self, x, extra, pair, cache, *, flag=3):
        """x [batch, 5], mask bool [batch, 3], half bfloat16 [batch, 2], pair [2*batch, 4], cache [2, 3] (state)."""
        cache.add_(x.sum())
        rows = (extra["half"] * 2, pair.sum(1), extra["mask"].to(torch.int64).sum())
        return {"y": torch.relu(self.linear(x)) * flag, "none": None, "count": x.shape[0] * 2, "rows": rows}


class Fixed(nn.Module):
    """A static input in channels-last memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 6)

    def forward(self, x):
        """x [2, 3, 4, 5] -> [2, 6]."""
        return self.linear(x.mean((2, 3)))


@dataclass(frozen=True)
class Built:
    """A model and its artifact."""

    model: nn.Module
    artifact: Artifact = field(repr=False)
    data: bytes = field(repr=False)

    @property
    def path(self) -> Path:
        return self.artifact.path


def rich_inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    extra = {"mask": torch.rand(batch, 3) > 0.5, "half": torch.randn(batch, 2).bfloat16()}
    return (torch.randn(batch, 5), extra, torch.randn(2 * batch, 4), torch.randn(2, 3)), {"flag": 3}
