"""How local attention runs on a GPU: which form is expected to be fastest, and that dense attention is the same."""

from __future__ import annotations

import pytest
import torch
from local_strategies import CASES, LocalSpec
from torch import nn

from compiled_attn import ops
from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.passes import choose_local_attention as choosing
from compiled_attn.passes import pipelines
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.choose_local_attention import RULE, ChooseLocalAttention
from compiled_attn.runtime.capture import capture

SDPA = torch.ops.aten.scaled_dot_product_attention.default
LOCAL = ops.local_attention.overload
BATCH = {0: torch.export.Dim("batch", min=1, max=16)}


class Attends(nn.Module):
    """One call of local attention with a bias that is a parameter, where there is one."""

    def __init__(self, spec: LocalSpec) -> None:
        super().__init__()
        self.options = spec.options
        bias = spec.tensors()[3]
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, relative: torch.Tensor | None = None):
        return ops.local_attention(q, k, v, self.bias, relative, **self.options)


def decided(spec: LocalSpec, target: str, *, half: bool = False):
    """The program before and after, and what was noted; on a symbolic batch."""
    model, (q, k, v, _, relative) = Attends(spec).eval(), spec.tensors()
    if half:
        model, q, k, v = model.half(), q.half(), k.half(), v.half()
    inputs = (q, k, v) if relative is None else (q, k, v, relative)
    before = capture(model, inputs, {}, dynamic_shapes=(BATCH,) * len(inputs), mode="inference")
    notes = Notes()
    after, _ = run_passes(before, [ChooseLocalAttention()], targets.load(target), notes)
    (note,) = notes.of(RULE).done
    return before, after, note


WHOLE = LocalSpec(queries=(7, 7), window=(7, 7))
# name -> call, target, the form that is chosen
CHOICES = {
    "a neighborhood": (LocalSpec(queries=(28, 28), window=(7, 7), width=32, value_width=32), "a100", "template"),
    "a window that is the map": (WHOLE, "a100", "dense attention"),
    "the same with a bias": (LocalSpec(queries=(7, 7), window=(7, 7), bias=True), "a100", "dense attention"),
    "a GPU without tensor cores for Triton": (
        LocalSpec(queries=(14, 14), window=(7, 7), bias=True),
        "t4",
        "dense attention",
    ),
    "a long capped window": (
        LocalSpec(queries=(512,), window=(256,), causal=(True,), border="mask", width=64, value_width=64, softcap=50.0),
        "a100",
        "capped dense attention",
    ),
    "a large map on it": (LocalSpec(queries=(56, 56), window=(7, 7), width=32, batch=1), "t4", "decomposition"),
}


@pytest.mark.parametrize(("spec", "target", "form"), CHOICES.values(), ids=CHOICES)
def test_the_form_with_the_least_expected_seconds_is_chosen_and_the_note_names_the_others_and_the_roof(
    spec, target, form
):
    if form == "template":
        pytest.importorskip("triton")
    before, after, note = decided(spec, target, half=True)
    dense = {"dense attention": SDPA, "capped dense attention": ops.attention.overload}.get(form)
    assert note.what == ("triton_local_attention" if form == "template" else form.removeprefix("capped "))
    assert "roof" in note.measure and "expected and not timed" in note.measure
    kinds = {n.target for n in after.graph.nodes}
    assert kinds & {SDPA, ops.attention.overload, LOCAL} == {dense or LOCAL}
    assert dense or after is before


DENSE = {name: spec for name, spec in CASES.items() if spec.border != "zero"} | {
    "the whole map": WHOLE,
    "capped, without a bias": LocalSpec(queries=(20,), window=(9,), causal=(True,), border="mask", softcap=0.5),
    "a longer sequence": LocalSpec(queries=(40,), window=(9,), causal=(True,), border="mask", sinks=3),
}


@pytest.mark.parametrize("spec", DENSE.values(), ids=DENSE)
def test_dense_attention_gives_equal_numbers_at_1e_5(spec, monkeypatch):
    form = choosing.Form("dense attention", 1.0)
    monkeypatch.setattr(choosing, "forms", lambda call, _: ([form], choosing.undense(call)))
    spec = LocalSpec(**{**spec.__dict__, "batch": 2})
    before, after, note = decided(spec, "a100")
    dense = ops.attention.overload if spec.softcap else SDPA
    assert [n.target for n in after.graph.nodes].count(dense) == 1 and "no dense" not in note.measure
    q, k, v, *_ = LocalSpec(**{**spec.__dict__, "batch": 3}).tensors()
    assert (after(q, k, v) - before(q, k, v)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("spec", "because"),
    [
        (CASES["halo"], "its logits depend on the query"),
        (LocalSpec(border="zero"), "keys of zeros beyond its border count"),
        (LocalSpec(width=7), "its head is 7 wide, fused attention takes multiples of 4 in torch.float32"),
        (LocalSpec(queries=(80, 80), window=(7, 7), batch=1, heads=1), "its mask would take 156 MiB"),
        (
            LocalSpec(queries=(9,), window=(2,), stride=(2,), block=(1,), border="mask", width=4, value_width=4),
            None,
        ),
    ],
)
def test_why_a_call_is_no_dense_attention_is_one_sentence(spec, because):
    q, k, v, bias, relative = spec.tensors()
    call = choosing.Call(q, k, v, bias, relative, spec.axes, spec.options)
    assert choosing.undense(call) == because


def test_a_map_of_symbolic_size_stays_with_the_template_and_says_so():
    pytest.importorskip("triton")
    spec = LocalSpec(queries=(14, 14), window=(7, 7))
    rows = {0: torch.export.Dim("batch", min=1, max=16), 1: torch.export.Dim("rows", min=8, max=64)}
    program = capture(Attends(spec).eval(), spec.tensors()[:3], {}, dynamic_shapes=(rows,) * 3, mode="inference")
    notes = Notes()
    after, _ = run_passes(program, [ChooseLocalAttention()], targets.load("a100"), notes)
    (note,) = notes.of(RULE).done
    assert after is program and note.what == "triton_local_attention"
    assert "its map has symbolic sizes" in note.measure and "ns a thousand queries of a head" in note.measure


def test_on_a_cpu_nothing_is_chosen_and_on_a_gpu_local_patterns_are_raised_first():
    names = {t: [p.name for p in pipelines.default(targets.load(t), "inference")] for t in ("cpu", "a100")}
    assert "choose-local-attention" not in names["cpu"]
    assert names["a100"].index("raise-local-attention") < names["a100"].index("choose-local-attention")
