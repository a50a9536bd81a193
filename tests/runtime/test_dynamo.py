"""The same passes behind Dynamo: graph breaks, dynamic shapes, gradients, and graphs that go on unchanged."""

import copy

import models
import pytest
import torch
from small_nets import Net, pictures, worst
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import CaptureError
from compiled_attn.ir.notes import Note
from compiled_attn.ir.program import Program
from compiled_attn.ir.verify import verify
from compiled_attn.runtime import dynamo

TOLERANCE = 1e-5  # float32, of the largest value


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    dynamo.clear_reports()
    yield
    torch._dynamo.reset()


def raised() -> list[Note]:
    return [n for report in dynamo.reports() for n in report.notes.done if n.rule == "raise-attention"]


def tensors(program: Program) -> list[torch.Tensor]:
    return [n.meta["val"] for n in program.inputs if isinstance(n.meta["val"], torch.Tensor)]


def leaves(tree) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def traced(function, *args, dynamic: bool | None = None) -> list[Program]:
    """The Programs of the graphs that Dynamo finds, with nothing compiled."""
    found = []

    def catch(module, example_inputs):
        _torch.fix_dynamo_floats(module)
        found.append(Program.from_dynamo(module, example_inputs))
        return module.forward

    torch.compile(function, backend=catch, dynamic=dynamic)(*args)
    return found


@pytest.fixture
def one_thread():
    """One thread when the test begins, and what it was before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_model_with_a_graph_break_equals_eager_and_has_its_attention_raised():
    net = Net(broken=True).eval()
    fast = torch.compile(net, backend="compiled_attn")
    x = pictures(2)
    with torch.no_grad():
        found, expected = fast(x), net(x)
    assert worst(found["logits"], expected["logits"]) < TOLERANCE
    assert worst(found["tokens"], expected["tokens"]) < TOLERANCE
    assert len(dynamo.reports()) == 2
    assert [n.where for n in raised()] == ["attn"]


def test_a_dynamic_batch_trains_like_eager_with_one_compile():
    net = Net()
    plain = copy.deepcopy(net)
    fast = torch.compile(net, backend="compiled_attn")
    for batch in (4, 7):
        x = pictures(batch)
        torch._dynamo.mark_dynamic(x, 0)
        for model, call in ((net, fast), (plain, plain)):
            model.zero_grad()
            call(x)["logits"].sin().sum().backward()
        for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            assert worst(mine.grad, theirs.grad) < 1e-3  # gradients of biases before batch norm are rounding
        assert worst(net.bn.running_var, plain.bn.running_var) < TOLERANCE
    assert net.bn.num_batches_tracked == 2
    assert [r.mode for r in dynamo.reports()] == ["train"]
    assert len(raised()) == 1


def test_another_dtype_compiles_again():
    fast = torch.compile(torch.nn.Linear(4, 4).double(), backend="compiled_attn")
    with torch.no_grad():
        fast(torch.randn(2, 4, dtype=torch.float64))
        fast.float()
        fast(torch.randn(2, 4))
    assert [r.mode for r in dynamo.reports()] == ["inference", "inference"]


def test_parameters_and_symbolic_sizes_are_user_inputs():
    x = torch.randn(3, 4)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        (program,) = traced(torch.nn.Linear(4, 4), x)
    assert program.mode == "inference"
    assert not program.state
    shapes = [tuple(n.meta["val"].shape) for n in program.inputs if isinstance(n.meta["val"], torch.Tensor)]
    assert (4, 4) in shapes
    assert any(isinstance(s[0], torch.SymInt) for s in shapes)


@pytest.mark.parametrize("train", [False, True])
def test_a_program_of_dynamo_runs_by_itself_at_another_size(train):
    linear, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.set_grad_enabled(train):
        (program,) = traced(linear, x)
    other = torch.randn(5, 4)
    given = {(4, 4): linear.weight, (4,): linear.bias}
    args = []
    for node in program.inputs:
        value = node.meta["val"]
        known = given.get(tuple(value.shape)) if isinstance(value, torch.Tensor) and value.shape[0] == 4 else other
        args.append(5 if isinstance(value, torch.SymInt) else known)
    assert worst(program(*args)[0], linear(other)) < TOLERANCE


class Scaled(torch.nn.Module):
    """A scale that the module holds, and one that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.25

    def forward(self, x, temperature):
        return (x * self.scale).softmax(-1) * temperature


def test_floats_that_modules_hold_are_constants_and_those_given_stay_inputs():
    module, x = Scaled(), torch.randn(3, 4)
    with torch.no_grad():
        (program,) = traced(module, x, 0.5, dynamic=True)
    verify(program)
    assert "0.25" in str(program)
    assert "0.5" not in str(program)
    assert any(value.dtype == torch.float64 for value in tensors(program))


def test_a_size_that_the_model_pins_is_no_fault_of_a_pass():
    conv = torch.nn.Conv2d(3, 4, 2, 2)
    with torch.no_grad():
        fast = torch.compile(conv, backend="compiled_attn", dynamic=True)
        for batch in (2, 3):
            x = torch.randn(batch, 3, 8, 8)
            assert worst(fast(x), conv(x)) < TOLERANCE
    (report,) = dynamo.reports()
    assert report.program is not None
    kinds = [[type(n) for n in t.shape[:2]] for t in tensors(report.program)]
    assert [torch.SymInt, int] in kinds


