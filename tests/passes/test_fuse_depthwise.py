"""Depthwise chains as people write them become one op; what must stay stays and says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from copies import renamed
from laws import near
from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.verify import verify
from compiled_attn.ops import depthwise_block
from compiled_attn.passes.base import difference
from compiled_attn.passes.fold_batch_norm import FoldBatchNorm
from compiled_attn.passes.fuse_depthwise import FuseDepthwise
from compiled_attn.runtime.capture import capture

C = 12
aten = torch.ops.aten


def depthwise(kernel, **options):
    return nn.Conv2d(C, C, kernel, groups=C, **options)


def norm():
    made = nn.BatchNorm2d(C)
    for tensor in (made.weight.data, made.running_var):
        tensor.uniform_(0.5, 1.5)
    for tensor in (made.bias.data, made.running_mean):
        tensor.normal_()
    return made


class ConvNext(nn.Module):
    """The norm in channels last, the rest of the block behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.mlp = depthwise(7, padding=3), nn.LayerNorm(C, eps=1e-6), nn.Linear(C, C)

    def forward(self, x):
        return x + self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class LayerNorm2d(nn.Module):
    """There and back."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = depthwise((5, 3), padding=(2, 1), bias=False), nn.LayerNorm(C, elementwise_affine=False)

    def forward(self, x):
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).relu()


class Mobile(nn.Module):
    """Batch norm, activation, and a gate that needs the whole map."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = depthwise(5, padding=2, stride=2, bias=False), norm()

    def forward(self, x):
        x = F.hardswish(self.norm(self.conv(x)))
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Branches(nn.Module):
    """Structural reparameterisation before it is done: two kernels and the map itself, each with its norm."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = depthwise(3, padding=1, bias=False), depthwise(1, bias=False)
        self.norms = nn.ModuleList([norm() for _ in range(4)])
        self.scale = nn.Parameter(torch.rand(C, 1, 1))

    def forward(self, x):
        a, b, c, last = self.norms
        total = last(a(self.wide(x)) + b(self.narrow(x)) + c(x))
        return F.gelu((total - x) * self.scale)


class LargeKernelAttention(nn.Module):
    """Two kernels in a row, the second dilated, and the map that they weigh; then a residual."""

    def __init__(self):
        super().__init__()
        self.near, self.far = depthwise(5, padding=2), depthwise(7, padding=9, dilation=3)

    def forward(self, x):
        u = x.sin()
        return self.far(self.near(u)) * u + x


class Tokens(nn.Module):
    """Tokens that become a map for the convolution, and tokens again by a view."""

    def __init__(self):
        super().__init__()
        self.conv = depthwise(3, padding="same")

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        back = tokens.transpose(1, 2).reshape(x.shape).contiguous()
        y = F.silu(self.conv(back))
        return y, y.view(*y.shape[:2], -1).transpose(1, 2) + tokens, y.permute(0, 2, 3, 1).contiguous()


class Causal(nn.Module):
    """Sequences: a convolution whose result is cut, and one that has zeros put ahead, with the norm of its tokens."""

    def __init__(self):
        super().__init__()
        self.cut, self.ahead = (nn.Conv1d(C, C, k, groups=C, padding=p) for k, p in ((4, 3), (3, 0)))
        self.norm = nn.LayerNorm(C)

    def forward(self, x):
        line = x.flatten(2)
        a = F.silu(self.cut(line)[..., : line.shape[2]])
        return self.norm(self.ahead(F.pad(a, (2, 0))).transpose(1, 2)), a


class Several(nn.Module):
    """Two results of every channel, of a map that has zeros put behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, 2 * C, 3, stride=2, groups=C, bias=False), nn.BatchNorm2d(2 * C)
        self.norm.running_mean.normal_()

    def forward(self, x):
        return F.gelu(self.norm(self.conv(F.pad(x, (0, 1, 0, 1)))))


