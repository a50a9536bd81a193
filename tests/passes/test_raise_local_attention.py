"""Windows that were cut out of a map are recognised by what they do to element numbers, and read in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiled_attn import ops
from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.passes import pipelines
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.raise_local_attention import RaiseLocalAttention
from compiled_attn.runtime.capture import capture

CPU = targets.load("cpu")
aten = torch.ops.aten
BATCH = {0: torch.export.Dim("batch", min=1, max=16)}


class Windowed(nn.Module):
    """One block: windows of 4 x 4 or, with `grid`, tokens that lie apart; shifted where asked; a table as bias."""

    def __init__(
        self,
        *,
        shift: int = 0,
        grid: bool = False,
        hidden: float = -100.0,
        bend: float = 0.0,
        counted: bool = False,
        borrowed: bool = False,
        padded: bool = False,
    ) -> None:
        super().__init__()
        self.padded = padded
        self.shift, self.grid, self.counted, self.borrowed = shift, grid, counted, borrowed
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        place = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        distance = place[:, None] - place[None] + 3
        bias = torch.randn(2, 7, 7)[:, distance[..., 0], distance[..., 1]]
        bias[0, 3, 5] += bend
        self.register_buffer("bias", bias)
        region = torch.zeros(8, 12)
        for i, rows in enumerate((slice(0, 4), slice(4, 8 - shift), slice(8 - shift, 8))):
            for j, columns in enumerate((slice(0, 8), slice(8, 12 - shift), slice(12 - shift, 12))):
                region[rows, columns] = 3 * i + j
        cut = region.view(2, 4, 3, 4).permute(0, 2, 1, 3).reshape(6, 16)
        mask = torch.zeros(6, 16, 16).masked_fill(cut[:, :, None] != cut[:, None], hidden)
        self.register_buffer("mask", mask if shift else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        y = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        y = F.pad(y, (0, 0, 0, 2, 0, 1)) if self.padded else y  # from 7 x 10
        if self.grid:
            y = y.view(batch, 4, 2, 4, 3, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 8)
        else:
            y = y.view(batch, 2, 4, 3, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 8)
        q, k, v = self.qkv(y).view(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        k = torch.roll(k, 12, 0) if self.borrowed else k  # the windows of the picture before the last: at 2, its own
        bias = self.bias.unsqueeze(0) * batch if self.counted else self.bias.unsqueeze(0)
        if self.mask is not None:
            full = (bias.unsqueeze(0) + self.mask[None, :, None]).expand(batch, 6, 2, 16, 16)
            bias = full.reshape(-1, 2, 16, 16)
        y = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(-1, 16, 8)
        y = self.proj(y)
        if self.grid:
            y = y.view(-1, 2, 3, 4, 4, 8).permute(0, 3, 1, 4, 2, 5).reshape(-1, 8, 12, 8)
        else:
            y = y.view(-1, 2, 3, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 12, 8)
        y = y[:, :7, :10] if self.padded else y
        y = torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y
        return x + y


class Sliding(nn.Module):
    """A causal window of 4 of 11 tokens over scores that are bent to lie between -3 and 3, as Gemma 2 writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        near = torch.ones(11, 11, dtype=torch.bool).tril().triu(-3)
        self.register_buffer("mask", torch.zeros(11, 11).masked_fill(~near, torch.finfo(torch.float32).min))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.tanh(q @ k.transpose(2, 3) * 2.0 / 3.0) * 3.0 + self.mask
        return x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def raised(model: nn.Module, x: torch.Tensor, target: targets.Target = CPU):
    """The program before and after the passes that raise, and the notes."""
    before = capture(model.eval(), (x,), {}, dynamic_shapes=(BATCH,), mode="inference")
    kept = [p for p in pipelines.portable() if not isinstance(p, RaiseLocalAttention)]
    start, _ = run_passes(before, kept, target, Notes())
    notes = Notes()
    after, _ = run_passes(start, [RaiseLocalAttention()], target, notes)
    return before, start, after, notes