def test_in_place_ops_on_intermediates_leave_a_functional_program():
    def double(x):
        y = x + 1
        y *= 2
        return y

    with torch.no_grad():
        (program,) = traced(double, torch.ones(3))
    assert "mul_" not in str(program)
    assert not program.signature.user_inputs_to_mutate


def test_a_mutated_input_is_written_in_place():
    def count(x, state):
        state.add_(x.sum())
        return x * state

    fast = torch.compile(count, backend="compiled_attn")
    state = torch.zeros(())
    with torch.no_grad():
        out = fast(torch.ones(3), state)
    assert state.item() == 3.0
    assert out.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.usefixtures("one_thread")
def test_a_scalar_is_updated_once_where_more_threads_run_the_code_than_built_it():
    """Inductor alone, told to ask for threads when it runs, lets each thread update it (torch 2.13)."""

    def count(x, state):
        state.add_(x.sum())
        return x * state

    fast = torch.compile(count, backend="compiled_attn")
    with torch.no_grad():
        fast(torch.ones(7), torch.zeros(()))
        torch.set_num_threads(4)
        for _ in range(50):
            state = torch.zeros(())
            fast(torch.ones(7), state)
            assert state.item() == 7.0


def test_a_constant_of_the_graph_is_kept():
    def shifted(x):
        return x + torch.tensor([1.0, 2.0, 3.0])

    with torch.no_grad():
        found = torch.compile(shifted, backend="compiled_attn")(torch.zeros(3))
    assert found.tolist() == [1.0, 2.0, 3.0]


def view_of_written(x):
    x.add_(1)
    return x.view(-1)


class Positions(torch.nn.Module):
    """Adds a table that is computed anew in every call, from nothing that the call brings but its batch."""

    def forward(self, x):
        rows, columns, channels = torch.arange(1.0, 4.0), torch.arange(1.0, 4.0), torch.arange(1.0, 33.0)
        table = (rows[:, None] * columns / channels[:, None, None]).sin()
        return x + table.repeat(x.shape[0], 1, 1, 1).reshape(x.shape[0], -1, 9).permute(0, 2, 1)


def test_a_folded_table_keeps_its_fixed_size_beside_a_dynamic_batch():
    fast, model = torch.compile(Positions(), backend="compiled_attn"), Positions()
    with torch.no_grad():
        for batch in (2, 5):
            x = torch.randn(batch, 9, 32)
            torch._dynamo.mark_dynamic(x, 0)
            assert worst(fast(x), model(x)) < TOLERANCE
    assert any(spec.startswith("made_") for spec in dynamo.reports()[-1].program.constants)


def test_a_graph_that_no_program_expresses_goes_on_unchanged_and_says_why():
    x = torch.zeros(2, 2)
    with torch.no_grad():
        found = torch.compile(view_of_written, backend="compiled_attn")(x)
    assert found.tolist() == [1.0] * 4
    assert found.data_ptr() == x.data_ptr()
    (report,) = dynamo.reports()
    assert report.program is None
    assert "view of an input that the graph writes into" in str(report)


def test_strict_makes_that_an_error():
    fast = torch.compile(view_of_written, backend="compiled_attn", options={"strict": True})
    with torch.no_grad(), pytest.raises(Exception, match="view of an input") as caught:
        fast(torch.zeros(2, 2))
    assert isinstance(caught.value.__cause__ or caught.value.inner_exception, CaptureError)


def test_an_unknown_option_is_named():
    fast = torch.compile(torch.nn.Linear(2, 2), backend="compiled_attn", options={"max_autotune": True})
    with torch.no_grad(), pytest.raises(Exception, match="max_autotune"):
        fast(torch.zeros(1, 2))


def test_activation_checkpointing_goes_on_unchanged_and_says_why():
    def gelu_again(x):
        return torch.utils.checkpoint.checkpoint(torch.nn.functional.gelu, x, use_reentrant=False)

    x = torch.randn(4, requires_grad=True)
    torch.compile(gelu_again, backend="compiled_attn")(x).sum().backward()
    (expected,) = torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)
    assert worst(x.grad, expected) < TOLERANCE
    (report,) = dynamo.reports()
    assert report.mode == "train"
    assert "activation checkpointing" in str(report)


@pytest.mark.deep
@pytest.mark.parametrize("name", sorted(models.CASES))
def test_a_stock_model_with_written_out_attention_equals_eager(name):
    case = models.CASES[name]
    model = case.model("eager")
    fast = torch.compile(model, backend="compiled_attn")
    for batch in (2, 3):
        example = case.example(batch)
        for tensor in example.values():
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch.no_grad():
            found, expected = leaves(fast(**example)), leaves(model(**example))
        assert len(found) == len(expected)
        assert all(worst(a, b) < 1e-4 for a, b in zip(found, expected, strict=True))
    assert all(report.program is not None for report in dynamo.reports())
