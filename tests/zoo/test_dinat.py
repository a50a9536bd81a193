"""DiNAT beyond the laws: NATTEN's index rules pixel by pixel, small maps, the families, sizes of every kind."""

from dataclasses import replace

import pytest
import torch
from laws import near
from torch import Tensor, nn

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.dinat import (
    PAPER,
    Config,
    DiNAT,
    IsotropicConfig,
    NeighborhoodAttention,
    PatchEmbed,
    PatchMerging,
    SwinConfig,
    WholeAttention,
    build,
    dilated,
)

SWIN = SwinConfig(16, (2, 1), (2, 4), mlp_ratio=2, dilations=((1, 2), (1,)), kernel=3, img_size=35, classes=10)
ISO = IsotropicConfig(16, 2, depth=2, kernel=3, patch=8, img_size=48, classes=10)


def random(module: nn.Module, std: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


def window(i: int, length: int, kernel: int, dilation: int) -> tuple[int, int]:
    """First key and first entry of the bias table for query i, as NATTEN v0.14.6 computes them."""
    half = kernel // 2
    if dilation == 1:
        start = max(i - half, 0) - (max(i + half - length + 1, 0) if i + half >= length else 0)
        return start, half + max(half - i, 0) - max(i + half - (length - 1), 0)
    if i - half * dilation < 0:
        return i % dilation, kernel - 1 - i // dilation
    if i + half * dilation >= length:
        residue, whole = i % dilation, length // dilation * dilation
        rest = length - whole
        start = length - rest + residue - 2 * half * dilation if residue < rest else whole + residue - kernel * dilation
        return start, (length - i - 1) // dilation
    return i - half * dilation, half


def by_natten_s_rules(layer: NeighborhoodAttention, x: Tensor) -> Tensor:
    """The layer on a map [Y, X, C], one query at a time."""
    kernel, dilation = layer.kernel, layer.dilation
    height, width, channels = x.shape
    large = torch.zeros(max(height, kernel * dilation), max(width, kernel * dilation), channels)
    large[:height, :width] = x
    q, k, v = layer.qkv(large).view(*large.shape[:2], 3, layer.heads, -1).permute(2, 3, 0, 1, 4)  # [H, Y, X, D]
    out = torch.zeros_like(large)
    for i in range(large.shape[0]):
        for j in range(large.shape[1]):
            (top, p), (left, r) = (
                window(i, large.shape[0], kernel, dilation),
                window(j, large.shape[1], kernel, dilation),
            )
            rows = slice(top, top + (kernel - 1) * dilation + 1, dilation)
            columns = slice(left, left + (kernel - 1) * dilation + 1, dilation)
            keys, values = k[:, rows, columns].flatten(1, 2), v[:, rows, columns].flatten(1, 2)
            assert keys.shape[1] == kernel**2
            bias = layer.rpb[:, p : p + kernel, r : r + kernel].flatten(1)
            logits = torch.einsum("hd,hkd->hk", q[:, i, j] * q.shape[3] ** -0.5, keys) + bias
            out[i, j] = torch.einsum("hk,hkd->hd", logits.softmax(1), values).flatten()
    return layer.proj(out)[:height, :width]


@pytest.mark.parametrize(
    ("size", "kernel", "dilation"),
    [((9, 11), 3, 1), ((9, 11), 3, 2), ((16, 14), 3, 4), ((11, 15), 5, 2), ((7, 8), 7, 1), ((22, 23), 7, 3)],
)
def test_queries_see_what_natten_s_index_rules_say(size: tuple[int, int], kernel: int, dilation: int) -> None:
    layer, x = random(NeighborhoodAttention(8, 2, kernel, dilation)), torch.randn(2, *size, 8)
    with torch.no_grad():
        want = torch.stack([by_natten_s_rules(layer, picture) for picture in x])
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(2, 3), (5, 9), (8, 2)])
def test_small_maps_are_filled_by_zeros_that_count_as_keys(size: tuple[int, int]) -> None:
    layer, x = random(NeighborhoodAttention(8, 2, 3, 2)), torch.randn(1, *size, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], by_natten_s_rules(layer, x[0]), rtol=1e-5, atol=1e-5)