def locals_of(program) -> list:
    return [n for n in program.graph.nodes if n.target is ops.local_attention.overload]


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({}, {"window": [4, 4], "stride": [4, 4], "shift": [0, 0], "border": "mask"}),
        ({"shift": 2}, {"window": [4, 4], "stride": [4, 4], "shift": [2, 2], "border": "mask"}),
        ({"shift": 1, "hidden": float("-inf")}, {"shift": [1, 1]}),
        ({"grid": True}, {"window": [4, 4], "stride": [1, 1], "dilation": [2, 3], "border": "clamp"}),
    ],
    ids=["windows", "shifted", "shifted, hidden by minus infinity", "grid"],
)
def test_windows_become_the_op_and_nothing_is_moved_any_more(options, pattern):
    torch.manual_seed(0)
    model = Windowed(**options)
    before, _, after, notes = raised(model, torch.randn(2, 8, 12, 8))
    (node,) = locals_of(after)
    assert pattern.items() <= node.kwargs.items()
    assert not notes.misses
    assert ("count nothing" in notes.done[0].measure) == (options == {"shift": 2})
    assert not [
        n for n in after.graph.nodes if n.target in (aten.roll.default, aten.permute.default, aten.clone.default)
    ]
    x = torch.randn(3, 8, 12, 8)
    with torch.no_grad():
        assert (after(x) - before(x)).abs().max() < 1e-5
    again, _ = run_passes(after, [RaiseLocalAttention()], CPU, Notes())
    assert again is after


@pytest.mark.parametrize(
    ("options", "because"),
    [
        ({"bend": 0.1}, "its bias is no function of the distance between two tokens"),
        ({"shift": 2, "hidden": -1.0}, "its mask lets tokens of different windows see each other"),
        ({"borrowed": True}, "does not follow from linear by moving elements"),
        ({"counted": True}, ", which is added to its scores, depends on the input and is no product of its queries"),
    ],
)
def test_a_copy_that_is_wrong_in_one_constant_stays_and_says_why(options, because):
    torch.manual_seed(0)
    _, start, after, notes = raised(Windowed(**options), torch.randn(2, 8, 12, 8))
    assert after is start
    (miss,) = notes.misses
    assert miss.because.endswith(because)


def test_windows_that_unfold_cuts_out_and_fold_puts_back_become_the_op():
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Conv2d(8, 24, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = [F.unfold(t, (2, 4), stride=(2, 4)).view(-1, 2, 4, 8, 12) for t in self.qkv(x).chunk(3, 1)]
            q, k, v = (t.permute(0, 4, 1, 3, 2).flatten(0, 1) for t in parts)  # [B windows, H, N, D]
            y = F.scaled_dot_product_attention(q, k, v).view(-1, 12, 2, 8, 4)
            return F.fold(y.permute(0, 2, 4, 3, 1).reshape(-1, 64, 12), (8, 12), (2, 4), stride=(2, 4))

    before, _, after, notes = raised(Folded(), torch.randn(2, 8, 8, 12))
    (node,) = locals_of(after)
    assert node.kwargs["window"] == node.kwargs["stride"] == [2, 4] and not notes.misses
    assert not [n for n in after.graph.nodes if n.target in (aten.im2col.default, aten.col2im.default)]
    x = torch.randn(3, 8, 8, 12)
    with torch.no_grad():
        assert (after(x) - before(x)).abs().max() < 1e-5


def test_windows_of_a_map_of_symbolic_sizes_stay_and_say_why():
    class Rows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, height, width, _ = x.shape
            t = x.view(batch, height // 4, 4, width // 4, 4, 2, 4).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 2, 16, 4)
            y = F.scaled_dot_product_attention(t, t, t).view(batch, height // 4, width // 4, 2, 4, 4, 4)
            return y.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, 8)

    rows, columns = (4 * torch.export.Dim(name, min=2, max=9) for name in "yx")
    before = capture(Rows(), (torch.randn(2, 8, 12, 8),), {}, dynamic_shapes=({**BATCH, 1: rows, 2: columns},))
    notes = Notes()
    after, _ = run_passes(before, [RaiseLocalAttention()], CPU, notes)
    assert after is before
    assert [m.because.split(" the symbols")[0] for m in notes.misses] == ["its groups are counted by"]


@pytest.mark.parametrize("shift", [1, 2])
def test_a_map_that_is_rolled_before_it_is_padded_follows_the_pattern_once_rolled_back(shift):
    torch.manual_seed(0)
    before, _, after, notes = raised(Windowed(shift=shift, padded=True), torch.randn(2, 7, 10, 8))
    (node,) = locals_of(after)
    assert node.kwargs["shift"] == [shift, shift] and not notes.misses
    assert f"on the map rolled by {shift} x {shift}" in notes.done[0].what
    x = torch.randn(3, 7, 10, 8)
    with torch.no_grad():
        assert (after(x) - before(x)).abs().max() < 1e-5


def test_chunks_that_see_the_chunk_before_them_are_causal_windows():
    class Chunks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            places = torch.arange(24).view(4, 6)
            keys = torch.cat([F.pad(places, (0, 0, 1, 0), value=-1)[:-1], places], 1).unsqueeze(1)
            self.register_buffer("seen", (keys >= 0) & (keys <= places.unsqueeze(2)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.view(-1, 4, 6, 2, 4).permute(0, 3, 1, 2, 4) for t in self.qkv(x).chunk(3, -1))
            k, v = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t], 3) for t in (k, v))
            return F.scaled_dot_product_attention(q, k, v, self.seen).permute(0, 2, 3, 1, 4).reshape(-1, 24, 8)

    before, _, after, notes = raised(Chunks(), torch.randn(2, 24, 8))
    (node,) = locals_of(after)
    assert (node.kwargs["window"], node.kwargs["stride"], node.kwargs["causal"]) == ([12], [6], [True])
    assert not notes.misses
    x = torch.randn(3, 24, 8)
    with torch.no_grad():
        assert (after(x) - before(x)).abs().max() < 1e-5


