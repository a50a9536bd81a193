"""Two small artifacts and the C++ runner, each built once for all tests of this folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compiled_attn.runtime import runner as cpp
from compiled_attn.runtime.artifact import Artifact
from compiled_attn.runtime.export import export


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


def _built(model: nn.Module, args: Any, kwargs: Any, path: Path, dynamic_shapes: Any) -> Built:
    torch.manual_seed(0)
    artifact = export(model, args, kwargs, path=path, target="cpu", dynamic_shapes=dynamic_shapes)
    return Built(model, artifact, path.read_bytes())


@pytest.fixture(scope="session")
def rich(tmp_path_factory):
    """The artifact of Rich, with batch from 1 to 16."""
    batch = torch.export.Dim("batch", min=1, max=16)
    dims = {"x": {0: batch}, "extra": {"mask": {0: batch}, "half": {0: batch}}, "pair": {0: 2 * batch}}
    dims |= {"cache": None, "flag": None}
    return _built(Rich().eval(), *rich_inputs(4), tmp_path_factory.mktemp("rich") / "rich.pt2", dims)


@pytest.fixture(scope="session")
def fixed(tmp_path_factory):
    """The artifact of Fixed."""
    example = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return _built(Fixed().eval(), (example,), {}, tmp_path_factory.mktemp("fixed") / "fixed.pt2", None)


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    """The C++ runner's binary; `check` lies beside it."""
    return cpp.build(tmp_path_factory.mktemp("runner"))
