"""The cost model: the papers' figures, symbols that stay symbols, and the roof of a target."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compiled_attn.ir import targets
from compiled_attn.ir.cost import at, bounds, node_cost, program_cost, roofline
from compiled_attn.ir.op import Cost
from compiled_attn.ops.attention import attention, attention_with_class_row
from compiled_attn.ops.tokens import select_tokens
from compiled_attn.runtime.capture import capture
from compiled_attn.zoo import deit


class Wrapped(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def cost_of(function, *args):
    module = function if isinstance(function, nn.Module) else Wrapped(function)
    return program_cost(capture(module.eval(), args))


@pytest.fixture(scope="module")
def deit_small():
    model = deit.DeiT(deit.PAPER.variants["deit_s"]).eval()
    return capture(model, (torch.randn(2, 3, 224, 224),), dynamic_shapes={"x": {0: "batch"}})


def test_deit_small_takes_the_multiply_adds_that_its_card_states(deit_small):
    one = at(program_cost(deit_small), {str(s): 1 for s in deit_small.ranges})
    assert round(one.flops / 2e9, 3) == 4.608


def test_a_symbolic_batch_stays_a_symbol_and_scales_the_flops(deit_small):
    cost = program_cost(deit_small)
    (symbol,) = cost.flops.free_symbols
    assert symbol in deit_small.ranges
    assert at(cost, {str(symbol): 8}).flops == 8 * at(cost, {str(symbol): 1}).flops
    weights = sum(t.numel() * t.element_size() for t in deit_small.state.values())
    assert weights < at(cost, {str(symbol): 1}).bytes < 12 * weights


def test_a_symbolic_token_count_gives_a_polynomial_with_bounds():
    def block(x):
        q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for _ in range(3))
        return F.scaled_dot_product_attention(q, k, v)

    dims = {"args": ({1: torch.export.Dim("tokens", min=2, max=100)},)}
    program = capture(Wrapped(block), (torch.randn(1, 10, 16),), dynamic_shapes=dims)
    cost = program_cost(program)
    (symbol,) = cost.flops.free_symbols
    assert cost.flops == 64 * symbol**2  # two products: 2 x 2 heads x 8 wide x N x N each
    low, high = bounds(cost, program.ranges)
    assert (low.flops, high.flops) == (64 * 4, 64 * 100**2)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (F.linear, ((3, 5, 8), (16, 8), (16,))),
        (torch.matmul, ((2, 3, 4, 5), (2, 3, 5, 6))),
        (torch.mm, ((4, 5), (5, 6))),
        (torch.bmm, ((2, 4, 5), (2, 5, 6))),
        (torch.addmm, ((6,), (4, 5), (5, 6))),
        (torch.baddbmm, ((2, 4, 6), (2, 4, 5), (2, 5, 6))),
        (F.conv2d, ((2, 3, 9, 9), (4, 3, 3, 3), (4,))),
        (lambda x, w: F.conv2d(x, w, groups=3, padding=1, stride=2), ((2, 3, 9, 9), (6, 1, 3, 3))),
        (F.conv_transpose2d, ((2, 3, 9, 9), (3, 4, 3, 3))),
        (F.scaled_dot_product_attention, ((2, 3, 4, 8), (2, 3, 7, 8), (2, 3, 7, 5))),
        (lambda x, y: torch.einsum("bhnd,bhmd->bhnm", x, y), ((2, 3, 4, 5), (2, 3, 6, 5))),
    ],
)
def test_products_count_what_torch_counts(function, shapes):
    args = [torch.randn(shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        function(*args)
    assert cost_of(function, *args).flops == counter.get_total_flops()


def test_a_node_reads_its_inputs_and_writes_its_output_once():
    assert cost_of(F.gelu, torch.randn(3, 5)) == Cost(0, 2 * 15 * 4)
    assert cost_of(torch.add, torch.randn(3, 5), torch.randn(5)) == Cost(0, (15 + 5 + 15) * 4)
    assert cost_of(lambda x: x.transpose(0, 1)[1:].unsqueeze(0), torch.randn(3, 5)) == Cost(0, 0)
    assert cost_of(lambda x, i: x[i], torch.randn(300, 5), torch.tensor([7])) == Cost(0, 5 * 4 + 8 + 5 * 4)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_costs_the_same_to_our_rule_and_to_torchs_counter(causal):
    q = torch.randn(2, 3, 10, 8)
    with FlopCounterMode(display=False) as counter:
        attention(q, q, q, None, scale=1.0, causal=causal)
    assert counter.get_total_flops() == attention.cost(q, q, q, None, scale=1.0, causal=causal).flops > 0


def test_vocabulary_nodes_bring_their_own_cost():
    def select(x):
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        out, row = attention_with_class_row(q, q, q, None, scale=1.0)
        return select_tokens(out.transpose(1, 2).flatten(2), row[:, 1:], 4, fuse=True)[0]

    x = torch.randn(1, 10, 16)
    program = capture(Wrapped(select), (x,))
    costs = {str(n.target): node_cost(n) for n in program.graph.nodes}
    q = x.unflatten(-1, (2, 8)).transpose(1, 2)
    assert costs["compiled_attn.attention_with_class_row.default"] == attention_with_class_row.cost(q, q, q, scale=1.0)
    assert costs["compiled_attn.select_tokens.default"].bytes > 2 * 10 * 16 * 2


def test_the_roof_is_the_longer_of_arithmetic_and_memory(deit_small):
    h100 = targets.load("h100")
    assert roofline(Cost(989.4e12, 1), h100, torch.bfloat16) == pytest.approx(1.0)
    assert roofline(Cost(67e12, 1), h100) == pytest.approx(1.0)
    assert roofline(Cost(1, 3350e9), h100, torch.bfloat16) == pytest.approx(1.0)
    symbolic = roofline(program_cost(deit_small), h100)
    assert len(symbolic.free_symbols) == 1
    one = at(program_cost(deit_small), {str(s): 1 for s in deit_small.ranges})
    assert math.isclose(
        float(symbolic.subs(dict.fromkeys(symbolic.free_symbols, 1))), roofline(one, h100), rel_tol=1e-9
    )
