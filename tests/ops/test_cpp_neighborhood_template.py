"""The template of neighborhood_apply inside Inductor: in the generated code, right in numbers, in place, symbolic."""

from __future__ import annotations

import laws
import pytest
import torch
import torch.nn.functional as F
from local_models import LOCAL_CASES
from torch import nn

import compiled_attn as ca
from compiled_attn import zoo
from compiled_attn.ir import _torch, targets
from compiled_attn.ops import neighborhood_apply
from compiled_attn.ops.templates import cpp_neighborhood
from compiled_attn.ops.templates.base import templates_in
from compiled_attn.runtime import lower
from compiled_attn.runtime.build import Settings, prepare

OUTLOOK = {"window": [3, 3], "stride": [2, 2], "block": [1, 1], "border": "zero"}


class Blocks(nn.Module):
    """Outlook attention, a dynamic kernel with channels in front, a dilated one; pointwise work around each."""

    def __init__(self, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.v = nn.Linear(width, width)
        self.weigh = nn.ModuleList(nn.Linear(width, heads * n) for n in (81, 25, 9))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        op = torch.ops.compiled_attn.neighborhood_apply
        v = self.v(x).unflatten(3, (self.heads, -1))
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        weights = self.weigh[0](pooled).unflatten(3, (self.heads, 9, 9)).softmax(5)
        outlook = op(weights, v, **OUTLOOK)
        weights = self.weigh[1](x).permute(0, 3, 1, 2).unflatten(1, (self.heads, 25)).softmax(2)
        channels = y.unflatten(1, (self.heads, -1)).permute(0, 3, 4, 1, 2)
        dynamic = op(weights.permute(0, 3, 4, 1, 2).unsqueeze(4), channels, window=[5, 5])
        weights = self.weigh[2](x).unflatten(3, (self.heads, 1, 9))
        dilated = op(weights.tanh(), v.sigmoid() + 1, window=[3, 3], dilation=[2, 3], border="mask")
        return (outlook * 2).relu(), dynamic.flatten(3) + x, dilated.flatten(3) * self.v(x)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.deep)], ids=str)
def test_inductors_code_holds_the_template_and_equals_eager_also_where_the_kernel_is_wider_than_the_map(dtype):
    lower.register()
    torch.manual_seed(0)
    model = Blocks().to(dtype).eval()

    def pictures(batch: int, *sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(batch, *sizes, 24, dtype=dtype), torch.randn(batch, 24, *sizes, dtype=dtype)

    with torch.no_grad():
        compiled, code = _torch.compile_and_read(model, *pictures(2, 12, 18))
        assert templates_in(code) == {"cpp_neighborhood"}
        assert code.count("compiled_attn_cpp::neighborhood_apply<") >= 3
        for given in (pictures(2, 12, 18), pictures(3, 24, 20), pictures(5, 4, 2)):
            for found, wanted in zip(compiled(*given), model(*given), strict=True):
                assert found.stride() == wanted.stride()
                laws.near(found, wanted, {torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype])


class Alone(nn.Module):
    def forward(self, weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        taken = weights.permute(0, 3, 4, 1, 2).unsqueeze(4)
        return torch.ops.compiled_attn.neighborhood_apply(taken, v.permute(0, 3, 4, 1, 2), window=[3, 3])


def test_weights_and_values_are_read_where_they_lie():
    lower.register()
    weights, v = torch.randn(2, 2, 9, 5, 6), torch.randn(2, 2, 20, 5, 6)
    with torch.no_grad():
        compiled, code = _torch.compile_and_read(Alone(), weights, v)
        assert code.count('extern "C"') == code.count("async_compile.cpp") == 1
        laws.near(compiled(weights, v), Alone()(weights, v), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_accepts_says_what_it_does_not_cover(dtype):
    weights, v = torch.zeros(1, 4, 1, 1, 3), torch.zeros(1, 4, 1, 8)
    accepts = cpp_neighborhood.accepts
    assert neighborhood_apply.name == cpp_neighborhood.TEMPLATE.op
    assert accepts((weights, v), {}, targets.load("cpu")) is None
    assert accepts((weights, v), {}, targets.load("a100")) == "target a100 runs no C++"
    because = f"its elements are {dtype}, the kernel takes float32 and bfloat16"
    assert accepts((weights.to(dtype), v.to(dtype)), {}, targets.load("cpu")) == because


def stock() -> tuple[nn.Module, torch.Tensor]:
    """timm's volo_d1_224 for small pictures."""
    return LOCAL_CASES["volo_d1_224"].model(), torch.randn(2, 3, 64, 64)


def paper(name: str) -> tuple[nn.Module, torch.Tensor]:
    found = zoo.PAPERS[name]
    torch.manual_seed(0)
    return found.model(found.tiny).eval(), *found.inputs(found.tiny, 2, torch.Generator().manual_seed(0))


MODELS = {
    "timm volo_d1_224": (stock, 4),
    "volo": (lambda: paper("volo"), 1),
    "overlock": (lambda: paper("overlock"), 6),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_model_that_mixes_neighborhoods_is_refused_by_strict(name):
    (model, x), count = MODELS[name][0](), MODELS[name][1]
    built = prepare(model, (x,), {}, Settings.of("cpu", dynamic_shapes={"x": {0: "batch"}}))
    lower.lower(built.program, built.settings.target, built.notes, strict=True)
    assert [note.what for note in built.notes.of("neighborhood_apply").done].count("cpp_neighborhood") == count


@pytest.mark.deep
@pytest.mark.parametrize("name", MODELS)
def test_models_that_mix_neighborhoods_compile_to_the_template_and_equal_eager(name):
    model, x = MODELS[name][0]()
    fast = ca.compile(model, example_inputs=(x,), dynamic_shapes={"x": {0: "batch"}}, strict=True)
    other = torch.randn(3, *x.shape[1:])
    with torch.no_grad():
        laws.near(fast(other), model(other), 2e-5)
    assert "cpp_neighborhood" in fast.builds[0].templates
