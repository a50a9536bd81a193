"""VAN beyond the laws: large kernel attention written pixel by pixel, the shortcut, its reach, other sizes."""

import pytest
import torch
from torch import Tensor

from compiled_attn.zoo import van
from compiled_attn.zoo.van import LKA, VAN, Block, Config

SMALL = Config((8, 12, 16, 16), (1, 1, 1, 1), (2, 2, 2, 2), img_size=64, classes=5)


def correlate(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Depthwise correlation of a map [C, Y, X] by [C, 1, K, K] with zeros outside, one tap at a time."""
    reach, (_, height, width) = dilation * (weight.shape[2] // 2), x.shape
    out = bias[:, None, None].expand_as(x).clone()
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            for y in range(height):
                for z in range(width):
                    row, column = y + dilation * i - reach, z + dilation * j - reach
                    if 0 <= row < height and 0 <= column < width:
                        out[:, y, z] += weight[:, 0, i, j] * x[:, row, column]
    return out


def test_large_kernel_attention_is_its_equation_tap_by_tap() -> None:
    lka, x = LKA(3), torch.randn(1, 3, 5, 7)
    with torch.no_grad():
        seen = correlate(x[0], lka.conv0.weight, lka.conv0.bias, 1)
        seen = correlate(seen, lka.conv_spatial.weight, lka.conv_spatial.bias, 3)
        attention = torch.einsum("oc,cyx->oyx", lka.conv1.weight[:, :, 0, 0], seen) + lka.conv1.bias[:, None, None]
        torch.testing.assert_close(lka(x)[0], x[0] * attention, rtol=1e-5, atol=1e-5)


def test_a_pixel_is_seen_from_twenty_three_pixels_around() -> None:
    lka = LKA(1)
    x = torch.ones(1, 1, 41, 41, requires_grad=True)
    lka(x)[0, 0, 20, 20].backward()
    rows = x.grad[0, 0].abs().sum(1).nonzero().flatten()
    assert (rows.min().item(), rows.max().item()) == (20 - 11, 20 + 11)


def test_the_attention_s_shortcut_is_the_normed_map_and_not_the_block_s_input() -> None:
    block, x = Block(4, 8, layer_scale=0.5).eval(), torch.randn(2, 4, 6, 6)
    block.norm1.running_mean.uniform_(-1, 1)
    with torch.no_grad():
        for last in (block.attn.proj_2, block.mlp.fc2):
            last.weight.zero_()
            last.bias.zero_()
        torch.testing.assert_close(block(x), x + 0.5 * block.norm1(x))


def test_nothing_bounds_the_gate() -> None:
    lka, x = LKA(4), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        lka.conv1.weight.zero_()
        lka.conv1.bias.fill_(-100)
        torch.testing.assert_close(lka(x), -100 * x)  # neither a sigmoid nor a norm between


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (50, 37)])
def test_every_stage_halves_whatever_size_is_left(size: tuple[int, int]) -> None:
    net = VAN(SMALL).eval()
    with torch.no_grad():
        maps = net.features(torch.randn(2, 3, *size))
    wanted, sizes = [-(-s // 4) for s in size], []
    for _ in maps:
        sizes.append(tuple(wanted))
        wanted = [-(-s // 2) for s in wanted]
    assert [tuple(m.shape[2:]) for m in maps] == sizes


def test_no_classes_gives_the_pooled_features() -> None:
    config = Config(**(vars(SMALL) | {"classes": 0}))
    net, x = VAN(config).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.features(x)[-1].mean((2, 3)), rtol=0, atol=0)


def test_the_published_names_are_the_paper_s_seven() -> None:
    assert list(van.PAPER.variants) == [f"van_b{i}" for i in range(7)]
