"""1x1 convolutions as linear maps, and the layout between them: equal numbers, few permutes, and what is left alone."""

import pytest
import torch
from laws import near
from torch import nn
from torch.nn import functional as F

import compiled_attn as ca
from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.passes.base import verify
from compiled_attn.passes.channels_last import RULE, ChannelsLast
from compiled_attn.runtime.capture import capture

aten = torch.ops.aten
C = 12
SERVER = targets.load("zen4")


class Chain(nn.Module):
    """A residual block of two products, as a map and as tokens."""

    def __init__(self):
        super().__init__()
        self.wide, self.back = nn.Conv2d(C, 2 * C, 1), nn.Conv2d(2 * C, C, 1, bias=False)
        self.scale = nn.Parameter(torch.randn(C, 1, 1))

    def forward(self, x):
        y = x + self.scale * self.back(F.gelu(self.wide(x)))
        return y, y.flatten(2).transpose(1, 2)


class Gate(nn.Module):
    """Squeeze and excitation, and a gate by another product."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.other = nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1), nn.Conv2d(C, C, 1)

    def forward(self, x):
        x = x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return F.silu(x) * self.other(x)


class Normed(nn.Module):
    """Layer norm over channels by permutes, between products and a convolution with a border."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(C, C, 3, padding="same"), nn.LayerNorm(C)
        self.second, self.third = nn.Conv2d(C, 2 * C, 1, padding="valid"), nn.Linear(2 * C, C)

    def forward(self, x):
        y = self.norm(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x - self.third(self.second(y).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# model -> (linear maps, permutes that are left)
MODELS = {Chain: (2, 3), Gate: (3, 3), Normed: (2, 3)}
models = pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)


def flat(out):
    return out if isinstance(out, tuple) else (out,)


def program_of(model, **shapes):
    torch.manual_seed(0)
    return capture(model().eval() if isinstance(model, type) else model, (torch.randn(2, C, 9, 10),), {}, **shapes)


def count(program, target):
    return sum(n.target is target for n in program.graph.nodes)


@models
def test_products_become_linear_maps_with_the_same_numbers(model):
    program = program_of(model, dynamic_shapes={"x": {0: "batch", 2: "rows"}})
    notes = Notes()
    changed = ChannelsLast().run(program, SERVER, notes)
    verify(changed, program, after=RULE)
    linear, permutes = MODELS[model]
    assert count(changed, aten.linear.default) == linear
    assert count(changed, aten.permute.default) == permutes
    assert len(notes.of(RULE).done) == count(program, aten.conv2d.default) + count(
        program, aten.conv2d.padding
    ) - count(changed, aten.conv2d.padding)
    for batch, rows in ((2, 9), (3, 12)):
        x = torch.randn(batch, C, rows, 10)
        for found, wanted in zip(flat(changed(x)), flat(program(x)), strict=True):
            near(found, wanted, 1e-5)
            assert found.is_contiguous() or not wanted.is_contiguous()
    assert ChannelsLast().run(changed, SERVER, Notes()) is changed


class Computed(nn.Module):
    def forward(self, x):
        return F.conv2d(x, x.mean((0, 2, 3)).view(1, C, 1, 1))


@pytest.mark.parametrize(
    ("model", "because"),
    [
        (nn.Conv2d(C, C, 1, stride=2), "it has steps or a border"),
        (nn.Conv2d(C, C, 1, padding=1), "it has steps or a border"),
        (Computed(), "its weight or bias is computed"),
        (nn.Conv2d(C, C, 1, groups=C), None),
        (nn.Conv2d(C, C, 3), None),
    ],
    ids=("stride", "padding", "computed", "groups", "3x3"),
)
def test_other_convolutions_stay(model, because):
    program, notes = program_of(model.eval()), Notes()
    assert ChannelsLast().run(program, SERVER, notes) is program
    assert [m.because for m in notes.of(RULE).misses] == ([] if because is None else [because])


def test_other_targets_keep_their_convolutions():
    program = program_of(Chain)
    assert ChannelsLast().run(program, targets.load("a100"), Notes()) is program


def test_a_map_without_a_batch_keeps_its_convolution():
    program, notes = capture(nn.Conv2d(C, C, 1).eval(), (torch.randn(C, 9, 10),), {}), Notes()
    assert ChannelsLast().run(program, SERVER, notes) is program
    assert [m.because for m in notes.of(RULE).misses] == ["its map has no batch"]


class Permuted(nn.Module):
    """Layouts that the caller asked for: of the result, and of a copy."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x):
        y = F.relu(self.conv(x))
        return y.permute(0, 2, 3, 1), y.to(memory_format=torch.channels_last) + 1, y.permute(0, 2, 3, 1).contiguous()


def test_results_keep_their_numbers_and_dense_ones_stay_dense():
    program = program_of(Permuted)
    changed = ChannelsLast().run(program, SERVER, Notes())
    verify(changed, program, after=RULE)
    x = torch.randn(2, C, 9, 10)
    for found, wanted in zip(changed(x), program(x), strict=True):
        near(found, wanted, 1e-5)
        assert found.is_contiguous() or not wanted.is_contiguous()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 4, 4)
        self.blocks = nn.Sequential(Gate(), Normed(), Chain())

    def forward(self, x):
        return self.blocks(self.stem(x))


def test_a_network_compiles_and_equals_eager():
    torch.manual_seed(0)
    model, x = Network().eval(), torch.randn(2, 3, 48, 36)
    fast = ca.compile(model, "cpu", example_inputs=(x,), dynamic_shapes={"x": {0: "batch"}}, strict=True)
    x = torch.randn(5, 3, 48, 36)
    with torch.no_grad():
        for found, wanted in zip(fast(x), model(x), strict=True):
            near(found, wanted, 1e-5)
