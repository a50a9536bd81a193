"""The compatibility module keeps its promises on the installed torch."""

import pytest
import torch
import torch.nn.functional as F

from compiled_attn.ir import _torch, _torch_mends

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


def test_the_training_form_is_checked_by_its_own_rules():
    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return x * 2

    from compiled_attn.runtime.capture import capture

    program = capture(Counted(), (torch.ones(3),), mode="train")
    assert "add_" in str(program)
    assert program(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]


def test_a_module_call_gets_another_structure_of_its_result(symbolic):
    spec = torch.utils._pytree.tree_structure((0, {"a": 0}))
    entry = symbolic.module_call_graph[0]
    found = _torch.module_call_like(entry, spec)
    assert found.signature.out_spec == spec
    assert found.signature.in_spec == entry.signature.in_spec
    assert entry.signature.out_spec != spec
    assert _torch.module_call(entry.signature.in_spec, spec).signature.out_spec == spec


def test_a_marked_dimension_is_left_symbolic_by_dynamo():
    seen = []

    def catch(module, _inputs):
        seen.extend(f.shape for f in _torch.dynamo_inputs(module) if isinstance(f, torch.Tensor))
        return module.forward

    x = torch.randn(3, 4)
    _torch.mark_dynamic(x, frozenset({0}))
    torch.compile(lambda x: x * 2, backend=catch)(x)
    assert [type(n) for n in seen[0]] == [torch.SymInt, int]


def test_the_gradient_of_a_pooling_window_that_hangs_over_the_end_is_divided_by_its_places_inside():
    """Without the mend both differ from the gradient of the pooling."""
    x, options = torch.randn(1, 2, 6, 8), (([3, 3], [2, 2], [0, 0]), ([3, 3], [2, 2], [1, 1]))

    def gradients(x, *grads):
        pools = zip(grads, options, strict=True)
        return [torch.ops.aten.avg_pool2d_backward(g, x, *o, True, True, None) for g, o in pools]

    _torch_mends.divide_by_places_inside()
    grads = [torch.randn_like(F.avg_pool2d(x, *o, True)) for o in options]
    for found, wanted in zip(torch.compile(gradients)(x, *grads), gradients(x, *grads), strict=True):
        assert (found - wanted).abs().max() < 1e-6


def test_inductor_keeps_axes_of_attention():
    """Without the mend its patterns take each of these for the usual exchange of tokens and heads, or softmax."""
    usual, unusual = (0, 2, 1, 3), ((0, 2, 3, 1), (1, 0, 3, 2), (0, 3, 1, 2))

    def attend(q, k, v, axis=3):
        return (q @ k.transpose(2, 3) * 0.2).softmax(axis) @ v

    def forms(q, k, v):
        found = [attend(q.permute(p), k.permute(p), v.permute(p)) for p in (usual, *unusual)]
        return [*found, attend(q, k, v, axis=2), attend(q, k, v, axis=1)]

    _torch_mends.keep_axes_of_attention()
    given = torch.randn(3, 2, 8, 8, 4).unbind(0)
    wanted = forms(*(t.double() for t in given))
    with torch.no_grad():
        for found, want in zip(torch.compile(forms)(*given), wanted, strict=True):
            assert (found - want).abs().max() < 1e-5


def test_inductor_is_told_the_strides_that_it_would_find():
    """The mend's shortcut for sums of products, and the questions that it hands on, give what Inductor gives."""
    import sympy
    from torch._inductor.codegen import cpp
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    original = getattr(cpp.stride_at_vec_range, "asked", cpp.stride_at_vec_range)
    _torch_mends.know_strides_of_plain_indices()
    d0, d1, s0 = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("d0", "d1", "s0"))
    indices = [
        d0 * 196 + d1, d1 * s0 + d0, sympy.Integer(7), s0 * (d0 + 3 * d1), d0 * d1 + d1, FloorDiv(d1, 16) + d0,
        14 * FloorDiv(d1, 14) + ModularIndexing(d1, 1, 14), 3 * ModularIndexing(d1, 1, 32) + d0, sympy.Max(d1, 3) + d0,
    ]  # fmt: skip
    for index in indices:
        for var in (d0, d1):
            for length in (None, 16):
                found = cpp.stride_at_vec_range(index, var, length)
                assert sympy.simplify(found - original(index, var, length)) == 0, (index, var, length)