def test_dilation_is_a_plain_neighborhood_on_every_strided_map() -> None:
    layer, x = random(NeighborhoodAttention(8, 2, 3, 3)), torch.randn(1, 14, 11, 8)
    plain, want = NeighborhoodAttention(8, 2, 3).eval(), torch.zeros_like(x)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for a in range(3):
            for b in range(3):
                want[:, a::3, b::3] = plain(x[:, a::3, b::3])
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_whole_attention_is_dense_with_the_bias_that_its_index_names() -> None:
    layer, x = random(WholeAttention(8, 2, 4)), torch.randn(2, 4, 4, 8)
    with torch.no_grad():
        q, k, v = layer.qkv(x).view(2, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = layer.rpb.flatten(1)[:, layer.relative_position_index]  # [H, N, N]
        out = torch.softmax(q * 4**-0.5 @ k.mT + bias, 3) @ v
        want = layer.proj(out.transpose(1, 2).reshape(2, 4, 4, 8))
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(CompiledAttnError, match=r"not of the size[\s\S]*4 x 5[\s\S]*4 x 4"):
        layer(torch.randn(1, 4, 5, 8))


def test_merging_takes_the_left_column_of_two_first() -> None:
    merging, x = random(PatchMerging(2)), torch.randn(1, 3, 5, 2)
    full = torch.zeros(1, 4, 6, 2)
    full[:, :3, :5] = x
    parts = [full[:, 0::2, 0::2], full[:, 1::2, 0::2], full[:, 0::2, 1::2], full[:, 1::2, 1::2]]
    with torch.no_grad():
        torch.testing.assert_close(merging(x), merging.reduction(merging.norm(torch.cat(parts, 3))))


def test_layer_scale_multiplies_both_residuals() -> None:
    net = random(DiNAT(replace(PAPER.tiny, layer_scale=1e-5)))
    block, x = net.levels[0].blocks[0], torch.randn(1, 6, 6, 16)
    with torch.no_grad():
        y = x + block.gamma1 * block.attn(block.norm1(x))
        torch.testing.assert_close(block(x), y + block.gamma2 * block.mlp(block.norm2(y)))
    assert build(PAPER.tiny).levels[0].blocks[0].gamma1 is None
    with torch.device("meta"):
        keys = build(PAPER.variants["nat_small"]).state_dict()
    assert "levels.0.blocks.0.gamma1" in keys


def test_half_of_the_blocks_reach_as_far_as_the_map() -> None:
    assert PAPER.variants["dinat_mini"].dilations == ((1, 8, 1), (1, 4, 1, 4), (1, 2, 1, 2, 1, 2), (1, 1, 1, 1, 1))
    assert dilated(Config(8, (2, 3), (1, 1), 2), (13, 6)).dilations == ((1, 13), (1, 6, 1))


def test_patches_of_any_size_are_rounded_up() -> None:
    embed = random(PatchEmbed(3, 8, 4))
    assert embed(torch.randn(1, 3, 9, 14)).shape == (1, 3, 4, 8)


@pytest.mark.parametrize("config", [SWIN, ISO, replace(ISO, kernel=None)], ids=["swin", "isotropic", "whole"])
def test_the_other_families_trace_export_and_train(config: object) -> None:
    net = random(build(config), std=0.1)
    x = torch.randn(2, 3, config.img_size, config.img_size)
    with torch.no_grad():
        wanted = net(x)
        near(torch.fx.symbolic_trace(net)(x), wanted, 1e-5)
        shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
        exported = torch.export.export(net, (x,), dynamic_shapes=shapes, strict=False).module()
        near(exported(x[:1]), wanted[:1], 1e-5)
    net(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in net.parameters())


def test_pictures_need_not_be_square_nor_large() -> None:
    with torch.no_grad():
        for config, size in ((PAPER.tiny, (20, 37)), (SWIN, (9, 26)), (ISO, (24, 50))):
            assert random(build(config))(torch.randn(1, 3, *size)).isfinite().all()
