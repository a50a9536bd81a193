"""canonicalize, fold-constants, fold-batch-norm and the runner that holds passes to their word."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.passes import Canonicalize, FoldBatchNorm, FoldConstants, run_passes
from compiled_attn.passes.base import cache_key
from compiled_attn.passes.fold_padding import FoldPadding
from compiled_attn.passes.fold_scale import FoldScale
from compiled_attn.runtime.capture import capture

aten = torch.ops.aten
TARGET = targets.detect()
CLEAN = (Canonicalize(), FoldConstants(), FoldBatchNorm(), Canonicalize())


def run(model, *args, passes=CLEAN, compare=True, **options):
    program = capture(model.eval(), args, **options)
    notes = Notes()
    changed, records = run_passes(program, passes, TARGET, notes, compare=compare)
    return program, changed, notes, records


def ops(program):
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 4))
        self.register_buffer("index", torch.randint(0, 10, (6,)))

    def forward(self, x):
        return x + self.table[self.index].softmax(-1).mul(2.0)


def test_what_does_not_depend_on_the_input_is_computed_once():
    _, changed, notes, _ = run(Table(), torch.randn(6, 4))
    assert ops(changed) == [aten.add.Tensor]
    assert "from index, table" in str(notes)
    assert set(changed.origin[next(iter(changed.constants))]) == {"index", "table"}


def test_a_constant_made_from_another_that_is_read_too_is_computed_once():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.row = nn.Parameter(torch.randn(8))

        def forward(self, x):
            gate = self.row.sigmoid()
            return x * gate + (1 - gate)

    _, changed, _, _ = run(Chain(), torch.randn(4, 8))
    assert ops(changed) == [aten.mul.Tensor, aten.add.Tensor]


def test_a_broadcast_is_not_stored():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.row = nn.Parameter(torch.randn(1, 64))

        def forward(self, x):
            return x * self.row.expand(4096, 64).neg()

    _, changed, _, _ = run(Wide(), torch.randn(4096, 64))
    assert all(t.numel() <= 64 for t in changed.constants.values() if isinstance(t, torch.Tensor))


class Biased(nn.Module):
    """Scores plus a bias [H, N, N] gathered from a table of few offsets; `copies` of it side by side."""

    def __init__(self, count=48, heads=3, copies=1, ballast=0):
        super().__init__()
        self.table = nn.Parameter(torch.randn(heads, 2 * count - 1))
        self.ballast = nn.Parameter(torch.randn(ballast))
        self.count, self.copies = count, copies

    def forward(self, x):
        place = torch.arange(self.count)
        offset = place[:, None] - place + self.count - 1
        bias = self.table.index_select(1, offset.flatten()).unflatten(1, (self.count, self.count))
        return x + bias.repeat_interleave(self.copies, 0).mul(0.5) + self.ballast.sum()


@pytest.mark.parametrize(
    "options, folds",
    [({"ballast": 7_000}, True), ({"ballast": 1_000}, False), ({"ballast": 90_000, "copies": 12}, False)],
    ids=["it has room", "it is larger than all weights", "a broadcast makes it large"],
)
def test_what_is_gathered_from_a_small_table_is_kept_where_the_weights_are_no_fewer(options, folds):
    model = Biased(**options)
    x = torch.randn(3 * model.copies, 48, 48)
    _, changed, _, _ = run(model, x)
    assert any(t.shape == x.shape for t in changed.constants.values()) is folds


def test_random_values_are_not_folded():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn(3)

    _, changed, _, _ = run(Noise(), torch.randn(3), compare=False)
    assert aten.randn.default in ops(changed)


@pytest.mark.parametrize("shape", [(1, 3, 9), (2, 3, 9, 8), (2, 3, 5, 6, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_goes_into_the_convolution_before_it(shape, bias):
    rank = len(shape) - 2
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](3, 6, 3, bias=bias, groups=3, padding=1)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](6)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.data.normal_()
    _, changed, _, records = run(nn.Sequential(conv, norm, nn.ReLU()), torch.randn(shape))
    assert len(ops(changed)) == 2
    assert max(r.error or 0 for r in records) < 1e-6


@pytest.mark.parametrize("read_again", [False, True])
def test_batch_norm_over_the_rows_of_a_linear_goes_into_it_unless_something_else_reads_them(read_again):
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16)
            self.norm.running_mean.normal_(), self.norm.running_var.uniform_(0.5, 2), self.norm.weight.data.normal_()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            z = self.norm(y.flatten(0, 1)).reshape_as(y)
            return z + y if read_again else z

    torch.manual_seed(0)
    model = Rows().eval()
    program = capture(model, (torch.randn(2, 5, 8),), dynamic_shapes=({0: "batch"},))
    folded, _ = run_passes(program, CLEAN, targets.load("cpu"), Notes())
    assert any("batch_norm" in str(n) for n in ops(folded)) == read_again
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        assert (folded(x) - model(x)).abs().max() < 1e-5


def test_batch_norm_goes_into_a_linear_before_it():
    _, changed, _, _ = run(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), torch.randn(4, 5))
    assert ops(changed) == [aten.linear.default]


def test_a_convolution_that_is_read_twice_is_a_miss_that_says_so():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    _, changed, notes, _ = run(Twice(), torch.randn(1, 3, 4, 4))
    assert "is read 2 times" in str(notes)
    assert len(ops(changed)) >= 3


def test_no_ops_go_and_repeats_are_merged():
    class Redundant(nn.Module):
        def forward(self, x):
            a = torch.relu(x.to(torch.float32).contiguous() * 1.0)
            b = torch.relu(nn.functional.dropout(x, 0.1, training=False))
            return a + b

    _, changed, _, _ = run(Redundant(), torch.randn(3, 4))
    assert ops(changed) == [aten.relu.default, aten.add.Tensor]


def test_a_copy_that_changes_strides_stays():
    class Strided(nn.Module):
        def forward(self, x):
            return x.transpose(0, 1).contiguous().view(-1)

    model = Strided()
    _, changed, _, _ = run(model, torch.randn(3, 4))
    x = torch.randn(3, 4)
    torch.testing.assert_close(changed(x), model(x))


def test_an_output_never_becomes_an_input():
    class Copy(nn.Module):
        def forward(self, x):
            return x.clone()

    _, changed, _, _ = run(Copy(), torch.randn(3))
    x = torch.randn(3)
    assert changed(x).data_ptr() != x.data_ptr()


def test_a_second_run_changes_nothing_and_gives_the_same_text():
    program, changed, _, _ = run(Table(), torch.randn(6, 4))
    again, records = run_passes(changed, CLEAN, TARGET, Notes())
    assert again is changed and not any(r.changed for r in records)
    twice, _ = run_passes(program, CLEAN, TARGET, Notes())
    assert str(twice) == str(changed)


def test_symbols_stay_free():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    _, changed, _, _ = run(model, torch.randn(2, 3, 8, 8), dynamic_shapes=({0: "batch", 2: "rows"},))
    x = torch.randn(5, 3, 11, 8)
    torch.testing.assert_close(changed(x), model(x), rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Liar:
    name: ClassVar[str] = "liar"
    exact: ClassVar[bool] = True

    def run(self, program, target, notes):
        del target, notes
        edit = program.edit()
        last = [n for n in edit.graph.nodes if n.op == "call_function"][-1]
        with edit.graph.inserting_after(last):
            new = edit.call(aten.mul.Tensor, (last, 1.01), like=last)
        edit.replace(last, new)
        return edit.finish(self.name)


def test_the_runner_catches_an_exact_pass_that_changes_numbers():
    with pytest.raises(PassError, match="changed the numbers"):
        run(nn.Linear(3, 3), torch.randn(2, 3), passes=[Liar()])


def test_the_runner_refuses_what_is_no_pass():
    with pytest.raises(PassError, match="is not a pass"):
        run(nn.Linear(3, 3), torch.randn(2, 3), passes=[Canonicalize])


def test_the_runner_dumps_before_and_after(tmp_path):
    program = capture(Table().eval(), (torch.randn(6, 4),))
    run_passes(program, CLEAN, TARGET, Notes(), dump=tmp_path)
    before, after = tmp_path / "01-fold-constants.before.txt", tmp_path / "01-fold-constants.after.txt"
    assert "softmax" in before.read_text() and "softmax" not in after.read_text()


def test_the_cache_key_knows_options_and_order():
    assert cache_key([FoldConstants()]) == cache_key([FoldConstants()])
    assert cache_key([FoldConstants()]) != cache_key([FoldConstants(growth=2.0)])
    assert cache_key([FoldConstants(), Canonicalize()]) != cache_key([Canonicalize(), FoldConstants()])


class PreNorm(nn.Module):
    """A batch norm in front of a 1x1 convolution, and one behind it."""

    def __init__(self, **options):
        super().__init__()
        self.first, self.conv, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1, **options), nn.BatchNorm2d(8)

    def forward(self, x):
        return x.sum() + self.last(self.conv(self.first(x)))


def lively(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize(("options", "left"), [({}, 0), ({"bias": False}, 0), ({"stride": 2}, 0), ({"padding": 1}, 1)])
def test_a_batch_norm_goes_into_the_1x1_convolution_behind_it(options, left):
    torch.manual_seed(0)
    program, changed, _, _ = run(lively(PreNorm(**options)), torch.randn(2, 6, 5, 4))
    norms = [n for n in ops(changed) if "batch_norm" in str(n)]
    assert len(norms) == left
    x = torch.randn(3, 6, 5, 4)[:2]
    torch.testing.assert_close(changed(x), program(x), rtol=1e-5, atol=1e-5)
    if not left:
        made = {o for names in changed.origin.values() for o in names}
        assert {"first.weight", "first.running_var", "conv.weight", "last.running_mean"} <= made


class LayerScale(nn.Module):
    def __init__(self, bias=True, shape=(8,)):
        super().__init__()
        self.linear, self.gamma = nn.Linear(6, 8, bias=bias), nn.Parameter(torch.randn(8).view(shape))

    def forward(self, x):
        return self.gamma.view(1, 8) * self.linear(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (8, 1, 1)])
def test_a_factor_for_each_output_goes_into_the_weights(bias, shape):
    program, changed, notes, _ = run(LayerScale(bias, shape), torch.randn(3, 6), passes=(FoldScale(),))
    assert ops(changed) == [aten.linear.default] and "fold-scale" in str(notes)
    x = torch.randn(3, 6)
    torch.testing.assert_close(changed(x), program(x), rtol=1e-5, atol=1e-5)
    assert all("gamma" in names for names in changed.origin.values())


def test_a_factor_stays_where_it_is_computed_or_the_product_is_read_twice():
    class Twice(LayerScale):
        def forward(self, x):
            y = self.linear(x)
            return self.gamma * y + y

    class Computed(LayerScale):
        def forward(self, x):
            return self.linear(x) * x.sum(-1, keepdim=True)

    for model in (Twice(), Computed()):
        program, changed, _, _ = run(model, torch.randn(3, 6), passes=(FoldScale(),))
        assert changed is program


class Padded(nn.Module):
    def __init__(self, ends, **options):
        super().__init__()
        self.ends, self.conv = ends, nn.Conv2d(4, 6, 3, **options)

    def forward(self, x):
        return self.conv(nn.functional.pad(x, self.ends))


@pytest.mark.parametrize(
    ("ends", "options", "folds"),
    [
        ((1, 1, 2, 2), {}, True),
        ((3, 3), {"stride": 2, "bias": False}, True),
        ((1, 1, 1, 1), {"padding": 1, "groups": 2, "dilation": 2}, True),
        ((0, 1, 0, 1), {"stride": 2}, False),
        ((1, 1, 1, 1, 0, 1), {"stride": 2}, None),
    ],
)
def test_a_border_of_zeros_goes_into_the_convolution(ends, options, folds):
    if folds is None:
        model = nn.Sequential(nn.ConstantPad3d(ends, 0.0), nn.Conv2d(4, 6, 3, **options))
        x = torch.randn(2, 3, 9, 8)
    else:
        model, x = Padded(ends, **options), torch.randn(2, 4, 9, 8)
    program, changed, _, _ = run(model, x, passes=(FoldPadding(),))
    assert (changed is not program) == bool(folds)
    assert not folds or not [t for t in ops(changed) if "pad" in str(t)]
    torch.testing.assert_close(changed(x), program(x), rtol=1e-5, atol=1e-5)


def test_a_border_goes_into_a_convolution_with_one_number_for_all_axes():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))

        def forward(self, x):
            return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 2, 2)), self.weight, padding=[1], stride=[2])

    program, changed, _, _ = run(One(), torch.randn(2, 4, 9, 8), passes=(FoldPadding(),))
    torch.testing.assert_close(changed(x := torch.randn(2, 4, 9, 8)), program(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [16, 20])
def test_a_convolution_without_a_batch_keeps_its_norm(count):
    model = lively(nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(count)))
    nn.init.uniform_(model[1].running_mean, -1, 1)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    x = torch.randn(3, count)
    program, changed, _, _ = run(model, x)
    torch.testing.assert_close(changed(x), program(x), rtol=1e-5, atol=1e-5)


def test_a_factor_of_more_dimensions_or_of_a_vectors_product_stays():
    class More(LayerScale):
        def forward(self, x):
            return self.linear(x) * self.gamma.view(1, 1, 8)

    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.gamma = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

        def forward(self, x):
            return nn.functional.linear(x, self.weight) * self.gamma

    for model, x in ((More(), torch.randn(3, 6)), (Vector(), torch.randn(6, 6))):
        program, changed, _, _ = run(model, x, passes=(FoldScale(),))
        assert changed is program


def test_a_border_of_other_values_stays():
    model = nn.Sequential(nn.ConstantPad2d(1, 2.0), nn.Conv2d(4, 6, 3))
    program, changed, _, _ = run(model, torch.randn(2, 4, 9, 8), passes=(FoldPadding(),))
    assert changed is program