def test_attention_to_all_of_a_pooled_map_is_no_near_miss():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.pool = nn.Linear(8, 8), nn.Linear(8, 16), nn.Conv2d(8, 8, 2, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x.flatten(1, 2)).view(-1, 24, 2, 4).transpose(1, 2)
            y = self.pool(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
            k, v = self.kv(y).view(-1, 6, 2, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 4, 6, 8)

    _, start, after, notes = raised(Pooled(), torch.randn(2, 4, 6, 8))
    assert after is start and not notes.misses


def test_a_bias_that_differs_in_its_last_bit_from_place_to_place_is_one_of_distance():
    torch.manual_seed(0)
    _, _, after, notes = raised(Windowed(bend=1e-7), torch.randn(2, 8, 12, 8))
    assert len(locals_of(after)) == 1 and not notes.misses


def test_a_sliding_window_over_capped_scores_is_raised_with_its_cap():
    torch.manual_seed(0)
    before, _, after, notes = raised(Sliding(), torch.randn(2, 11, 8))
    (node,) = locals_of(after)
    assert {"window": [4], "causal": [True], "softcap": 3.0, "scale": 2.0}.items() <= node.kwargs.items()
    assert [note.what for note in notes.done] == ["window 4, causal, capped at 3"] and not notes.misses
    x = torch.randn(3, 11, 8)
    with torch.no_grad():
        assert (after(x) - before(x)).abs().max() < 1e-5


def test_on_a_gpu_it_stays_for_no_kernel_of_windows_bends_scores_there():
    _, start, after, notes = raised(Sliding(), torch.randn(2, 11, 8), targets.load("a100"))
    assert after is start
    assert [miss.because for miss in notes.misses] == [
        "its scores are capped at 3, no kernel of windows bends them on a GPU"
    ]


def test_every_windowed_block_of_a_stock_swin_is_raised_and_its_rolls_are_gone():
    """The last stage is one window: plain attention, as its sentence says."""
    import torchvision_shim  # noqa: F401
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    sizes = {"img_size": 56, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2), "num_classes": 5}
    model = SwinTransformer(patch_size=4, window_size=7, **sizes)
    before, _, after, notes = raised(model, torch.randn(2, 3, 56, 56))
    assert len(locals_of(after)) == 2
    because = "every query sees the whole map of 7 x 7: plain attention, which keeps its bias"
    assert [m.because for m in notes.misses] == [because]
    assert not [n for n in after.graph.nodes if n.target is aten.roll.default]
    x = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        assert (after(x) - before(x)).abs().max() < 1e-5
