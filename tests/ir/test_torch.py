"""The compatibility module keeps its promises on the installed torch."""

import pytest
import torch

from compiled_attn.ir import _torch

DIM = torch.export.Dim


@pytest.fixture
def symbolic():
    class Twice(torch.nn.Module):
        def forward(self, x):
            return x * 2

    return torch.export.export(Twice(), (torch.randn(4, 3),), dynamic_shapes=({0: DIM("n", min=2, max=9)},))


def value(exported, name):
    return next(n for n in exported.graph.nodes if n.name == name).meta["val"]


def test_the_fake_mode_of_a_graph_is_the_one_its_values_live_in(symbolic):
    mode = _torch.fake_mode_of(symbolic.graph)
    assert mode is value(symbolic, "x").fake_mode and mode.shape_env is not None


def test_symbols_are_told_from_numbers(symbolic):
    rows, columns = value(symbolic, "x").shape
    assert _torch.is_symbolic(rows) and not _torch.is_symbolic(columns)
    assert _torch.expression(columns) == 3 and str(_torch.expression(rows)).startswith("s")


def test_statically_true_never_adds_a_guard(symbolic):
    rows = value(symbolic, "x").shape[0]
    env = rows.node.shape_env
    before = len(env.guards)
    assert _torch.statically_true(rows >= 2) and not _torch.statically_true(rows == 4)
    assert len(env.guards) == before and not _torch.specialised(env)


def test_a_pinned_symbol_is_seen(symbolic):
    rows = value(symbolic, "x").shape[0]
    assert bool(rows == 4)
    assert list(_torch.specialised(rows.node.shape_env).values()) == [4]


def test_a_trace_keeps_symbols(symbolic):
    x = value(symbolic, "x")
    traced = _torch.trace(lambda a: torch.nn.functional.gelu(a) + 1, (x,), x.fake_mode)
    targets = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.aten.gelu.default, torch.ops.aten.add.Tensor]
    assert _torch.is_symbolic(next(n for n in traced.graph.nodes if n.target == targets[0]).meta["val"].shape[0])


def test_inductor_options_are_restored():
    from torch._inductor import config

    before = config.freezing
    with _torch.inductor_options({"freezing": not before}):
        assert config.freezing is not before
    assert config.freezing is before


def test_suggested_ranges_are_taken_and_fixed_sizes_are_not():
    shapes = ({0: DIM("rows", min=1)},)
    assert _torch.refined_shapes("no advice", shapes) is None
    refined = _torch.refined_shapes("x\nSuggested fixes:\n  rows = Dim('rows', min=3)\n\nmore", shapes)
    assert refined is not None and refined[0][0].min == 3
    assert _torch.refined_shapes("x\nSuggested fixes:\n  rows = 4\n\nmore", shapes) is None
