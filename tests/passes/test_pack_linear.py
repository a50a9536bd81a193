"""Which product serves a linear map: the rule, the measurement, the refusals, and the op that a decision becomes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.passes import pack_linear
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.pack_linear import PackLinear, apply_linear_choices
from compiled_attn.runtime.capture import capture

TARGET = targets.load("x86-64-v3")  # where our product was not seen ahead
OURS = targets.load("zen5")


class Two(nn.Module):
    """A linear map too small for oneDNN and one that is not, with GELU and a residual behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(16, 8)
        self.large = nn.Linear(384, 384)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.nn.functional.gelu(self.small(x)), y + self.large(y)


INPUTS = (torch.randn(3, 5, 16), torch.randn(3, 50, 384))


def packed(model: nn.Module, inputs: tuple, item: PackLinear | None = None, dynamic: object = None, target=TARGET):
    program = capture(model.eval(), inputs, dynamic_shapes=dynamic)
    notes = Notes()
    changed, _ = run_passes(program, [item or PackLinear()], target, notes, compare=True)
    return program, changed, notes


def decisions(program) -> list[str]:
    return [n.meta["compiled_attn"]["gemm"] for n in program.graph.nodes if "compiled_attn" in n.meta]


def test_the_rule_gives_large_products_to_onednn_and_small_ones_to_aten() -> None:
    _, changed, notes = packed(Two(), INPUTS)
    assert decisions(changed) == ["aten", "onednn"]
    texts = [(n.where, n.what, n.measure) for n in notes.done]
    assert texts == [
        ("small", "15x16x8 float32 + gelu: aten", "by rule"),
        ("large", "150x384x384 float32 + add: onednn", "by rule"),
    ]


