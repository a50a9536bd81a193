"""Lowering for a CUDA target, without one: vocabulary ops become launches of Triton kernels, or say why not."""

import pytest
import torch
from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.ops.attention import attention_with_class_row
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
