"""DHVT beyond the laws: head tokens and the feed-forward written out, the stems, the two epsilons, squares only."""

import math

import pytest
import torch
import torch.nn.functional as F

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.dhvt import DAFF, DHVT, PAPER, SOPE, Config, HeadInteractedAttention

SMALL = Config(16, 2, depth=2, img_size=16, patch_size=4, classes=5)


def test_attention_with_head_tokens_is_the_paper_s_written_head_by_head() -> None:
    net, x = HeadInteractedAttention(12, 3), torch.randn(1, 10, 12)
    torch.nn.init.normal_(net.pos_embed)
    with torch.no_grad():
        tokens = []
        for head in range(3):
            mean = x[0, :, 4 * head : 4 * head + 4].mean(0)
            parts = net.ht_proj(mean).reshape(3, 4)
            normed = (parts - parts.mean(1, keepdim=True)) / (parts.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            tokens.append(F.gelu(normed * net.ht_norm.weight + net.ht_norm.bias).flatten() + net.pos_embed[0, head])
        every = torch.cat([x[0], torch.stack(tokens)])  # [N + H, C]
        q, k, v = net.qkv(every).split(12, dim=1)
        out = torch.zeros(13, 12)
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            out[:, part] = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(4), dim=1) @ v[:, part]
        out = net.proj(out)
        wanted = torch.cat([out[:1] + out[10:].mean(0), out[1:10]])
        torch.testing.assert_close(net(x)[0], wanted, rtol=1e-4, atol=1e-5)


def test_the_feed_forward_weighs_the_class_token_by_the_patches_mean_and_nothing_bounds_the_weight() -> None:
    net, x = DAFF(8, 16).eval(), torch.randn(2, 17, 8)
    with torch.no_grad():
        patches = x[:, 1:].mT.reshape(2, 8, 4, 4)
        inner = F.gelu(net.bn1(net.conv1(patches)))
        inner = inner + F.gelu(net.bn2(net.conv2(inner)))
        out = net.bn3(net.conv3(inner))
        weight = net.excitation(F.gelu(net.compress(out.mean((2, 3)))))
        found = net(x)
        torch.testing.assert_close(found[:, 1:], out.flatten(2).mT)
        torch.testing.assert_close(found[:, 0], x[:, 0] * weight)
        net.excitation.bias.fill_(50)
        assert (net(x)[:, 0] / x[:, 0]).min() > 40


@pytest.mark.parametrize(("patch", "convolutions", "activated"), [(16, 4, False), (4, 2, False), (2, 1, True)])
def test_only_the_stem_of_the_smallest_patches_ends_with_an_activation(
    patch: int, convolutions: int, activated: bool
) -> None:
    stem = SOPE(Config(32, 2, img_size=32, patch_size=patch))
    assert sum(isinstance(step, torch.nn.Sequential) for step in stem.proj) == convolutions
    assert isinstance(stem.proj[-1], torch.nn.GELU) == activated
    with torch.no_grad():
        assert stem.eval()(torch.randn(1, 3, 32, 32)).shape == (1, (32 // patch) ** 2, 32)


def test_the_shift_before_the_first_convolution_is_felt_inside_its_border() -> None:
    stem, x = SOPE(SMALL).eval(), torch.zeros(1, 3, 16, 16)
    with torch.no_grad():
        stem.pre_affine.beta.fill_(1)
        first = stem.proj[0][0](stem.pre_affine(x))
    assert not torch.allclose(first[0, :, 0, 0], first[0, :, 3, 3])  # zeros stand around the shifted picture


def test_blocks_norm_with_the_small_epsilon_and_head_tokens_with_the_usual_one() -> None:
    net = DHVT(SMALL)
    block = net.blocks[0]
    assert (block.norm1.eps, block.norm2.eps, net.norm.eps, block.attn.ht_norm.eps) == (1e-6, 1e-6, 1e-6, 1e-5)


def test_the_tiny_network_has_three_heads_for_imagenet_and_four_elsewhere() -> None:
    heads = {name: config.heads for name, config in PAPER.variants.items() if config.width == 192}
    assert heads.pop("dhvt_tiny_imagenet_patch16") == 3
    assert set(heads.values()) == {4}


def test_another_square_fits_and_what_is_no_square_is_a_named_error() -> None:
    net = DHVT(SMALL).eval()
    with torch.no_grad():
        assert net(torch.randn(2, 3, 22, 22)).isfinite().all()
        with pytest.raises(CompiledAttnError, match=r"do not make a square[\s\S]*20 patches, 4 x 4 are 16"):
            net(torch.randn(1, 3, 16, 20))


def test_a_patch_size_without_a_stem_is_a_named_error() -> None:
    with pytest.raises(CompiledAttnError, match=r"no stack of convolutions[\s\S]*patch_size is 8"):
        Config(16, 2, patch_size=8)
