"""Ragged ops: the laws' cases drawn at random, sequences one by one, and export with counts that the data decide."""

from __future__ import annotations

from pathlib import Path

import laws
import pytest
import torch
from hypothesis import given, settings
from ragged_strategies import PackSpec, RaggedSpec, offsets, ragged_specs
from strategies import Inputs

import compiled_attn as ca
from compiled_attn.ir.errors import OpError
from compiled_attn.ops.ragged import pack_tokens, ragged_attention, unpack_tokens


@settings(max_examples=60, deadline=None)
@given(ragged_specs())
def test_a_ragged_batch_equals_its_sequences_one_by_one(spec: RaggedSpec) -> None:
    q, k, v, q_offsets, k_offsets = spec.make(torch.float64)
    out = ragged_attention.decomposition(q, k, v, q_offsets, k_offsets, **spec.options)
    laws.near(out, ragged_attention.reference(q, k, v, q_offsets, k_offsets, **spec.options), 1e-12)
    bound = {**spec.options, "longest": spec.longest + spec.seed % 2}
    laws.near(out, ragged_attention.decomposition(q, k, v, q_offsets, k_offsets, **bound), 1e-12)
    for b in range(len(spec.queries)):
        rows, keys = slice(*q_offsets[b : b + 2].tolist()), slice(*k_offsets[b : b + 2].tolist())
        ends = (torch.tensor([0, t.shape[0]]) for t in (q[rows], k[keys]))
        laws.near(out[rows], ragged_attention(q[rows], k[keys], v[keys], *ends, **spec.options), 1e-12)


@settings(max_examples=20, deadline=None)
@given(ragged_specs())
def test_the_gradient_of_a_ragged_batch_is_that_of_the_equation(spec: RaggedSpec) -> None:
    laws.gradient_equals_autograd_of_the_reference(ragged_attention, Inputs("drawn", spec.make, spec.options))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_unpacking_undoes_packing(share: float) -> None:
    x, keep = PackSpec(share=share, seed=7).tensors(torch.float32)
    tokens, place, begins = pack_tokens(x, keep)
    assert begins.tolist() == offsets(tuple(keep.sum(1).tolist())).tolist()
    canvas = torch.full(x.shape, -1.0)
    found = unpack_tokens(tokens, place, canvas)
    assert torch.equal(found, x.where(keep.unsqueeze(2), torch.tensor(-1.0)))


class Pruned(torch.nn.Module):
    """Attention of the tokens that a threshold keeps, the others all become one row."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)
        self.empty = torch.nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, place, begins = torch.ops.compiled_attn.pack_tokens(x, x[..., 0] > 0)
        q, k, v = self.qkv(tokens).unflatten(1, (3, 2, 4)).unbind(1)
        out = torch.ops.compiled_attn.ragged_attention(q, k, v, begins, begins, scale=0.5)
        canvas = self.empty.sin().expand(x.shape[0], x.shape[1], -1)  # one row's memory for all
        return torch.ops.compiled_attn.unpack_tokens(out.flatten(1), place, canvas)


def by_picture(net: Pruned, x: torch.Tensor) -> torch.Tensor:
    out = net.empty.sin().expand_as(x).clone()
    for b, rows in enumerate(x):
        kept = rows[:, 0] > 0
        q, k, v = net.qkv(rows[kept]).unflatten(1, (3, 2, 4)).permute(1, 2, 0, 3)
        seen = (q @ k.mT * 0.5).softmax(2) @ v
        out[b, kept] = seen.transpose(0, 1).flatten(1)
    return out


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_export_runs_batches_whose_counts_differ_from_those_at_capture(decomposed: bool) -> None:
    torch.manual_seed(0)
    net = Pruned().eval()
    batch = {"x": {0: torch.export.Dim("batch", max=64)}}
    program = torch.export.export(net, (torch.randn(2, 7, 8),), dynamic_shapes=batch, strict=False)
    if decomposed:
        table = {op.overload: op.decomposition for op in (pack_tokens, unpack_tokens, ragged_attention)}
        program = program.run_decompositions(table)
        assert not any("compiled_attn" in str(node.target) for node in program.graph.nodes)
    run = program.module()
    with torch.no_grad():
        for size in (1, 2, 5):
            x = torch.randn(size, 7, 8, generator=torch.Generator().manual_seed(size))
            laws.near(run(x), by_picture(net, x), 1e-5)


def test_package_and_onnx_run_batches_whose_counts_differ_from_those_at_capture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, given = Pruned().eval(), (torch.randn(2, 7, 8),)
    shapes = {"x": {0: "batch"}}
    ca.export(net, given, path=tmp_path / "net.pt2", dynamic_shapes=shapes)
    ca.export(net, given, path=tmp_path / "net.onnx", dynamic_shapes=shapes)
    run = ca.load(tmp_path / "net.pt2")
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "net.onnx")
    with torch.no_grad():
        for size in (1, 3):
            x = torch.randn(size, 7, 8, generator=torch.Generator().manual_seed(size))
            laws.near(run(x), by_picture(net, x), 1e-5)
            found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
            laws.near(torch.from_numpy(found), by_picture(net, x), 1e-5)


def test_the_gradient_passes_through_packing_and_unpacking() -> None:
    torch.manual_seed(0)
    net = Pruned().double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(3, 5, 8, dtype=torch.float64)
    found = torch.autograd.grad(net(x), [x, *net.parameters()], towards)
    wanted = torch.autograd.grad(by_picture(net, x), [x, *net.parameters()], towards)
    for a, b in zip(found, wanted, strict=True):
        laws.near(a, b, 1e-10)


@pytest.mark.parametrize("begins", [[0, 2, 4], [1, 2, 5], [0, 4, 3, 5], [0, 2, 6]])
def test_offsets_that_do_not_cut_all_rows_into_sequences_are_refused(begins):
    q, of = torch.randn(5, 2, 4), torch.tensor(begins)
    with pytest.raises(OpError, match="does not cut all packed rows"):
        ragged_attention(q, q, q, of, of, scale=0.5)


def test_a_sequence_longer_than_was_said_is_refused():
    q, of = torch.randn(5, 2, 4), torch.tensor([0, 2, 5])
    with pytest.raises(OpError, match="longer than was said"):
        ragged_attention(q, q, q, of, of, scale=0.5, longest=2)
