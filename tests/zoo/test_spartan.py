"""SpaRTAN beyond the laws: the complex product, the channel mixer pixel by pixel, norms and groups, other sizes."""

import pytest
import torch
import torch.nn.functional as F

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.spartan import Block, CMixer, Config, SpaRTAN, rotate

SMALL = Config((16, 16, 24, 32), (1, 1, 2, 1), (3, 2, 2, 2), img_size=64, classes=5)


def test_rotating_channel_pairs_is_the_product_of_complex_numbers() -> None:
    x, by = torch.randn(2, 6, 3, 5), torch.randn(1, 1, 1, 3, 2)
    numbers = torch.view_as_complex(x.permute(0, 2, 3, 1).unflatten(3, (3, 2)).contiguous())
    wanted = torch.view_as_real(numbers * torch.view_as_complex(by)).flatten(3).permute(0, 3, 1, 2)
    torch.testing.assert_close(rotate(x, by), wanted)


def test_the_channel_mixer_adds_the_product_of_the_pixel_s_largest_channel() -> None:
    mixer, x = CMixer(8, 3, depthwise=False).eval(), torch.randn(1, 8, 4, 5)
    seen = {}
    mixer.conv.register_forward_pre_hook(lambda _module, given: seen.setdefault("conv", given[0]))
    with torch.no_grad():
        mixer(x)
        theta, weight = F.gelu(mixer.theta(x))[0], mixer.proj(x)[0]
        for y in range(4):
            for z in range(5):
                values = x[0, :, y, z].tolist()
                largest = values.index(max(values))
                product = weight[:, y, z] * theta[:, y, z] + weight[largest, y, z] * theta[largest, y, z]
                wanted = rotate(product[None, :, None, None], mixer.complex)[0, :, 0, 0]
                torch.testing.assert_close(seen["conv"][0, :, y, z], wanted)


def test_of_equal_channels_the_first_counts() -> None:
    mixer = CMixer(8, 2, depthwise=True).eval()
    x = torch.ones(1, 8, 2, 2)
    with torch.no_grad():
        theta, weight = F.gelu(mixer.theta(x)), mixer.proj(x)
        wanted = rotate(weight * theta + weight[:, :1] * theta[:, :1], mixer.complex)
        found = []
        mixer.conv.register_forward_pre_hook(lambda _module, given: found.append(given[0]))
        mixer(x)
    torch.testing.assert_close(found[0], wanted)


def test_norms_are_over_the_whole_picture_with_the_small_epsilon_everywhere() -> None:
    net = SpaRTAN(SMALL)
    for module in net.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.GroupNorm)):
            assert module.eps == 1e-6
    norm, x = Block(16, 2, early=True).norm_1, torch.randn(2, 16, 4, 4)
    out = norm(3 * x + 1)
    torch.testing.assert_close(out.mean((1, 2, 3)), torch.zeros(2), rtol=0, atol=1e-6)
    assert out.mean((2, 3)).abs().max() > 0.1  # not each channel for itself


def test_early_stages_mix_space_densely_and_late_ones_by_channel() -> None:
    early, late = Block(16, 4, early=True), Block(16, 4, early=False)
    assert (early.smixer.h_conv.conv.groups, early.cmixer.conv.conv.groups) == (1, 64)
    assert (late.smixer.h_conv.conv.groups, late.cmixer.conv.conv.groups) == (8, 16)
    assert late.cmixer.conv.conv.weight.shape == (64, 4, 3, 3)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (70, 50)])
def test_any_size_gives_logits(size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert SpaRTAN(SMALL).eval()(torch.randn(2, 3, *size)).isfinite().all()


def test_widths_that_the_gates_can_not_divide_are_a_named_error() -> None:
    with pytest.raises(CompiledAttnError, match=r"do not fit the mixers[\s\S]*\(20, 32\)"):
        Config((20, 32), (1, 1), (2, 2))
