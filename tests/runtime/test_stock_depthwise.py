"""Stock convolutional models compiled whole: eager's numbers, a template's call for each chain, no map turned."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from gaps import gap
from generated import conversions
from laws import near
from torch import nn

import compiled_attn as ca
from compiled_attn.ops import depthwise_block
from compiled_attn.runtime.build import Settings, prepare
from compiled_attn.runtime.export import export_build

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.depthwise_table import SIDE, TRANSFORMERS, build

# Model -> chains that the generated code holds as a template's call.
CHAINS = {
    "convnext_tiny": 18,
    "convnextv2_tiny": 18,
    "focalnet_tiny_srf": 24,
    "mobilenetv3_large_100": 15,
    "efficientnet_b0": 16,
    "mobileone_s1": 21,
    "repvit_m1": 26,
    "inception_next_tiny": 54,
    "fastvit_t8": 25,
    "poolformerv2_s12": 0,  # averages over windows, which stay Inductor's
    "tf_efficientnet_b0": 16,
    "mambaout_tiny": 18,
    "ConvNextV2Model": 18,
    "FocalNetModel": 24,
}


def check(model: nn.Module, argument: str, chains: int, path: Path, side: int = SIDE) -> None:
    """Compiles with a symbolic batch, compares at another batch, and reads the code: only the picture is turned."""
    shapes = {argument: {0: "batch"}}
    built = prepare(model, (torch.randn(2, 3, side, side),), {}, Settings.of("cpu", dynamic_shapes=shapes, strict=True))
    export_build(built, path)
    x = torch.randn(3, 3, side, side)
    with torch.no_grad():
        found, wanted = (first(one(x)) for one in (ca.load(path), model))
    near(found, wanted, 2e-5)
    fused = [n for n in built.program.graph.nodes if n.target is depthwise_block.overload]
    assert built.calls.get("cpp_depthwise", 0) == len(fused) == chains
    assert sum(conversions(path).values()) <= 1, conversions(path)


def first(out: object) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else next(iter(out.values()))  # type: ignore[attr-defined]


@pytest.mark.deep
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=gap("first-pool-turns")) if n.startswith("poolformer") else n for n in CHAINS]
)
def test_a_stock_model_compiles_to_a_template_call_for_each_chain_and_turns_no_map(name, tmp_path):
    check(build(name), "pixel_values" if name in TRANSFORMERS else "x", CHAINS[name], tmp_path / "model.pt2")
