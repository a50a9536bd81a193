"""RaiseAttention on hand-written forms: what is raised stays equal, what must be refused is, with its sentence."""

from __future__ import annotations

import pytest
import torch

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.raise_attention import SDPA, RaiseAttention, attention_blocks
from compiled_attn.runtime.capture import capture
from attention_forms import FORMS, REFUSED, B, Block, C, Form, N

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


@pytest.mark.parametrize("form", REFUSED.values(), ids=REFUSED.keys())
def test_every_near_miss_is_refused_with_its_sentence_and_the_program_stays(form: Form) -> None:
    program = captured(form.block())
    result, notes = raised(program)
    assert result is program
    assert len(notes.misses) == 1
    assert form.says in notes.misses[0].because, notes.misses[0].because


@pytest.mark.parametrize("name", ["scaled before", "flat bmm", "bias by head, mask by window", "windows in five dimensions"])
def test_static_shapes_are_raised_alike(name: str) -> None:
    block = FORMS[name].block()
    program, notes = raised(captured(block, dynamic=False))
    assert [n.what for n in notes.done] == [FORMS[name].says]
    assert error(block, program, batch=B) < 1e-5


@pytest.mark.parametrize("name", ["scaled before", "flat bmm", "einsum, tokens first", "tokens first", "softmax by hand"])
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
