"""RaiseAttention on hand-written forms: what is raised stays equal, what must be refused is, with its sentence."""

from __future__ import annotations

import pytest
import torch
from attention_forms import CAPPED, FORMS, REFUSED, B, C, Form, N

from compiled_attn import ops
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.fold_constants import FoldConstants
from compiled_attn.passes.raise_attention import SDPA, RaiseAttention, attention_blocks
from compiled_attn.runtime.capture import capture

DYNAMIC = {"x": {0: "batch"}}


def raised(program: Program) -> tuple[Program, Notes]:
    """Raises, with the runner's verification, and checks that no guard was added on a symbolic size."""
    notes = Notes()
    env = program.shape_env
    before = 0 if env is None else len(env.guards)
    result, _ = run_passes(program, [RaiseAttention()], None, notes)  # type: ignore[arg-type]
    assert env is None or len(env.guards) == before
    return result, notes


def captured(block: torch.nn.Module, *, dynamic: bool = True, mode: str = "inference") -> Program:
    return capture(block, (torch.randn(B, N, C),), dynamic_shapes=DYNAMIC if dynamic else None, mode=mode)


def nodes(program: Program, target: object) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if n.target is target]


def error(model: torch.nn.Module, program: Program, batch: int = 3) -> float:
    x = torch.randn(batch, N, C, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = model(x), program(x)
    return float((want - got).abs().max() / want.abs().max())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_becomes_one_sdpa_node_with_eager_numbers_at_1e_5(form: Form) -> None:
    block = form.block()
    program, notes = raised(captured(block))
    assert [note.what for note in notes.done] == [form.says], str(notes)
    assert not notes.misses
    (node,) = nodes(program, SDPA)
    assert all(a.meta["val"].dim() == 4 for a in node.args[:3])
    assert not nodes(program, torch.ops.aten.softmax.int)
    assert error(block, program) < 1e-5


@pytest.mark.parametrize("form", CAPPED.values(), ids=CAPPED.keys())
def test_scores_capped_by_tanh_make_one_node_of_the_vocabulary_with_eager_numbers_at_1e_5(form: Form) -> None:
    block = form.block()
    program, notes = raised(captured(block))
    assert [note.what for note in notes.done] == [form.says] and not notes.misses
    assert len(nodes(program, ops.attention.overload)) == 1
    assert not nodes(program, torch.ops.aten.softmax.int) and not nodes(program, torch.ops.aten.tanh.default)
    assert error(block, program) < 1e-5
    assert [len(found) for found in attention_blocks(program)] == [1, 0]


def test_capped_scores_stay_in_training() -> None:
    program = captured(CAPPED["capped"].block(), mode="train")
    result, notes = raised(program)
    assert result is program
    assert "(tanh) stands between the scores" in notes.misses[0].because


@pytest.mark.parametrize("form", REFUSED.values(), ids=REFUSED.keys())
def test_every_near_miss_is_refused_with_its_sentence_and_the_program_stays(form: Form) -> None:
    program = captured(form.block())
    result, notes = raised(program)
    assert result is program
    assert len(notes.misses) == 1
    assert form.says in notes.misses[0].because, notes.misses[0].because


@pytest.mark.parametrize(
    "name", ["scaled before", "flat bmm", "bias by head, mask by window", "windows in five dimensions"]
)
def test_static_shapes_are_raised_alike(name: str) -> None:
    block = FORMS[name].block()
    program, notes = raised(captured(block, dynamic=False))
    assert [n.what for n in notes.done] == [FORMS[name].says]
    assert error(block, program, batch=B) < 1e-5


@pytest.mark.parametrize(
    "name", ["scaled before", "flat bmm", "einsum, tokens first", "tokens first", "softmax by hand"]
)
def test_no_copy_is_added_and_q_k_v_are_views_of_the_projections(name: str) -> None:
    before = captured(FORMS[name].block(fused=True))
    program, _ = raised(before)
    copies = (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default, torch.ops.aten._to_copy.default)
    count = [sum(n.target in copies for n in p.graph.nodes) for p in (before, program)]
    assert count[1] <= count[0]
    (node,) = nodes(program, SDPA)
    for argument in node.args[:3]:
        while argument.target is not torch.ops.aten.linear.default:
            assert argument.target not in copies
            argument = argument.args[0]


def test_a_second_run_changes_nothing_and_the_same_program_gives_the_same_text() -> None:
    first, _ = raised(captured(FORMS["bias by head, mask by window"].block()))
    second, notes = raised(first)
    assert second is first and not list(notes)
    again, _ = raised(captured(FORMS["bias by head, mask by window"].block()))
    assert str(again) == str(first)


def test_every_new_node_says_where_it_comes_from() -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = FORMS["several biases"].block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    program, notes = raised(captured(Outer()))
    assert [n.where for n in notes.done] == ["inner"]
    assert all("nn_module_stack" in n.meta and n.meta.get("stack_trace") for n in nodes(program, SDPA))


@pytest.mark.parametrize(
    "name", ["scaled after", "flat bmm", "over channels", "softmax by hand", "masked with minimum"]
)
def test_a_symbolic_number_of_tokens_is_raised_and_stays_symbolic(name: str) -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = FORMS["scaled after"].block(fused=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.view(*x.shape[:2], 3, 8).transpose(1, 2) for t in self.block.qkv(x).chunk(3, -1))
            if name == "flat bmm":
                q, k, v = (t.reshape(-1, x.shape[1], 8) for t in (q, k, v))
            if name == "over channels":
                q, k, v = (t.mT for t in (q, k, v))
            scores = q @ k.mT / q.shape[-1] ** 0.5
            if name == "masked with minimum":
                tokens = torch.arange(x.shape[1])
                scores = scores.masked_fill(tokens[:, None] < tokens, torch.finfo(x.dtype).min)
            if name == "softmax by hand":
                scores = (scores - scores.amax(-1, keepdim=True)).exp()
                weights = scores / scores.sum(-1, keepdim=True)
            else:
                weights = scores.softmax(-1)
            out = weights @ v
            if name == "flat bmm":
                out = out.view(x.shape[0], 3, x.shape[1], 8)
            out = out.mT if name == "over channels" else out
            return out.transpose(1, 2).flatten(2)

    model = Masked()
    program = capture(model, (torch.randn(B, N, C),), dynamic_shapes={"x": {0: "batch", 1: "tokens"}})
    result, notes = raised(program)
    assert len(notes.done) == 1, str(notes)
    x = torch.randn(3, 11, C)
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-5)


