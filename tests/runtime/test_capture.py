"""Capture: any module, pytrees, names for dimensions, and errors that name the user's line."""

import pytest
import torch
from torch import nn

from compiled_attn.ir.errors import CaptureError
from compiled_attn.runtime.capture import capture


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the user's line
            return x + 1
        return x - 1


class Pair(nn.Module):
    def forward(self, items, *, bias=None, flag=True):
        a, b = items["a"], items["b"]
        out = a @ b
        return (out + bias if bias is not None else out, {"flag": out.sum() if flag else out})


def test_pytrees_keywords_and_constants_are_kept():
    items = {"a": torch.randn(2, 3), "b": torch.randn(3, 4)}
    program = capture(Pair(), (items,), {"bias": torch.randn(4), "flag": False})
    want = Pair()(items, bias=torch.ones(4), flag=False)
    found = program(items, bias=torch.ones(4), flag=False)
    torch.testing.assert_close(found[0], want[0])
    torch.testing.assert_close(found[1]["flag"], want[1]["flag"])


def test_a_branch_on_values_is_an_error_that_names_the_line_and_the_way_out():
    with pytest.raises(CaptureError) as caught:
        capture(Branch(), (torch.randn(3),))
    error = caught.value
    assert "if x.sum() > 0" in error.where and "test_capture.py" in error.where
    assert "torch.where" in error.do


def test_a_wrong_shape_is_an_error_that_names_the_line():
    with pytest.raises(CaptureError) as caught:
        capture(Pair(), ({"a": torch.randn(2, 3), "b": torch.randn(4, 4)},))
    assert "out = a @ b" in caught.value.where


def test_a_dimension_that_the_model_fixes_can_not_be_dynamic():
    model = nn.Linear(4, 4)
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(2, 4),), dynamic_shapes={"input": {1: "features"}})
    assert caught.value.facts and "static" in caught.value.do
    assert "suggested: features = 4" in caught.value.facts


@pytest.mark.parametrize(
    ("args", "shapes", "said"),
    [
        (torch.randn(2, 4), None, "give a tuple: (x,)"),
        ((), None, "give example inputs that the model's forward accepts"),
        ((torch.randn(2, 4).numpy(),), None, "give example inputs that the model's forward accepts"),
        ((torch.randn(2, 4),), "batch", "give one entry for each argument"),
        ((torch.randn(2, 4),), {"y": {0: "batch"}}, "by the arguments' own names"),
        ((torch.randn(2, 4),), ({2: "batch"},), "number its dimensions from 0"),
    ],
)
def test_arguments_and_shapes_that_fit_nothing_say_how_to_give_them(args, shapes, said):
    with pytest.raises(CaptureError) as caught:
        capture(nn.Linear(4, 4), args, dynamic_shapes=shapes)
    assert said in caught.value.do
    assert "inspect.py" not in caught.value.where


def test_one_name_means_one_size():
    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    args = (torch.randn(3, 2), torch.randn(3, 2))
    program = capture(Add(), args, dynamic_shapes={"x": {0: "rows"}, "y": {0: "rows"}})
    assert program(torch.ones(5, 2), torch.ones(5, 2)).shape == (5, 2)
    symbols = {str(n.meta["val"].shape[0]) for n in program.inputs}
    assert len(symbols) == 1


def test_a_batch_of_one_in_the_example_does_not_fix_the_batch():
    program = capture(nn.Linear(4, 2), (torch.randn(1, 4),), dynamic_shapes={"input": {0: "batch"}})
    assert program(torch.randn(1, 4)).shape == (1, 2)
    assert program(torch.randn(6, 4)).shape == (6, 2)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    capture(model.eval(), (torch.randn(4, 3),))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [lambda x: x, 3, nn.Linear])
def test_what_is_no_module_is_refused(bad):
    with pytest.raises(CaptureError, match=r"is not an nn\.Module"):
        capture(bad, (torch.randn(2),))


def test_autocast_is_refused_with_the_way_out():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(CaptureError, match="autocast"):
        capture(nn.Linear(2, 2), (torch.randn(1, 2),))


def test_an_unknown_mode_is_refused():
    with pytest.raises(CaptureError, match="unknown mode"):
        capture(nn.Linear(2, 2), (torch.randn(1, 2),), mode="fast")


def test_training_form_keeps_dropout_and_batch_norm_as_they_are():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    program = capture(model, (torch.randn(4, 3),), mode="train")
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "aten.dropout.default" in targets and "aten.batch_norm.default" in targets


@pytest.mark.parametrize("shapes", [(({0: "batch"}, {0: "batch"}),), {"xs": ({0: "batch"}, {0: "batch"})}])
def test_shapes_of_any_number_of_arguments_are_one_entry_as_torch_takes_it(shapes):
    class Sum(nn.Module):
        def forward(self, *xs):
            return xs[0] + xs[1]

    program = capture(Sum(), (torch.randn(1, 3), torch.randn(1, 3)), dynamic_shapes=shapes)
    x = torch.randn(5, 3)
    assert torch.equal(program(x, x), 2 * x)
