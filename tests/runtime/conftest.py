"""Two small artifacts and the C++ runner, each built once for all tests of this folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_models import Built, Fixed, Rich, rich_inputs
from torch import nn

from compiled_attn.runtime import runner as cpp
from compiled_attn.runtime.export import export


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
