"""Windows mixed by predicted weights become neighborhood_apply, however they are cut out, or say why not."""

from __future__ import annotations

import math

import copies
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiled_attn import ops
from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.raise_neighborhood import RaiseNeighborhood
from compiled_attn.runtime.capture import capture

CPU = targets.load("cpu")
BATCH = {0: torch.export.Dim("batch", min=1, max=16)}
aten = torch.ops.aten


class Outlook(nn.Module):
    """VOLO's: k x k mixes of k x k values around every `stride`-th pixel, summed where windows overlap."""

    def __init__(self, kernel: int = 3, stride: int = 2, padding: int | None = None, folded: bool = True) -> None:
        super().__init__()
        self.kernel, self.stride, self.folded = kernel, stride, folded
        self.padding = kernel // 2 if padding is None else padding
        self.v, self.weigh, self.proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 2 * kernel**4), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        taps, cut = self.kernel**2, {"padding": self.padding, "stride": self.stride}
        rows, columns = math.ceil(height / self.stride), math.ceil(width / self.stride)
        v = F.unfold(self.v(x).permute(0, 3, 1, 2), self.kernel, **cut)
        v = v.reshape(batch, 2, channels // 2, taps, rows * columns).permute(0, 1, 4, 3, 2)
        w = F.avg_pool2d(x.permute(0, 3, 1, 2), self.stride, self.stride, ceil_mode=True).permute(0, 2, 3, 1)
        w = self.weigh(w).reshape(batch, rows * columns, 2, taps, taps).permute(0, 2, 1, 3, 4)
        y = (w * 0.3).softmax(-1) @ v
        if not self.folded:
            return y
        y = y.permute(0, 1, 4, 3, 2).reshape(batch, channels * taps, rows * columns)
        return self.proj(F.fold(y, (height, width), self.kernel, **cut).permute(0, 2, 3, 1))


class Involution(nn.Module):
    """One kernel for each place and group, which a convolution predicts; a product and a sum, or an einsum."""

    def __init__(self, dilation: int = 1, equation: bool = False) -> None:
        super().__init__()
        self.dilation, self.equation = dilation, equation
        self.kernel = nn.Conv2d(8, 18, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2)
        batch, channels, height, width = x.shape
        w = self.kernel(x).view(batch, 2, 9, height, width)
        u = F.unfold(x, 3, padding=self.dilation, dilation=self.dilation).view(batch, 2, 4, 9, height, width)
        y = torch.einsum("bgkyx,bgckyx->bgcyx", w, u) if self.equation else (w.unsqueeze(2) * u).sum(3)
        return y.reshape(batch, channels, height, width)


class Clamped(nn.Module):
    """Neighborhoods that move inside at the border, gathered by index, as ContMix mixes them."""

    def __init__(self, bent: bool = False) -> None:
        super().__init__()
        start = (torch.arange(7) - 1).clamp(0, 4)
        row = start[:, None] + torch.arange(3)  # [7, 3]
        index = (row[:, None, :, None] * 7 + row[None, :, None, :]).reshape(49, 9)
        index[20, 4] += int(bent)
        self.register_buffer("index", index)
        self.weigh = nn.Linear(8, 2 * 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        w = self.weigh(x).view(batch, 49, 2, 1, 9)
        u = x.view(batch, 49, 2, 4)[:, self.index]  # [B, 49, 9, 2, 4]
        return w @ u.permute(0, 1, 3, 2, 4)


CASES = {
    "outlook": (Outlook(), (6, 8), "window 3 x 3, stride 2 x 2, border zero, 9 mixes, overlaps summed in place"),
    "outlook, odd sizes": (
        Outlook(), (5, 7), "window 3 x 3, stride 2 x 2, border zero, 9 mixes, overlaps summed in place",
    ),
    "outlook at every pixel": (
        Outlook(5, 1), (6, 7), "window 5 x 5, border zero, 25 mixes, overlaps summed in place",
    ),
    "outlook, not folded": (
        Outlook(folded=False), (6, 8), "window 3 x 3, stride 2 x 2, border zero, 9 mixes",
    ),
    "involution": (Involution(), (5, 7), "window 3 x 3, border zero, 1 mix"),
    "involution, dilated": (Involution(2), (7, 8), "window 3 x 3, dilation 2 x 2, border zero, 1 mix"),
    "involution by einsum": (Involution(equation=True), (5, 7), "window 3 x 3, border zero, 1 mix"),
    "clamped neighborhoods": (Clamped(), (7, 7), "window 3 x 3, border clamp, 1 mix"),
}  # fmt: skip


def raised(model: nn.Module, sizes: tuple[int, ...], change=lambda program: program):
    torch.manual_seed(0)
    x = torch.randn(2, *sizes, 8)
    before = change(capture(model.eval(), (x,), {}, dynamic_shapes=(BATCH,), mode="inference"))
    notes = Notes()
    after, _ = run_passes(before, [RaiseNeighborhood()], CPU, notes)
    return before, after, notes


def mixed(program) -> list:
    return [n for n in program.graph.nodes if n.target is ops.neighborhood_apply.overload]


@pytest.mark.parametrize(("model", "sizes", "says"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("change", [lambda program: program, copies.remade], ids=["as written", "remade"])
def test_mixed_windows_become_the_op_with_equal_numbers_at_2e_6_and_no_copy_of_them_is_left(model, sizes, says, change):
    _, after, notes = raised(model, sizes, change)
    assert [n.what for n in notes.done] == [says] and not notes.misses
    assert len(mixed(after)) == 1
    assert not [n for n in after.graph.nodes if n.target in (aten.im2col.default, aten.col2im.default)]
    x = torch.randn(3, *sizes, 8)
    with torch.no_grad():
        wanted = model(x)
        assert (after(x) - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    again, _ = run_passes(after, [RaiseNeighborhood()], CPU, Notes())
    assert again is after


@pytest.mark.parametrize(
    ("model", "sizes", "because"),
    [
        (Clamped(bent=True), (7, 7), "its 49 windows of 9 values of a map of 7 x 7 follow no pattern"),
        (Outlook(3, 1, 1, folded=False), (1, 6), "its 6 windows of 9 values of a map of 6 follow no pattern"),
    ],
    ids=["one index off", "a map of one row"],
)
def test_windows_that_the_op_can_not_say_stay_with_a_sentence(model, sizes, because):
    before, after, notes = raised(model, sizes)
    assert after is before and [m.because for m in notes.misses] == [because]


class Halo(nn.Module):
    """Attention of 4 queries to windows of 16 keys that overlap: weights are of queries and keys."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        u = F.unfold(x.permute(0, 3, 1, 2), 4, padding=1, stride=2).view(batch, channels, 16, -1).permute(0, 3, 2, 1)
        q = x.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
        q = q.reshape(batch, -1, 4, channels)
        return (q @ u.transpose(-2, -1)).softmax(-1) @ u


def test_attention_over_windows_is_left_to_the_passes_that_raise_attention():
    before, after, notes = raised(Halo(), (6, 8))
    assert after is before and not notes.misses


class Other(nn.Module):
    """Windows of whole numbers, and weights of another type than theirs."""

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (F.pad(x, (1, 1)).unfold(1, 3, 1) * weights).sum(-1)


@pytest.mark.parametrize("types", [(torch.int64, torch.int64), (torch.bfloat16, torch.float32)])
def test_windows_of_other_types_are_left_alone(types: tuple[torch.dtype, torch.dtype]) -> None:
    given = (torch.ones(2, 7, dtype=types[0]), torch.ones(2, 7, 3, dtype=types[1]))
    program = capture(Other(), given, {})
    assert RaiseNeighborhood().run(program, CPU, Notes()) is program