class Uneven(nn.Module):
    """TensorFlow's padding at a stride, with a kernel of its own for each axis, and "same" for an even kernel."""

    def __init__(self):
        super().__init__()
        self.wide, self.even = depthwise((5, 3), stride=(2, 1)), depthwise((4, 2), padding="same")
        self.last, self.norm = depthwise(3, stride=2, padding=1, bias=False), norm()

    def forward(self, x):
        y = self.even(self.wide(F.pad(x, (0, 2, 1, 2))))
        return F.gelu(self.norm(self.last(F.pad(y, (1, 0)))))


MODELS = {
    ConvNext: ["7x7, layer norm"],
    LayerNorm2d: ["5x3, layer norm"],
    Mobile: ["5x5, hardswish"],
    Branches: ["3x3, of 2 convolutions, gelu"],
    LargeKernelAttention: ["5x5", "7x7 dilated 3x3, gate, residual"],
    Tokens: ["3x3, silu"],
    Causal: ["1x4, silu", "1x3, layer norm"],
    Several: ["3x3, 2 results of every channel, gelu"],
    Uneven: ["5x3", "4x2", "3x3, gelu"],
}
models = pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)


def run(program):
    notes = Notes()
    for one in (FoldBatchNorm(), FuseDepthwise()):
        program = one.run(program, targets.load("cpu"), notes)
    return program, notes.of("depthwise_block")


def program_of(model, x, **shapes):
    torch.manual_seed(0)
    return capture(model().eval() if isinstance(model, type) else model.eval(), (x,), {}, **shapes)


def blocks(program):
    return [n for n in program.graph.nodes if n.target is depthwise_block.overload]


@models
def test_a_chain_becomes_one_op_with_the_same_numbers(model):
    program = program_of(model, torch.randn(2, C, 9, 10), dynamic_shapes={"x": {0: "batch", 2: "rows"}})
    fused, notes = run(program)
    verify(fused, program, after="fuse-depthwise")
    assert [n.what for n in notes.done] == MODELS[model]
    assert not [n for n in fused.graph.nodes if n.target in (aten.conv2d.default, aten.conv1d.default)]
    assert not [n for n in fused.graph.nodes if n.target in (aten.pad.default, aten.constant_pad_nd.default)]
    for size in ((2, 9, 10), (3, 12, 10)):
        x = torch.randn(size[0], C, *size[1:])
        for found, wanted in zip(flat(fused(x)), flat(program(x)), strict=True):
            near(found, wanted, 1e-5)
            assert found.is_contiguous() or not wanted.is_contiguous()


def flat(out):
    return out if isinstance(out, tuple) else (out,)


@models
def test_names_and_modules_do_not_matter_and_a_second_run_changes_nothing(model):
    program = program_of(model, torch.randn(2, C, 9, 10))
    other = renamed(program)
    fused, notes = run(other)
    assert [n.what for n in notes.done] == MODELS[model]
    assert difference(other, fused) < 1e-5
    again, _ = run(fused)
    assert again is fused
    assert str(run(other)[0]) == str(fused)


