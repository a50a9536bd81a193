"""Every paper as an artifact: in a file of its own, since one build a paper is what takes the time."""

from pathlib import Path

import pytest
import torch
from zoo_cases import dynamic, inputs, same, tiny

import compiled_attn as ca
from compiled_attn import zoo


@pytest.mark.parametrize("name", zoo.PAPERS)
def test_an_artifact_with_dynamic_batch_loads_and_equals_eager(name: str, tmp_path: Path) -> None:
    """Also what `compile` runs: both go through AOTInductor and the same checked call."""
    paper = zoo.PAPERS[name]
    model, args = tiny(paper), inputs(paper, 2)
    ca.export(model, args, path=tmp_path / "model.pt2", dynamic_shapes=dynamic(model, args))
    loaded = ca.load(tmp_path / "model.pt2")
    with torch.no_grad():
        for size in (1, 3):
            args = inputs(paper, size, seed=size)
            same(loaded(*args), model(*args), 2e-5)
