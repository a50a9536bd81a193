"""pool-products: averages over uneven bands as products, with the numbers of ATen's adaptive pools."""

import pytest
import torch
from torch import nn

import compiled_attn as ca
from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.pool_products import PoolProducts
from compiled_attn.runtime.capture import capture

aten = torch.ops.aten
TARGET = targets.load("zen5")


class Pooled(nn.Module):
    """Averages of a map, read by a view that asks for dense memory."""

    def __init__(self, count) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(count) if isinstance(count, int) else nn.AdaptiveAvgPool2d(count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pool(x * 2)
        return (y.view(y.shape[0], -1) if y.is_contiguous() else y.flatten(1)).relu()


def run(model: nn.Module, x: torch.Tensor, **options):
    notes = Notes()
    program = capture(model.eval(), (x,), **options)
    changed, _ = run_passes(program, [PoolProducts()], TARGET, notes, compare=True)
    return program, changed, notes


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((2, 3, 49), 9),
        ((1, 5, 10), 3),
        ((2, 3, 3), 5),
        ((2, 3, 14, 10), (3, 4)),
        ((1, 4, 7, 6), (7, 4)),
        ((2, 3, 5, 4), 3),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_uneven_bands_become_a_product_with_the_same_numbers(shape, count, layout):
    if layout is torch.channels_last and len(shape) == 3:
        pytest.skip("a map of one axis has no such layout")
    model = Pooled(count if len(shape) == 3 else (count, count) if isinstance(count, int) else count)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    _, changed, notes = run(model, x)
    found = [n.target for n in changed.graph.nodes]
    assert aten.bmm.default in found and not any("adaptive" in str(t) for t in found)
    assert len(notes.done) == 1
    torch.testing.assert_close(changed(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_symbolic_batch_stays_symbolic():
    model = Pooled(9)
    _, changed, _ = run(model, torch.randn(2, 3, 49), dynamic_shapes={"x": {0: "batch"}})
    x = torch.randn(5, 3, 49)
    torch.testing.assert_close(changed(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "shape", "options", "because"),
    [
        (Pooled(7), (2, 3, 49), {}, "its bands have one size"),
        (Pooled(200), (2, 3, 1001), {}, "a matrix of 200 bands of 1001 places is large"),
        (Pooled(9), (2, 3, 49), {"dynamic_shapes": {"x": {2: "places"}}}, "its sizes are symbolic"),
    ],
)
def test_other_pools_stay_and_say_why(model, shape, options, because):
    program, changed, notes = run(model, torch.randn(shape), **options)
    assert changed is program and [m.because for m in notes.misses] == [because]


def test_a_pool_compiles_and_equals_eager():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d((3, 4)), nn.Flatten(), nn.Linear(96, 5))
    model.eval().requires_grad_(False)
    x = torch.randn(2, 3, 12, 13)
    fast = ca.compile(model, example_inputs=(x,))
    for inputs in (x, torch.randn_like(x)):
        torch.testing.assert_close(fast(inputs), model(inputs), rtol=1e-5, atol=1e-5)
