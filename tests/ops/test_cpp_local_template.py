"""The template of local attention inside Inductor: in the generated code, right in numbers, in place, symbolic."""

from __future__ import annotations

import laws
import pytest
import torch
from torch import nn

from compiled_attn.ir import _torch, targets
from compiled_attn.ir.notes import Notes
from compiled_attn.ops import local_attention
from compiled_attn.ops.templates import cpp_local_attention
from compiled_attn.ops.templates.base import templates_in
from compiled_attn.runtime import lower
from compiled_attn.runtime.capture import capture

PATTERNS = {
    "neighborhood": {"window": [7, 7]},
    "dilated": {"window": [3, 3], "dilation": [3, 2]},
    "shifted": {"window": [4, 4], "stride": [4, 4], "shift": [2, 2], "border": "mask"},
    "halo": {"window": [6, 6], "stride": [4, 4], "border": "zero"},
}


class Blocks(nn.Module):
    """Every pattern once, on views of a fused qkv, with pointwise work behind each and in front of one."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        sizes = {name: [2 * w - 1 for w in p["window"]] for name, p in PATTERNS.items()}
        self.bias = nn.ParameterDict({name: torch.randn(heads, *size) for name, size in sizes.items()})
        self.axes = nn.Linear(width // heads, 22, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        outs = []
        for name, pattern in PATTERNS.items():
            relative = self.axes(q) if name == "halo" else None
            out = torch.ops.compiled_attn.local_attention(q, k, v, self.bias[name], relative, scale=0.3, **pattern)
            outs.append((out.flatten(-2) + x).relu())
        last = torch.ops.compiled_attn.local_attention(q * 1.5, k + 1, v.sigmoid(), window=[5, 5], scale=0.2)
        return *outs, last * 2 + 1


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.deep)], ids=str)
def test_inductors_code_holds_the_template_and_equals_eager(dtype):
    lower.register()
    torch.manual_seed(0)
    model = Blocks().to(dtype).eval()
    with torch.no_grad():
        compiled, code = _torch.compile_and_read(model, torch.randn(2, 13, 18, 24, dtype=dtype))
        assert templates_in(code) == {"cpp_local_attention"}
        for sizes in ((2, 13, 18), (3, 24, 20)):
            x = torch.randn(*sizes, 24, dtype=dtype)
            for found, wanted in zip(compiled(x), model(x), strict=True):
                assert found.stride() == wanted.stride()
                laws.near(found, wanted, {torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype])


def test_what_the_template_refuses_becomes_the_decomposition_and_says_why():
    x = torch.randn(1, 8, 8, 24, dtype=torch.float64)
    program = capture(Blocks().double(), (x,), {}, dynamic_shapes=None, mode="inference")
    notes = Notes()
    lowered = lower.lower(program, targets.load("cpu"), notes)
    assert not [n for n in lowered.graph.nodes if getattr(n.target, "namespace", "") == "compiled_attn"]
    assert {miss.because for miss in notes.misses} == {
        "its elements are torch.float64, the kernel takes float32 and bfloat16"
    }
    for found, wanted in zip(lowered(x), program(x), strict=True):
        laws.near(found, wanted, 1e-12)


@pytest.mark.parametrize(
    ("changed", "because"),
    [
        ({"q": torch.zeros(1, 4, 1, 8).half()}, "its elements are torch.float16"),
        ({"k": torch.zeros(1, 4, 1, 8).bfloat16()}, "q is torch.float32 but k is torch.bfloat16"),
        ({"bias": torch.zeros(1, 3).half()}, "its bias is torch.float16"),
        ({"v": torch.zeros(1, 4, 1, 600)}, "its value width is 600, beyond 512"),
        ({"window": [20000]}, "its window is 20000 long"),
    ],
)
def test_accepts_says_what_it_does_not_cover(changed, because):
    given = {name: torch.zeros(1, 4, 1, 8) for name in "qkv"} | {"bias": None, "relative": None} | changed
    args = tuple(given[name] for name in ("q", "k", "v", "bias", "relative"))
    keywords = {"window": changed.get("window", [3])}
    found = cpp_local_attention.accepts(args, keywords, targets.load("cpu"))
    assert found is not None and found.startswith(because)
    assert local_attention.name == cpp_local_attention.TEMPLATE.op
