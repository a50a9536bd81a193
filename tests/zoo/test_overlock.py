"""OverLoCK beyond the laws: ContMix pixel by pixel, merged kernels, small pictures, the second classifier."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn.zoo.layers.reparam import BRANCHES, DilatedReparam
from compiled_attn.zoo.overlock import PAPER, TINY, ContextBlock, OverLoCK, enlarge, mix_neighborhoods


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """In eval mode, with statistics and zero parameters that a trained network would have moved."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                buffer.normal_(std=0.2)
    return module.eval()


def by_the_card(block: ContextBlock, fused: Tensor, normed: Tensor) -> Tensor:
    """ContMix of one picture that is large enough: affinities, windows and biases, one pixel at a time."""
    channels, height, width = fused.shape[1:]
    heads, (small, large) = block.heads, block.kernels
    query = (block.weight_query(normed[:, :channels]) * (channels // heads) ** -0.5)[0]
    key = block.weight_key(normed[:, channels:])[0].flatten(1)
    size, half = query.shape[0] // heads, channels // 2 // heads
    out = torch.zeros(2, heads, half, height, width)
    project, bias = block.weight_proj.weight[:, :, 0, 0], block.weight_proj.bias
    for head in range(heads):
        for y in range(height):
            for x in range(width):
                part = slice(head * size, (head + 1) * size)
                affinity = query[part, y, x] @ key[part]  # 49
                weights = project @ affinity + bias
                taps = (weights[: small * small], weights[small * small :])
                for branch, (kernel, table) in enumerate(((small, block.rpb1), (large, block.rpb2))):
                    top = min(max(y - kernel // 2, 0), height - kernel)
                    left = min(max(x - kernel // 2, 0), width - kernel)
                    rows, columns = range(top, top + kernel), range(left, left + kernel)
                    place = [table[head, i - y + kernel - 1, j - x + kernel - 1] for i in rows for j in columns]
                    share = torch.softmax(taps[branch] + torch.stack(place), dim=0)
                    first = branch * channels // 2 + head * half
                    window = fused[0, first : first + half, top : top + kernel, left : left + kernel]
                    out[branch, head, :, y, x] = window.flatten(1) @ share
    return out.reshape(1, channels, height, width)


def test_contmix_with_folded_keys_is_the_card_s_rule_pixel_by_pixel() -> None:
    block = stirred(ContextBlock(TINY, 0, first=True))
    normed, fused = torch.randn(1, 24, 7, 9), torch.randn(1, 16, 7, 9)
    with torch.no_grad():
        torch.testing.assert_close(
            block.contmix(fused, normed), by_the_card(block, fused, normed), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("size", [(3, 4), (4, 3), (2, 2), (1, 6)])
def test_a_map_smaller_than_the_kernel_is_enlarged_mixed_and_averaged_back(size: tuple[int, int]) -> None:
    block = stirred(ContextBlock(TINY, 0, first=True))
    normed, fused = torch.randn(1, 24, *size), torch.randn(1, 16, *size)
    short = min(size)
    large = tuple(5 if s == short and (s != size[1] or size[0] != size[1]) else int(5 / short * s) for s in size)
    with torch.no_grad():
        bigger = [F.interpolate(x, size=large, mode="bilinear", align_corners=False) for x in (fused, normed)]
        assert enlarge(fused, 5).shape[2:] == large
        wanted = F.adaptive_avg_pool2d(by_the_card(block, *bigger), size)
        torch.testing.assert_close(block.contmix(fused, normed), wanted, rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_divide_are_cut_as_floats_are() -> None:
    assert enlarge(torch.zeros(1, 1, 10, 12), 13).shape[2:] == (13, 15)
    assert enlarge(torch.zeros(1, 1, 13, 13), 13).shape[2:] == (13, 13)


def test_windows_stay_inside_the_map() -> None:
    values = torch.arange(25.0).reshape(1, 1, 1, 5, 5)
    mean = mix_neighborhoods(torch.zeros(1, 1, 9, 25), torch.zeros(1, 5, 5), values, 3)[0, 0, 0]
    torch.testing.assert_close(mean[0, 0], mean[1, 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(mean[1, 1], values[0, 0, 0, :3, :3].mean(), rtol=0, atol=1e-5)
    torch.testing.assert_close(mean[4, 4], values[0, 0, 0, 2:, 2:].mean(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", list(BRANCHES))
def test_the_merged_kernel_computes_what_its_branches_do(kernel: int) -> None:
    block, x = stirred(DilatedReparam(3, kernel, deploy=False)).double(), torch.randn(2, 3, 11, 20).double()
    weight, bias = block.merged()
    with torch.no_grad():
        wanted = F.conv2d(x, weight, bias, padding=kernel // 2, groups=3)
        torch.testing.assert_close(block(x), wanted, rtol=1e-10, atol=1e-12)


def test_the_reparameterised_network_has_the_same_numbers_and_the_merged_files_keys() -> None:
    net = stirred(OverLoCK(TINY))
    merged = net.reparameterised()
    x = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), net(x), rtol=1e-3, atol=1e-3 * net(x).abs().max())
    assert set(merged.state_dict()) == set(OverLoCK(replace(TINY, deploy=True)).state_dict())
    assert not any("dil_conv" in key or "origin_bn" in key for key in merged.state_dict())


def test_the_second_classifier_answers_in_training_alone() -> None:
    net, x = OverLoCK(replace(TINY, aux=True)), torch.randn(2, 3, 80, 80)
    out = net.train()(x)
    assert {name: tuple(y.shape) for name, y in out.items()} == {"main": (2, 10), "aux": (2, 10)}
    with torch.no_grad():
        assert net.eval()(x).shape == (2, 10)


@pytest.mark.parametrize("scale_residual", [True, False])
def test_the_scale_stands_on_the_residual_or_on_the_branch(scale_residual: bool) -> None:
    net = stirred(OverLoCK(replace(TINY, scale_residual=scale_residual)))
    block, x = net.blocks3[0], torch.randn(1, 16, 6, 6)
    with torch.no_grad():
        y = block.dwconv(x)
        wanted = block.ls(y) + block.proj(y) if scale_residual else y + block.ls(block.proj(y))
        torch.testing.assert_close(block(x), wanted)


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (70, 100)])
def test_any_size_gives_logits(size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert OverLoCK(TINY).eval()(torch.randn(2, 3, *size)).isfinite().all()


def test_without_its_second_classifier_the_merged_tiny_network_has_the_published_size() -> None:
    with torch.device("meta"):
        net = OverLoCK(replace(PAPER.variants["overlock_t_reparam"], aux=False))
    assert sum(p.numel() for p in net.parameters()) == 33_467_040
