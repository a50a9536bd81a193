"""The template of depthwise blocks inside Inductor: in the generated code, right in numbers, symbolic, refusals."""

from __future__ import annotations

import laws
import pytest
import torch
from depthwise_strategies import CASES
from torch import nn

from compiled_attn.ir import _torch, targets
from compiled_attn.ops import depthwise_block
from compiled_attn.ops.templates import cpp_depthwise
from compiled_attn.ops.templates.base import templates_in
from compiled_attn.runtime import lower


class Blocks(nn.Module):
    """Blocks on maps in both layouts, with pointwise work in front of each, beside it and behind."""

    def __init__(self, channels: int = 21) -> None:
        super().__init__()
        self.channels = channels
        self.mix = nn.Conv2d(channels, channels, 1)
        self.weights = nn.ParameterList([torch.randn(k, k, channels) / k for k in (3, 5, 3)])
        self.bias = nn.Parameter(torch.randn(channels))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        op = torch.ops.compiled_attn.depthwise_block
        first, second, third = self.weights
        a = op(x.sin(), first, self.bias, None, x, padding=[1, 1], activation="silu")
        b = op(self.mix(a), second, None, a * 2, None, self.bias, None, padding=[4, 4], dilation=[2, 2], norm_eps=1e-5)
        c = op(b, third, stride=[2, 2], activation="relu6")
        tokens = b.flatten(2).transpose(1, 2) + 1
        return (a * b).relu(), c + c.mean((2, 3), keepdim=True), tokens


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.deep)], ids=str)
def test_inductors_code_holds_the_template_and_equals_eager(dtype):
    lower.register()
    torch.manual_seed(0)
    model = Blocks().to(dtype).eval()
    with torch.no_grad():
        compiled, code = _torch.compile_and_read(model, torch.randn(2, 21, 13, 18, dtype=dtype))
        assert templates_in(code) == {"cpp_depthwise"}
        assert code.count("compiled_attn_cpp::depthwise") >= 3
        for sizes in ((2, 13, 18), (3, 24, 20)):
            x = torch.randn(sizes[0], 21, *sizes[1:], dtype=dtype)
            for layout in (torch.contiguous_format, torch.channels_last):
                given = x.to(memory_format=layout)
                for found, wanted in zip(compiled(given), model(given), strict=True):
                    laws.near(found, wanted, {torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype])


@pytest.mark.parametrize(
    ("changed", "because"),
    [
        ({"x": torch.zeros(2, 5, 7, 6).half()}, "its elements are torch.float16"),
        ({"weight": torch.zeros(1, 129, 5)}, "its kernel is 1 x 129, beyond 127"),
    ],
)
def test_accepts_says_what_it_does_not_cover(changed, because):
    x, weight, *rest = CASES["plain"].tensors()
    args = (changed.get("x", x), changed.get("weight", weight), *rest)
    found = cpp_depthwise.accepts(args, {}, targets.load("cpu"))
    assert found is not None and found.startswith(because)
    assert depthwise_block.name == cpp_depthwise.TEMPLATE.op
    assert cpp_depthwise.accepts(args, {}, targets.load("a100")) == "target a100 runs no C++"