def test_a_symbolic_batch_is_judged_by_its_lowest_size_and_stays_symbolic() -> None:
    before, changed, notes = packed(Two(), INPUTS, dynamic={"x": {0: "b"}, "y": {0: "b"}})
    assert [n.what for n in notes.done] == ["5..x16x8 float32 + gelu: aten", "50..x384x384 float32 + add: onednn"]
    lowered = apply_linear_choices(changed, TARGET)
    inputs = (torch.randn(7, 5, 16), torch.randn(7, 50, 384))
    for got, want in zip(lowered(*inputs), before(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_product_of_one_batch_that_a_decision_becomes_equals_eager() -> None:
    model = Two()
    _, changed, _ = packed(model, INPUTS)
    lowered = apply_linear_choices(changed, TARGET)
    targets_now = [str(n.target) for n in lowered.graph.nodes if n.op == "call_function"]
    assert targets_now.count("aten.bmm.default") == 1
    assert targets_now.count("aten.linear.default") == 1
    for got, want in zip(lowered(*INPUTS), model(*INPUTS), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_program_without_an_aten_decision_is_lowered_as_it_is() -> None:
    _, changed, _ = packed(nn.Linear(384, 384), (torch.randn(50, 384),))
    assert apply_linear_choices(changed, TARGET) is changed


def test_a_second_run_changes_nothing() -> None:
    _, changed, _ = packed(Two(), INPUTS)
    again, _ = run_passes(changed, [PackLinear()], TARGET, Notes())
    assert again is changed


def test_another_kind_of_target_is_left_alone() -> None:
    program = capture(Two().eval(), INPUTS)
    assert PackLinear().run(program, targets.load("a100"), Notes()) is program


class Computed(nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, w)


@pytest.mark.parametrize(
    ("model", "inputs", "because"),
    [
        (
            Computed(),
            (torch.randn(4, 8), torch.randn(3, 8)),
            "its weight is computed (w), so it can not be packed ahead",
        ),
        (
            nn.Linear(8, 3).double(),
            (torch.randn(4, 8, dtype=torch.float64),),
            "no packed product for float64, only for float32 and bfloat16",
        ),
    ],
)
def test_what_can_not_be_packed_is_a_miss_with_its_reason(model: nn.Module, inputs: tuple, because: str) -> None:
    before, changed, notes = packed(model, inputs)
    assert changed is before
    assert [m.because for m in notes.misses] == [because]


class Shared(nn.Module):
    """The product's result is read twice, so nothing is computed behind it; the other has a broadcast sum behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 32)
        self.b = nn.Linear(64, 32)
        self.row = nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        return torch.relu(a) * a + (self.b(x) + self.row)


def test_an_epilogue_is_an_activation_or_a_sum_of_equal_shapes_read_once() -> None:
    _, _, notes = packed(Shared(), (torch.randn(4, 64),))
    assert [n.what for n in notes.done] == ["4x64x32 float32: aten", "4x64x32 float32: aten"]


class Conv1D(nn.Module):
    """GPT-2's form: x w + b with w [K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 8))
        self.b = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.b, x, self.w)


def test_addmm_on_a_constant_is_a_linear_map() -> None:
    model = Conv1D()
    x = torch.randn(6, 16)
    _, changed, notes = packed(model, (x,))
    assert [n.what for n in notes.done] == ["6x16x8 float32: aten"]
    torch.testing.assert_close(apply_linear_choices(changed, TARGET)(x), model(x), rtol=1e-5, atol=1e-5)


def test_measuring_asks_once_a_case_and_follows_the_faster() -> None:
    asked: list[dict] = []

    def measure(case, candidates):
        asked.append(dict(case))
        assert set(candidates) == {"onednn", "aten", "cpp"}
        order = {16: (1.0, 2.0, 3.0), 384: (2.0, 1.0, 3.0)}[case["inner"]]
        return dict(zip(("onednn", "aten", "cpp"), order, strict=True))

    _, changed, notes = packed(Two(), INPUTS, PackLinear("measure", measure))
    assert decisions(changed) == ["onednn", "aten"]
    assert [(a["rows"], a["inner"], a["outer"], a["epilogue"]) for a in asked] == [
        (15, 16, 8, "gelu"),
        (160, 384, 384, "add"),
    ]
    assert "GF/s" in notes.done[0].measure


def test_an_unbounded_size_is_measured_at_its_lowest_and_at_eight_times_that() -> None:
    case = pack_linear.Linear((197, None), 384, 384, torch.float32, True, "none")
    assert case.sizes() == (224, 1792)
    assert pack_linear.Linear((197, 394), 384, 384, torch.float32, True, "none").sizes() == (224, 448)


@pytest.mark.parametrize("rows", [1, 7, 32, 33, 197, 1576, 4097])
def test_a_bucket_holds_the_size_and_is_at_most_a_quarter_larger(rows: int) -> None:
    assert rows <= pack_linear.bucket(rows) <= 1.25 * rows
    assert pack_linear.bucket(pack_linear.bucket(rows)) == pack_linear.bucket(rows)


def test_measuring_without_the_service_is_refused() -> None:
    with pytest.raises(PassError, match="nothing to measure with"):
        PackLinear("measure")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epilogue", ["none", "gelu", "gelu_tanh", "relu", "swish", "add"])
def test_the_candidates_compute_the_same(dtype: torch.dtype, epilogue: str) -> None:
    case = pack_linear.Linear((33, 33), 48, 40, dtype, True, epilogue)
    onednn, aten = pack_linear._onednn(case, 33)(), pack_linear._aten(case, 33)()
    error = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(onednn, aten, rtol=error, atol=error)


def test_measured_choices_are_kept_on_disk(tmp_path: Path) -> None:
    """Our kernel among the candidates: it is compiled by itself to be timed, and computes what the others do."""
    from compiled_attn.runtime.measure import Measurements

    here = targets.load("cpu")
    first, second = Measurements(tmp_path), Measurements(tmp_path)
    model, x = nn.Linear(16, 8), torch.randn(5, 16)
    _, one, notes = packed(model, (x,), PackLinear("measure", first), target=here)
    _, two, _ = packed(model, (x,), PackLinear("measure", second), target=here)
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 1, 1, 0)
    assert decisions(one) == decisions(two)
    assert "cpp" in notes.done[0].measure
    case = pack_linear.Linear((5, 5), 16, 8, torch.float32, True, "none")
    found, wanted = pack_linear._cpp(here, case, 5)(), pack_linear._aten(case, 5)()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, {"x": {0: "b"}, "y": {0: "b"}}])
def test_our_product_takes_activation_and_residual_in_and_equals_eager(dynamic: object) -> None:
    model = Two()
    before, changed, _ = packed(model, INPUTS, dynamic=dynamic, target=OURS)
    assert decisions(changed) == ["cpp", "cpp"]
    lowered = apply_linear_choices(changed, OURS)
    kinds = [str(n.target) for n in lowered.graph.nodes if n.op == "call_function"]
    assert kinds.count("compiled_attn.packed_linear.default") == 2
    assert not {"aten.gelu.default", "aten.add.Tensor", "aten.linear.default"} & set(kinds)
    inputs = INPUTS if dynamic is None else (torch.randn(7, 5, 16), torch.randn(7, 50, 384))
    for got, want in zip(lowered(*inputs), before(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert set(lowered.origin.values()) == {("small.weight",), ("large.weight",)}


def test_bfloat16_goes_to_the_matrix_unit_where_there_is_one() -> None:
    case = pack_linear.Linear((197, 197), 384, 384, torch.bfloat16, True, "none")
    assert pack_linear.by_rule(case, OURS) == "cpp"
    assert pack_linear.by_rule(case, targets.load("spr")) == "onednn"


class Tied(nn.Module):
    """One weight read twice, once under a product that is also added to what it was made from."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return y + self.a(y)


def test_a_weight_that_is_read_twice_is_packed_once() -> None:
    model, x = Tied(), torch.randn(4, 32)
    _, changed, _ = packed(model, (x,), target=OURS)
    lowered = apply_linear_choices(changed, OURS)
    assert len(lowered.constants) == 1
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-5)
