"""SDPA for a GPU that is not here becomes torch's fused operators, or says why not."""

import pytest
import torch
from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.errors import LowerError
from compiled_attn.ir.notes import Notes
from compiled_attn.runtime.capture import capture
from compiled_attn.runtime.cross_attention import fuse_attention

SDPA = "aten.scaled_dot_product_attention.default"
FLASH = "aten._scaled_dot_product_flash_attention.default"
EFFICIENT = "aten._scaled_dot_product_efficient_attention.default"


class Attention(nn.Module):
    """SDPA on [batch, 2, tokens, width] and, behind it, a view of the joined heads."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, mask=None):
        """q [B,2,N,D], k [B,2,M,D] -> [B,N,2D]."""
        y = nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, **self.options)
        return y.transpose(1, 2).flatten(2)


def fused(target, dtype, width=16, keys=12, mask=None, strict=False, dynamic=False, **options):
    """The SDPA operators left after the pass, the program and the notes."""
    args = (torch.randn(2, 2, 12, width).to(dtype), torch.randn(2, 2, keys, width).to(dtype), mask)
    shapes = ({0: "batch"}, {0: "batch"}, None) if dynamic else None
    program = capture(Attention(**options), args, dynamic_shapes=shapes)
    notes = Notes()
    result = fuse_attention(program, targets.load(target), notes, strict=strict)
    names = [str(n.target) for n in result.graph.nodes if "scaled_dot_product" in str(n.target)]
    return names, result, notes


CAUSAL = torch.ones(12, 12, dtype=torch.bool).tril()
ADDED = torch.linspace(-1, 1, 288).reshape(1, 2, 12, 12).half()


@pytest.mark.parametrize(
    ("target", "dtype", "options", "expected"),
    [
        ("a100", torch.float16, {}, FLASH),
        ("a100", torch.bfloat16, {}, FLASH),
        ("h100", torch.float16, {"is_causal": True}, FLASH),
        ("h100", torch.float16, {"is_causal": True, "keys": 20}, EFFICIENT),
        ("l4", torch.float32, {}, EFFICIENT),
        ("t4", torch.float16, {}, EFFICIENT),
        ("t4", torch.bfloat16, {}, SDPA),
        ("a100", torch.float16, {"width": 12}, SDPA),
        ("a100", torch.float32, {"width": 12}, EFFICIENT),
        ("a100", torch.float64, {}, SDPA),
        ("a100", torch.float16, {"scale": 0.5}, FLASH),
        ("a100", torch.float16, {"mask": CAUSAL}, EFFICIENT),
        ("a100", torch.float16, {"mask": ADDED}, EFFICIENT),
        ("a100", torch.float16, {"dynamic": True, "mask": ADDED}, EFFICIENT),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value),
)
def test_the_operator_that_torch_would_choose_on_the_device_is_written(target, dtype, options, expected):
    names, result, notes = fused(target, dtype, **options)
    assert names == [expected]
    (out,) = result.graph.output_node().args[0]
    assert tuple(out.meta["val"].shape[1:]) == (12, 2 * options.get("width", 16)) and out.meta["val"].dtype == dtype
    assert len(notes.done) == (expected != SDPA) and len(notes.misses) == (expected == SDPA)


def test_a_mask_reaches_the_operator_as_a_bias_of_the_whole_shape():
    _, result, _ = fused("a100", torch.float16, mask=torch.ones(12, 12, dtype=torch.bool).tril())
    node = next(n for n in result.graph.nodes if str(n.target) == EFFICIENT)
    assert tuple(node.args[3].meta["val"].shape) == (2, 2, 12, 12)
    assert node.args[3].meta["val"].dtype == torch.float16


def test_the_scale_is_always_stated():
    for options, scale in (({}, 0.25), ({"scale": 0.5}, 0.5)):
        _, result, _ = fused("a100", torch.float16, **options)
        assert next(n for n in result.graph.nodes if str(n.target) == FLASH).kwargs["scale"] == scale


def test_a_symbolic_batch_stays_one():
    _, result, _ = fused("a100", torch.float16, dynamic=True)
    (out,) = result.graph.output_node().args[0]
    assert not isinstance(out.meta["val"].shape[0], int)


def test_what_no_operator_covers_is_a_miss_and_with_strict_an_error():
    _, _, notes = fused("a100", torch.float16, width=12)
    assert "its head width is 12" in notes.misses[0].because
    with pytest.raises(LowerError, match="no fused operator serves") as caught:
        fused("a100", torch.float16, width=12, strict=True)
    assert caught.value.do


def test_a_program_without_attention_is_the_same_object():
    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    assert fuse_attention(program, targets.load("a100"), Notes()) is program
