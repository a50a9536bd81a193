"""Masks that hide nothing go; a mask that hides one key, or may, stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.passes import Canonicalize, FoldConstants, run_passes
from compiled_attn.passes.drop_open_masks import DropOpenMasks
from compiled_attn.runtime.capture import capture


class Masked(nn.Module):
    """Self-attention under a mask [N, N] made from the number of tokens."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        q = x.unsqueeze(1)
        mask = self.mask(torch.arange(x.shape[1], device=x.device))
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask.expand(x.shape[0], 1, x.shape[1], x.shape[1]))


OPEN = {
    "at least the first": lambda i: i[:, None] >= 0,
    "shifted": lambda i: (i + 3)[None, :] > 2,
    "both": lambda i: (i[:, None] >= 0) & (i[None, :] >= -1),
    "either": lambda i: (i[:, None] >= i[None, :]) | (i[None, :] >= 0),
}
HIDING = {
    "not the first": lambda i: (i[:, None] > 0) | (i[:, None] == i[None, :]),
    "causal": lambda i: i[:, None] >= i[None, :],
    "shifted too little": lambda i: ((i + 2)[None, :] > 2) | (i[:, None] == i[None, :]),
    "one of both": lambda i: (i[:, None] >= 0) & (i[:, None] >= i[None, :]),
}


def run(model, *, symbolic):
    x = torch.randn(2, 9, 8)
    shapes = ({0: "batch", 1: "tokens"},) if symbolic else None
    program = capture(model, (x,), dynamic_shapes=shapes)
    passes = (Canonicalize(), FoldConstants(), DropOpenMasks())
    after, _ = run_passes(program, passes, targets.load("cpu"), Notes(), compare=True)
    other = torch.randn(3, 14, 8) if symbolic else x
    torch.testing.assert_close(after(other), model(other), rtol=1e-5, atol=1e-6)
    (node,) = [n for n in after.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    return (len(node.args) > 3 and node.args[3] is not None) or "attn_mask" in node.kwargs


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("name", OPEN)
def test_a_mask_that_is_true_everywhere_goes(name, symbolic):
    assert not run(Masked(OPEN[name]), symbolic=symbolic)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("name", HIDING)
def test_a_mask_that_hides_a_key_stays(name, symbolic):
    assert run(Masked(HIDING[name]), symbolic=symbolic)


def test_a_mask_that_the_model_owns_stays_since_it_may_be_written_to():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(9, 9, dtype=torch.bool))

        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)

    program = capture(Owner(), (torch.randn(2, 1, 9, 8),))
    assert DropOpenMasks().run(program, targets.load("cpu"), Notes()) is program


def test_a_mask_that_is_an_input_stays():
    class Asked(nn.Module):
        def forward(self, x, mask):
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    program = capture(Asked(), (torch.randn(2, 1, 9, 8), torch.ones(9, 9, dtype=torch.bool)))
    assert DropOpenMasks().run(program, targets.load("cpu"), Notes()) is program
