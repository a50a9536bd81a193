"""DaViT beyond the laws: both attentions written pixel by pixel, what fills the last windows, other sizes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.zoo.davit import PAPER, ChannelAttention, DaViT, PatchEmbed, WindowAttention


def random(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def split(attention: nn.Module, pixels: Tensor) -> Tensor:
    """q, k, v [3, H, N, D] of pixels [N, C]."""
    heads = attention.heads
    return attention.qkv(pixels).view(len(pixels), 3, heads, -1).permute(1, 2, 0, 3)


@pytest.mark.parametrize("size", [(6, 9), (7, 5), (2, 4)])
def test_windows_see_themselves_and_the_zeros_that_fill_them(size: tuple[int, int]) -> None:
    attention, x = random(WindowAttention(8, 2, 3)), torch.randn(2, *size, 8)
    want = torch.zeros_like(x)
    with torch.no_grad():
        for b in range(2):
            for top in range(0, size[0], 3):
                for left in range(0, size[1], 3):
                    window = torch.zeros(3, 3, 8)
                    inside = x[b, top : top + 3, left : left + 3]
                    window[: inside.shape[0], : inside.shape[1]] = inside
                    q, k, v = split(attention, window.flatten(0, 1))
                    out = torch.softmax(q @ k.mT * 4**-0.5, 2) @ v  # [H, 9, D]
                    out = attention.proj(out.transpose(0, 1).flatten(1)).view(3, 3, 8)
                    want[b, top : top + 3, left : left + 3] = out[: inside.shape[0], : inside.shape[1]]
        torch.testing.assert_close(attention(x), want, rtol=1e-5, atol=1e-5)


def test_channels_attend_to_channels_over_all_pixels() -> None:
    attention, x = random(ChannelAttention(12, 3)), torch.randn(1, 5, 4, 12)
    with torch.no_grad():
        q, k, v = split(attention, x[0].flatten(0, 1))
        want = torch.zeros(20, 12)
        for head in range(3):
            for i in range(4):
                logits = torch.stack([(k[head, :, i] * v[head, :, j]).sum() * 4**-0.5 for j in range(4)])
                for j, share in enumerate(logits.softmax(0)):
                    want[:, 4 * head + i] += share * q[head, :, j]
        torch.testing.assert_close(attention(x)[0].flatten(0, 1), attention.proj(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), [(7, 4), (2, 2), (3, 2)])
def test_patches_round_sizes_up_by_zeros_behind_the_norm(kernel: int, stride: int) -> None:
    embed, x = random(PatchEmbed(3, 6, kernel, stride)), torch.randn(1, 9, 11, 3)
    normed = x if stride == 4 else embed.norm(x)
    padded = F.pad(normed, (0, 0, 0, -11 % stride, 0, -9 % stride)).permute(0, 3, 1, 2)
    padding = {7: 3, 2: 0, 3: 1}[kernel]
    want = F.conv2d(padded, embed.proj.weight, embed.proj.bias, stride, padding).permute(0, 2, 3, 1)
    torch.testing.assert_close(embed(x), embed.norm(want) if stride == 4 else want)
    assert embed(x).shape[1:3] == (-(-9 // stride), -(-11 // stride))


@pytest.mark.parametrize("kinds", [("spatial",), ("channel",), ("channel", "spatial")])
@pytest.mark.parametrize("overlapped", [False, True])
def test_the_paper_s_other_layouts_run_at_sizes_that_are_no_multiples(kinds: tuple[str, ...], overlapped: bool) -> None:
    net = random(DaViT(replace(PAPER.tiny, kinds=kinds, overlapped=overlapped)))
    with torch.no_grad():
        assert net.features(torch.randn(1, 3, 37, 50)).shape == (1, 5, 7, 32)
        assert net(torch.randn(1, 3, 37, 50)).isfinite().all()


def test_the_norm_comes_after_the_mean() -> None:
    net, x = random(DaViT(PAPER.tiny)), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        want = net.head(F.layer_norm(net.features(x).flatten(1, 2).mean(1), (32,), net.norms.weight, net.norms.bias))
        torch.testing.assert_close(net(x), want)
