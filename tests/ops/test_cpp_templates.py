"""The C++ templates inside Inductor: in the generated code, right in numbers, symbolic, with and without Python."""

from __future__ import annotations

import laws
import pytest
import torch
from local_models import LOCAL_CASES
from torch import nn

import compiled_attn as ca
from compiled_attn.ir import _torch, targets
from compiled_attn.ir.errors import LowerError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.verify import verify
from compiled_attn.ops.templates.base import templates_in, templates_in_package
from compiled_attn.runtime import lower
from compiled_attn.runtime.capture import capture

ops = torch.ops.compiled_attn
ALL = {"cpp_attention", "cpp_class_row", "cpp_select_tokens"}


class Neighbours(nn.Module):
    """Every vocabulary op with pointwise work in front of it and behind each of its outputs, read in strided views."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.slope = nn.Parameter(torch.randn(heads, 1, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        position = torch.arange(count, dtype=torch.float32)
        bias = self.slope.float() * (position[None] - position[:, None]).abs()
        out, row = ops.attention_with_class_row(q, k, v, None, scale=0.3, row=0)
        x = x + 2 * out.transpose(1, 2).reshape(batch, count, width).relu()
        keep = ((count - 1) * 7 + 9) // 10
        tokens, index = ops.select_tokens(x, row[:, 1:], keep, prefix=1, fuse=True)
        plain = ops.attention(q * 1.5, k, v + 1, bias, scale=0.2) * 3 + 1
        causal = ops.attention(q, k, v, None, scale=0.2, causal=True, softcap=1.5).sigmoid()
        only_row = ops.attention_with_class_row(q, k, v, bias, scale=0.1, row=1)[1].sqrt()
        only_tokens = ops.select_tokens(x.flip(1), row[:, 1:].float() + 1, 2, prefix=1)[0].abs()
        return tokens.tanh(), index + 1, plain, causal, row * 2, only_row, only_tokens


def reference(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(x)


def check(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        laws.near(a, b, {torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype])


class Short(Neighbours):
    """One call of each op."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, count, width = x.shape
        heads = (batch, count, self.heads, -1)
        q, k, v = (part.reshape(heads).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        out, row = ops.attention_with_class_row(q, k, v, None, scale=0.3, row=0)
        x = x + 2 * out.transpose(1, 2).reshape(batch, count, width).relu()
        tokens, index = ops.select_tokens(x, row[:, 1:], ((count - 1) * 7 + 9) // 10, prefix=1, fuse=True)
        return tokens.tanh(), index + 1, ops.attention(q * 1.5, k, v + 1, self.slope, scale=0.2) * 3 + 1


def test_torch_compile_holds_each_template_and_refuses_to_fuse_behind_it():
    lower.register()
    model = Short()
    with torch.no_grad():
        compiled, code = _torch.compile_and_read(model, torch.randn(2, 13, 24))
        assert templates_in(code) == ALL
        for batch, count in ((2, 13), (3, 40)):
            x = torch.randn(batch, count, 24)
            check(compiled(x), reference(model, x), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_package_needs_no_library_beside_and_takes_any_batch_and_length(dtype, tmp_path):
    model = Neighbours().to(dtype)
    x = torch.randn(2, 13, 24, dtype=dtype)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("tokens", min=8, max=512)}
    program = capture(model, (x,), {}, dynamic_shapes=(sizes,), mode="inference")
    target, notes = targets.load("cpu"), Notes()
    assert lower.lower(program, target, notes, strict=True) is program
    assert {note.what for note in notes.done} == ALL
    lower.register()
    path = _torch.aoti_package(
        program.to_exported(), str(tmp_path / "model.pt2"), lower.inductor_config(target, program)
    )
    assert templates_in_package(path) == ALL
    loader = _torch.package_loader(path)
    for batch, count in ((2, 13), (1, 8), (5, 70)):
        x = torch.randn(batch, count, 24, dtype=dtype)
        check(tuple(loader.boxed_run([x])), reference(model, x), dtype)


def test_what_no_template_accepts_becomes_its_decomposition_and_says_why():
    model = Neighbours().double()
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("tokens", min=8, max=512)}
    program = capture(model, (x,), {}, dynamic_shapes=(sizes,), mode="inference")
    target, notes = targets.load("cpu"), Notes()
    lowered = lower.lower(program, target, notes)
    verify(lowered, program, after="lower")
    assert not [n for n in lowered.graph.nodes if getattr(n.target, "namespace", "") == "compiled_attn"]
    assert {miss.because for miss in notes.misses} == {
        "its elements are torch.float64, the kernel takes float32 and bfloat16",
        "its tokens are torch.float64, the kernel moves float32 and bfloat16",
    }
    assert {note.what for note in notes.done} == {"decomposition"}
    for batch, count in ((2, 13), (3, 20)):
        x = torch.randn(batch, count, 24, dtype=torch.float64)
        for a, b in zip(lowered(x), reference(model, x), strict=True):
            laws.near(a, b, 1e-10)
    with pytest.raises(LowerError, match="no template serves attention_with_class_row") as caught:
        lower.lower(program, target, Notes(), strict=True)
    assert "not cpp_class_row because its elements are torch.float64" in caught.value.facts
    assert "select_tokens" not in str(caught.value) and "test_cpp_templates.py" in caught.value.where


def test_registering_again_changes_nothing():
    lower.register()
    before = _torch.inductor_lowering(ops.attention.default)
    lower.register()
    assert _torch.inductor_lowering(ops.attention.default) is before


@pytest.mark.deep
def test_a_stock_gemma_2_with_capped_scores_compiles_to_the_template_and_equals_eager():
    case = LOCAL_CASES["Gemma2Model"]
    model = case.model()
    fast = ca.compile(model, example_kwargs=case.case.example(), dynamic_shapes=case.case.dynamic(), strict=True)
    with torch.no_grad():
        given = case.case.example(3, seed=1)
        laws.near(fast(**given).last_hidden_state, model(**given).last_hidden_state, 2e-5)
    calls = fast.builds[0].calls
    assert (calls["cpp_attention"], calls["cpp_local_attention"]) == (1, 1)
