"""gate-weights: what multiplies a map channel by channel goes into the weights behind it, with the same numbers."""

import copy

import pytest
import torch
from torch import nn

import compiled_attn as ca
from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.ops.linear import packed_linear
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.channels_last import ChannelsLast
from compiled_attn.passes.fold_constants import FoldConstants
from compiled_attn.passes.gate_weights import GateWeights
from compiled_attn.passes.pack_linear import PackLinear, apply_linear_choices
from compiled_attn.runtime.capture import capture

aten = torch.ops.aten
TARGET = targets.load("zen5")  # where our product is ahead
PASSES = (ChannelsLast(), GateWeights(), FoldConstants(), PackLinear())


class Squeezed(nn.Module):
    """Squeeze and excitation on a map of 24 channels, and a 1x1 convolution of it."""

    def __init__(self, outer: int = 8, twice: bool = False) -> None:
        super().__init__()
        self.down, self.up, self.conv = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1), nn.Conv2d(24, outer, 1)
        self.twice = twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)
        x = x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.conv(x).relu() + (x.sum() if self.twice else 0.0)


class Response(nn.Module):
    """Global response norm of a map in channels last, `fused` as timm writes it, and a linear map of it."""

    def __init__(self, fused: bool, bias: bool = True) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(24))
        self.linear, self.fused = nn.Linear(24, 8, bias=bias), fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)
        size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        share = size / (size.mean(-1, keepdim=True) + 1e-6)
        if self.fused:
            return self.linear(x + torch.addcmul(self.beta.view(1, 1, 1, -1), self.gamma.view(1, 1, 1, -1), x * share))
        return self.linear((self.gamma * share + 1) * x + self.beta)


class Summed(nn.Module):
    """A map plus its product with a gate, times another; `late`: and then a shift, which else the other gate scales."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.linear, self.shift, self.late = nn.Linear(24, 8), nn.Parameter(torch.randn(24)), late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)
        first, second = x.mean((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
        if self.late:
            return self.linear((x + first * x) * second + self.shift)
        return self.linear((x + (first * x + self.shift)) * second)


MAP, LAST = torch.randn(1, 24, 6, 7), torch.randn(1, 6, 7, 24)


def run(model: nn.Module, x: torch.Tensor, **options):
    torch.manual_seed(0)
    program, notes = capture(model.eval(), (x,), **options), Notes()
    changed, _ = run_passes(program, PASSES, TARGET, notes, compare=True)
    return program, changed, notes.of("gate-weights")


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Squeezed(), MAP),
        (Response(fused=False), LAST),
        (Response(fused=True, bias=False), LAST),
        (Summed(late=True), LAST),
    ],
    ids=["squeeze and excitation", "response norm", "response norm of timm", "sums and products"],
)
def test_gates_go_into_the_weights_and_the_numbers_stay(model, x):
    exact = copy.deepcopy(model).double()
    assert not run(copy.deepcopy(exact), x.double())[2].done  # no packed product of float64
    _, changed, notes = run(model, x)
    assert [n.what for n in notes.done] == ["factors of 24 channels"]
    lowered = apply_linear_choices(changed, TARGET)
    packed = [n for n in lowered.graph.nodes if n.target is packed_linear.overload]
    assert any(n.args[1].target is aten.mul.Tensor for n in packed)
    for inputs in (x, torch.randn_like(x)):
        wanted = exact(inputs.double())
        for found in (changed(inputs), lowered(inputs)):
            torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize(
    ("model", "x", "options", "because"),
    [
        (Summed(late=False), LAST, {}, "what is added to its map is computed"),
        (Squeezed(outer=32), MAP, {}, "its map has 42 rows, its weight 32: the map is written faster"),
        (Squeezed(twice=True), MAP, {}, None),
        (Squeezed(), MAP, {"dynamic_shapes": {"x": {2: "rows"}}}, "its rows are symbolic"),
        (Squeezed(), MAP, {"dynamic_shapes": {"x": {0: "batch"}}}, None),
    ],
    ids=["a shift that a gate scales", "few rows", "the map is read twice", "symbolic rows", "a batch"],
)
def test_other_gates_stay(model, x, options, because):
    program, changed, notes = run(model, x, **options)
    assert not notes.done and [m.because for m in notes.misses] == ([because] if because else [])
    x = torch.cat([x, -x, x * 2]) if because is None and options else -x
    torch.testing.assert_close(changed(x), program(x), rtol=1e-5, atol=1e-5)


def test_a_gated_network_compiles_and_equals_eager():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), Squeezed()).eval().requires_grad_(False)
    x = torch.randn(1, 3, 16, 16)
    fast = ca.compile(model, example_inputs=(x,), strict=True)
    for inputs in (x, torch.randn(1, 3, 16, 16)):
        torch.testing.assert_close(fast(inputs), model(inputs), rtol=1e-5, atol=1e-5)
    if targets.detect().isa == "avx512":
        assert "gate-weights" in str(fast.explain())