def test_softmax_in_float32_between_bfloat16_products_is_raised_to_bfloat16_within_2e_2() -> None:
    class Mixed(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            scores = (q.float() @ k.float().mT) * 0.25
            return torch.softmax(scores, -1).to(v.dtype) @ v

    inputs = [torch.randn(B, 3, N, 8, dtype=torch.bfloat16) for _ in range(3)]
    program, notes = raised(capture(Mixed(), inputs))
    assert [n.what for n in notes.done] == ["softmax(q k^T * 0.25) v"]
    (node,) = nodes(program, SDPA)
    assert all(a.op == "placeholder" for a in node.args[:3])
    torch.testing.assert_close(program(*inputs), Mixed()(*inputs), rtol=2e-2, atol=2e-2)


def test_q_and_k_wider_than_v_are_refused() -> None:
    class Mixed(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return (q @ k.mT).softmax(-1).to(v.dtype) @ v

    inputs = [torch.randn(B, 3, N, 8), torch.randn(B, 3, N, 8), torch.randn(B, 3, N, 8, dtype=torch.bfloat16)]
    _, notes = raised(capture(Mixed(), inputs))
    assert "is f32[2, 3, 6, 8] while v is bf16[2, 3, 6, 8]" in notes.misses[0].because


def test_a_row_masked_whole_by_minus_infinity_gives_zero_and_the_note_says_so() -> None:
    class Masked(torch.nn.Module):
        def forward(self, q: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return (q @ q.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ q

    q, keep = torch.randn(1, 2, N, 8), torch.ones(N, N, dtype=torch.bool)
    keep[3] = False
    program, notes = raised(capture(Masked(), (q, keep)))
    assert notes.done[0].measure == "a row masked whole gives 0 (softmax: NaN)"
    eager, got = Masked()(q, keep), program(q, keep)
    assert eager[:, :, 3].isnan().all() and (got[:, :, 3] == 0).all()
    others = [i for i in range(N) if i != 3]
    torch.testing.assert_close(got[:, :, others], eager[:, :, others], rtol=1e-5, atol=1e-5)


def test_a_row_masked_whole_by_a_billion_stays_uniform_and_the_note_states_its_condition() -> None:
    block = FORMS["masked with -1e9, one row whole"].block()
    program, notes = raised(captured(block))
    assert notes.done[0].measure == "each row keeps a score above -1e+09 or is masked whole"
    assert error(block, program) < 1e-5


def test_dropout_in_training_is_raised_with_its_probability_and_the_gradients_of_eager_without_it() -> None:
    block = FORMS["dropout in inference"].block(dropout=0.25).train()
    program, notes = raised(captured(block, mode="train"))
    assert notes.done[0].what == "dropout(0.25) softmax(q k^T * 0.25) v"
    (node,) = nodes(program, SDPA)
    assert node.args[4] == 0.25
    plain = FORMS["dropout in inference"].block(dropout=0.0).train()
    program, _ = raised(captured(plain, mode="train"))
    x = torch.randn(B, N, C)
    module = program.to_exported().module()
    want = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters())[4:8])
    got = torch.autograd.grad(module(x).square().sum(), list(plain.parameters())[4:8])
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_left_on_in_an_inference_capture_is_raised_or_named() -> None:
    block = FORMS["dropout in inference"].block(dropout=0.25).train()
    program, notes = raised(captured(block))
    assert [n.what for n in notes.done] == ["dropout(0.25) softmax(q k^T * 0.25) v"], str(notes)
    assert not nodes(program, torch.ops.aten.native_dropout.default)


def test_attention_that_is_one_node_already_is_counted_as_present() -> None:
    class Fused(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    program = capture(Fused(), (torch.randn(2, 3, 4, 8),))
    result, notes = raised(program)
    assert result is program and not list(notes)
    assert [len(found) for found in attention_blocks(program)] == [1, 0]


def test_a_softmax_that_meets_no_product_is_not_mentioned() -> None:
    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(C, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x).softmax(-1)

    _, notes = raised(captured(Classifier()))
    assert not list(notes)


def test_a_tensor_written_in_place_between_the_products_is_refused_in_training() -> None:
    class Writes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x * 2
            weights = (q @ x.mT).softmax(-1)
            q.add_(1.0)
            return weights @ x + q

    _, notes = raised(capture(Writes(), (torch.randn(2, 3, 4, 8),), mode="train"))
    assert "writes in place between" in notes.misses[0].because


def test_a_scale_that_was_folded_from_a_parameter_stays_a_value_of_the_graph() -> None:
    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.tensor(-1.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x.mT * self.log_scale.exp()).softmax(-1) @ x

    program, _ = run_passes(capture(Learned(), (torch.randn(2, 3, 4, 8),)), [FoldConstants()], None, Notes())  # type: ignore[arg-type]
    assert any(program.origin.values())
    result, notes = raised(program)
    assert [n.what for n in notes.done] == ["softmax(q k^T * factor) v"]
    assert any(result.origin.values())
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(result(x), Learned()(x), rtol=1e-5, atol=1e-5)
