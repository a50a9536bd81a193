"""Lowering for a CUDA target, without one: vocabulary ops become launches of Triton kernels, or say why not."""

import pytest
import torch
from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.ops.attention import attention_with_class_row
from compiled_attn.ops.local import local_attention
from compiled_attn.ops.tokens import select_tokens
from compiled_attn.runtime.capture import capture
from compiled_attn.runtime.lower import lower

pytest.importorskip("triton")


class Selecting(nn.Module):
    """Attention with its class row, and the tokens that the row likes best."""

    def forward(self, x):
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        out, row = attention_with_class_row(q, q, q, None, scale=0.25)
        return select_tokens(out.transpose(1, 2).flatten(2), row[:, 1:], 5, fuse=True)[0]


def lowered(target, width=32):
    program = capture(Selecting(), (torch.randn(2, 10, 2 * width),), dynamic_shapes={"x": {0: "batch"}})
    notes = Notes()
    result = lower(program, targets.load(target), notes)
    return [str(node.target) for node in result.graph.nodes if node.op == "call_function"], result, notes


def test_each_vocabulary_op_becomes_the_launch_of_its_kernel_and_keeps_its_shape():
    names, result, _ = lowered("h100")
    assert "compiled_attn_triton.attention_with_class_row.default" in names
    assert "compiled_attn_triton.select_tokens.default" in names
    assert not any(name.startswith("compiled_attn.") for name in names)
    (out,) = result.graph.output_node().args[0]
    assert tuple(out.meta["val"].shape[1:]) == (1 + 5 + 1, 64)
    assert not isinstance(out.meta["val"].shape[0], int)


def test_a_head_too_wide_for_the_kernel_is_decomposed_with_a_miss():
    names, _, notes = lowered("h100", width=300)
    assert "compiled_attn_triton.attention_with_class_row.default" not in names
    assert "compiled_attn_triton.select_tokens.default" in names
    assert any("its head width is 300" in miss.because for miss in notes.misses)


def test_a_gpu_before_the_tensor_cores_of_triton_gets_the_decomposition():
    names, _, notes = lowered("t4")
    assert not any("compiled_attn" in name for name in names)
    assert len(notes.misses) == 2


class Windows(nn.Module):
    """Shifted windows of 4 by 4 with a bias, on a map of any height, and pointwise work around them."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 7, 7))

    def forward(self, x):
        q, k, v = (0.5 * x).unflatten(-1, (3, 2, 16)).unbind(-3)
        pattern = {"window": [4, 4], "stride": [4, 4], "shift": [2, 2], "border": "mask"}
        return torch.nn.functional.silu(local_attention(q, k, v, self.table, scale=0.25, **pattern))


def test_local_attention_becomes_one_launch_that_reads_q_k_and_v_in_place():
    shapes = {"x": {0: "batch", 1: 4 * torch.export.Dim("rows", min=1, max=20)}}
    program = capture(Windows().eval(), (torch.randn(2, 8, 12, 96),), dynamic_shapes=shapes)
    notes = Notes()
    result = lower(program, targets.load("a100"), notes)
    names = [str(node.target) for node in result.graph.nodes if node.op == "call_function"]
    assert names.count("compiled_attn_triton.local_attention.default") == 1
    assert not any(word in name for name in names for word in ("clone", "contiguous", "index", "gather"))
    assert [note.what for note in notes.done] == ["triton_local_attention"] and not notes.misses
