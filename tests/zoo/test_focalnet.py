"""FocalNet beyond the laws: the modulator position by position, the forms of a block, the big networks' stem."""

import math

import pytest
import torch
from torch import Tensor

from compiled_attn.zoo.focalnet import PAPER, Block, Config, FocalModulation, FocalNet, PatchEmbed

SMALL = Config(8, (1, 1), (2, 2), (3, 3), img_size=32, classes=5)


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def by_the_equations(net: FocalModulation, x: Tensor) -> Tensor:
    """Equations 4 to 7 on one map [Y, X, C], one position and channel at a time."""
    height, width, channels = x.shape
    projected = net.f(x).double()
    query, context, gates = projected.split([channels, channels, projected.shape[2] - 2 * channels], dim=2)
    total = torch.zeros_like(query)
    for level, layer in enumerate(net.focal_layers):
        kernel, seen = layer[0].weight[:, 0].double(), torch.zeros_like(context)
        reach = kernel.shape[1] // 2
        for y in range(height):
            for z in range(width):
                for c in range(channels):
                    taps = [
                        kernel[c, i - y + reach, j - z + reach] * context[i, j, c]
                        for i in range(max(0, y - reach), min(height, y + reach + 1))
                        for j in range(max(0, z - reach), min(width, z + reach + 1))
                    ]
                    seen[y, z, c] = gelu(float(sum(taps)))
        context = seen
        total += context * gates[:, :, level : level + 1]
    whole = [gelu(float(context[:, :, c].mean())) for c in range(channels)]
    total += torch.tensor(whole, dtype=torch.float64) * gates[:, :, -1:]
    total = total * net.share
    modulator = total @ net.h.weight[:, :, 0, 0].double().T + net.h.bias.double()
    out = (query * modulator).float()
    return net.proj(out if net.ln is None else net.ln(out))


@pytest.mark.parametrize(("levels", "window", "norm", "normalize"), [
    (2, 3, False, False), (3, 3, True, False), (2, 5, False, True),
])  # fmt: skip
def test_modulation_is_its_equations(levels: int, window: int, norm: bool, normalize: bool) -> None:
    net, x = FocalModulation(3, levels, window, norm, normalize), torch.randn(2, 4, 6, 3)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[1], by_the_equations(net, x[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("post_norm", [True, False])
def test_the_norms_stand_before_or_behind_and_the_scales_on_the_branches(post_norm: bool) -> None:
    block = Block(Config(**(vars(SMALL) | {"post_norm": post_norm, "layer_scale": 0.1})), stage=0)
    for norm in (block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 4, 4, 8)
    with torch.no_grad():
        if post_norm:
            y = x + 0.1 * block.norm1(block.modulation(x))
            wanted = y + 0.1 * block.norm2(block.mlp(y))
        else:
            y = x + 0.1 * block.modulation(block.norm1(x))
            wanted = y + 0.1 * block.mlp(block.norm2(y))
        torch.testing.assert_close(block(x), wanted)


def test_overlapping_patches_pad_two_at_the_stem_and_one_later() -> None:
    net = FocalNet(Config(**(vars(SMALL) | {"conv_embed": True})))
    stem, step = net.patch_embed.proj, net.layers[0].downsample.proj
    assert (stem.kernel_size, stem.stride, stem.padding) == ((7, 7), (4, 4), (2, 2))
    assert (step.kernel_size, step.stride, step.padding) == ((3, 3), (2, 2), (1, 1))


def test_the_norm_of_a_step_follows_its_convolution() -> None:
    step, x = PatchEmbed(4, 8, 2, 2, 0), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        out = step(x)
    torch.testing.assert_close(out.mean(3), torch.zeros(1, 3, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 48), (36, 20), (39, 33)])
def test_any_size_gives_logits(size: tuple[int, int]) -> None:
    net = FocalNet(SMALL).eval()
    with torch.no_grad():
        assert net.tokens(torch.randn(2, 3, *size)).shape == (2, (size[0] // 4 // 2) * (size[1] // 4 // 2), 16)
        assert net(torch.randn(2, 3, *size)).isfinite().all()


def test_only_the_large_network_of_four_levels_takes_the_mean_of_its_contexts() -> None:
    assert [name for name, config in PAPER.variants.items() if config.normalize] == ["focalnet_large_fl4"]