class Wrong(nn.Module):
    """A chain that is wrong in one thing."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        multiplier, groups = {"multiplier": (2, C), "groups": (1, C // 2)}.get(how, (1, C))
        self.conv = nn.Conv2d(C, C * multiplier, 3, groups=groups, padding=1)
        self.norm = nn.LayerNorm([9, C] if how == "norm over columns too" else C)

    def forward(self, x):
        if self.how == "computed weight":
            return F.conv2d(x, self.conv.weight * x.mean(), groups=C, padding=1)
        y = self.conv(F.pad(x, (4, 0, 4, 0)) if self.how == "zeros at a corner" else x)
        if self.how == "norm over columns too":
            return self.norm(y.permute(0, 2, 3, 1))
        if self.how == "norm over rows":
            return F.layer_norm(y.permute(0, 1, 3, 2), [9])
        if self.how == "read twice":
            return y.relu() + y
        if self.how == "other gate":
            return y * x[:, :1]
        return y.clamp(0, 5) if self.how == "clamp" else y


@pytest.mark.parametrize(
    ("how", "fused", "because"),
    [
        ("computed weight", [], "its weight or bias is computed (mul)"),
        ("multiplier", ["3x3, 2 results of every channel"], None),
        ("zeros at a corner", ["3x3"], None),
        ("groups", [], None),
        ("norm over columns too", ["3x3"], None),
        ("norm over rows", ["3x3"], None),
        ("read twice", ["3x3"], None),
        ("other gate", ["3x3"], None),
        ("clamp", ["3x3"], None),
    ],
)
def test_what_the_op_does_not_say_is_left_outside(how, fused, because):
    program = program_of(Wrong(how), torch.randn(2, C, 9, 9))
    found, notes = run(program)
    assert [n.what for n in notes.done] == fused
    assert [m.because for m in notes.misses] == ([because] if because else [])
    assert difference(program, found) < 1e-5


def test_sums_of_kernels_are_left_alone_where_rounding_would_show():
    program = program_of(Branches().bfloat16(), torch.randn(2, C, 9, 9).bfloat16())
    fused, notes = run(program)
    assert [n.what for n in notes.done] == ["3x3, residual", "1x1"]
    assert difference(program, fused) < 3e-2


def test_a_small_kernel_on_a_large_map_is_left_to_onednn_unless_something_is_saved():
    x = torch.randn(1, C, 200, 200)
    for model, because in ((depthwise(3, padding=1), True), (depthwise(5), False), (Branches(), False)):
        program = program_of(nn.Sequential(model), x)
        notes = run(program)[1]
        assert [m.because for m in notes.misses] == because * [
            "oneDNN is faster at 3x3 on maps of 3.8 MB a picture, in and out"
        ]


class Pool(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x, F.avg_pool2d(x, 2, 2)


def test_an_average_whose_windows_move_by_one_is_a_miss():
    program = program_of(Pool(), torch.randn(1, C, 9, 9))
    found, notes = run(program)
    assert found is program
    assert [m.because for m in notes.misses] == [
        "Inductor's one pass over an average and what surrounds it was measured 1.2 to 1.5 times as fast"
    ]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 4, 4)
        self.blocks = nn.Sequential(ConvNext(), LargeKernelAttention(), Branches(), Mobile())
        self.causal, self.several, self.uneven = Causal(), Several(), Uneven()

    def forward(self, x):
        y = self.blocks(self.stem(x))
        return y, *self.causal(y), self.several(y), self.uneven(y)


def test_a_network_compiles_with_the_template_and_equals_eager():
    import compiled_attn as ca

    torch.manual_seed(0)
    model = Network().eval()
    fast = ca.compile(
        model, "cpu", example_inputs=(torch.randn(2, 3, 48, 36),), dynamic_shapes={"x": {0: "batch"}}, strict=True
    )
    with torch.no_grad():
        for batch in (2, 5):
            x = torch.randn(batch, 3, 48, 36)
            for found, wanted in zip(fast(x), model(x), strict=True):
                near(found, wanted, 1e-5)
    assert fast.builds[0].calls["cpp_depthwise"] == 11
    assert "depthwise_block" in str(fast.explain())


@models
def test_a_gpu_is_given_the_same_blocks(model):
    program = program_of(model, torch.randn(2, C, 9, 10))
    notes = Notes()
    for one in (FoldBatchNorm(), FuseDepthwise()):
        program = one.run(program, targets.load("a100"), notes)
    assert [n.what for n in notes.of("depthwise_block").done] == MODELS[model]


def test_large_maps_go_to_the_template_on_a_gpu_and_to_onednn_on_a_cpu():
    model, x = depthwise(3, padding="same").eval(), torch.randn(1, C, 400, 400)
    kept = {name: FuseDepthwise().run(program_of(model, x), targets.load(name), Notes()) for name in ("cpu", "a100")}
    assert [len(blocks(kept[name])) for name in ("cpu", "a100")] == [0, 1]


def test_a_target_that_no_template_serves_keeps_its_convolutions():
    program, notes = program_of(ConvNext, torch.randn(2, C, 9, 10)), Notes()
    assert FuseDepthwise().run(program, targets.load("t4"), notes) is program
    (miss,) = notes.of("depthwise_block").misses
    assert "sm_75" in miss.because
