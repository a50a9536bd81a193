"""VSA beyond the laws: its attention written point by point, what fills windows, small maps, other sizes."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.vsa import PAPER, VariedSizeWindowAttention, ViTAEv2, swin_index


def random(module: nn.Module, std: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


def bilinear(plane: Tensor, y: float, x: float) -> Tensor:
    """A map [D, Y, X] at pixel (y, x), zeros outside."""
    total = torch.zeros(plane.shape[0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < plane.shape[1] and 0 <= column < plane.shape[2]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * plane[:, row, column]
    return total


def point_by_point(attention: VariedSizeWindowAttention, x: Tensor) -> Tensor:
    """The layer on a map [Y, X, C]: every window, head and key by itself, in pixels."""
    w, heads, (height, width, _) = attention.window, attention.heads, x.shape
    down, across = -(-height // w), -(-width // w)
    filled = torch.zeros(down * w, across * w, x.shape[2])
    filled[:height, :width] = x
    qkv = torch.zeros(3 * attention.proj.in_channels, down * w, across * w)
    qkv[:, :height, :width] = attention.qkv(x.permute(2, 0, 1)[None])[0]
    q, k, v = qkv.unflatten(0, (3, heads, -1))
    out = torch.zeros(down * w, across * w, attention.proj.in_channels)
    for i in range(down):
        for j in range(across):
            mean = filled[i * w : i * w + w, j * w : j * w + w].mean((0, 1))
            mean = torch.where(mean > 0, mean, 0.01 * mean)[None, :, None, None]
            move = attention.sampling_offsets[2](mean).view(heads, 2)
            zoom = attention.sampling_scales[2](mean).view(heads, 2)
            for head in range(heads):
                keys, values = [], []
                for a in range(w):
                    for b in range(w):
                        apart = torch.tensor([b, a]) - (w - 1) / 2  # x, y in pixels from the window's middle
                        sizes = torch.tensor([across * w - 1, down * w - 1])
                        shift = move[head] / torch.tensor([width // w, height // w]) * sizes / 2
                        at = torch.tensor([j * w + b, i * w + a]) + apart * zoom[head] + shift
                        keys.append(bilinear(k[head], float(at[1]), float(at[0])))
                        values.append(bilinear(v[head], float(at[1]), float(at[0])))
                query = q[head, :, i * w : i * w + w, j * w : j * w + w].flatten(1).T
                table = attention.relative_position_bias_table[attention.relative_position_index, head]
                shares = torch.softmax(query @ torch.stack(keys).T * attention.scale + table, 1)
                mixed = (shares @ torch.stack(values)).view(w, w, -1)
                size = mixed.shape[2]
                out[i * w : i * w + w, j * w : j * w + w, head * size : (head + 1) * size] = mixed
    return attention.proj(out.permute(2, 0, 1)[None])[0].permute(1, 2, 0)[:height, :width]


@pytest.mark.parametrize("size", [(6, 9), (7, 8), (3, 4)])
@pytest.mark.parametrize("heads", [1, 2])
def test_keys_are_sampled_where_each_head_and_window_says(size: tuple[int, int], heads: int) -> None:
    attention, x = random(VariedSizeWindowAttention(6, 8, heads, 3)), torch.randn(2, *size, 6)
    with torch.no_grad():
        want = torch.stack([point_by_point(attention, picture) for picture in x])
        torch.testing.assert_close(attention(x), want, rtol=1e-4, atol=1e-4)


def test_the_scale_counts_the_input_s_channels() -> None:
    assert VariedSizeWindowAttention(48, 16, 2, 3).scale == 24**-0.5


def test_the_index_is_swin_s() -> None:
    index = swin_index(2)
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert index.dtype == torch.int64


def test_bfloat16_maps_are_sampled_at_float32_points() -> None:
    attention, x = random(VariedSizeWindowAttention(6, 8, 2, 3)), torch.randn(1, 9, 9, 6)
    with torch.no_grad():
        want = attention(x)
        got = attention.bfloat16()(x.bfloat16())
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)


def test_a_map_smaller_than_a_window_is_a_named_error() -> None:
    with pytest.raises(CompiledAttnError, match=r"smaller than a window[\s\S]*2 x 3[\s\S]*larger picture"):
        VariedSizeWindowAttention(4, 4, 1, 3)(torch.randn(1, 2, 3, 4))


def test_pictures_need_not_be_square_and_positions_may_go() -> None:
    for cpe in (True, False):
        net = random(ViTAEv2(replace(PAPER.tiny, cpe=cpe, wide=not cpe)), std=0.1)
        with torch.no_grad():
            assert net.features(torch.randn(1, 3, 24, 64)).shape == (1, 3, 8, 16)
        assert any(".pos." in key for key in net.state_dict()) is cpe


def test_nothing_passes_around_a_reduction_cell_s_attention() -> None:
    cell = random(ViTAEv2(PAPER.tiny)).layers[0].RC
    with torch.no_grad():
        for last in (cell.attn.proj, cell.PCM[6], cell.mlp.fc2):
            last.weight.zero_()
            last.bias.zero_()
        assert not cell(torch.randn(1, 24, 24, 3)).any()
