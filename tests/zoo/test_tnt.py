"""TNT and PyramidTNT beyond the laws: the rule written patch by patch, borders, picture sizes, where words end."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo import pyramid_tnt
from compiled_attn.zoo.tnt import TNT, Attention, Config

SMALL = Config(
    outer_width=24, inner_width=8, outer_heads=3, inner_heads=2, depth=2, img_size=(32, 48), inner_stride=5, classes=7
)


def filled(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


def attend(attn: Attention, x: Tensor) -> Tensor:
    """One sequence [N, C], one head at a time."""
    (q, k), v, outs = attn.qk(x).chunk(2, dim=1), attn.v(x), []
    for at in torch.arange(x.shape[1]).chunk(attn.heads):
        weights = torch.softmax(q[:, at] @ k[:, at].T * len(at) ** -0.5, dim=1)
        outs.append(weights @ v[:, at])
    return attn.proj(torch.cat(outs, dim=1))


def patch_by_patch(net: TNT, picture: Tensor) -> Tensor:
    """Logits of one picture by the card's rule, each patch cut out and seen alone."""
    side, words = 16, []
    for y in range(0, picture.shape[1], side):
        for x in range(0, picture.shape[2], side):
            embedded = net.patch_embed.proj(picture[None, :, y : y + side, x : x + side])[0]
            words.append(embedded.flatten(1).T + net.inner_pos[0])
    sentences = [net.proj_norm2(net.proj(net.proj_norm1(word.flatten()))) for word in words]
    tokens = torch.stack([net.cls_token[0, 0], *sentences]) + net.outer_pos[0]
    for block in net.blocks:
        for i, word in enumerate(words):
            word = word + attend(block.inner_attn, block.inner_norm1(word))
            words[i] = word + block.inner_mlp(block.inner_norm2(word))
        heard = [block.proj_norm2(block.proj(block.proj_norm1(word.flatten()))) for word in words]
        tokens = tokens + torch.stack([torch.zeros(tokens.shape[1]), *heard])  # the class token hears nothing
        tokens = tokens + attend(block.outer_attn, block.outer_norm1(tokens))
        tokens = tokens + block.outer_mlp(block.outer_norm2(tokens))
    return net.head(net.norm(tokens[0]))


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_logits_equal_the_rule_written_patch_by_patch(qkv_bias: bool) -> None:
    net = filled(TNT(Config(**(vars(SMALL) | {"qkv_bias": qkv_bias}))))
    x = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        want = torch.stack([patch_by_patch(net, picture) for picture in x])
        torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)


def test_words_of_a_patch_see_no_pixel_of_another() -> None:
    net = filled(TNT(SMALL))
    x = torch.randn(1, 3, 32, 48)
    changed = x.clone()
    changed[:, :, :16, 16:32] += 1  # the second patch
    with torch.no_grad():
        moved = (net.embed(x)[0] != net.embed(changed)[0]).flatten(1).any(1)
    assert moved.tolist() == [False, True, False, False, False, False]


def test_the_frozen_tokens_are_counted_and_never_read() -> None:
    net = filled(TNT(SMALL))
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        before = net(x)
        net.outer_tokens.fill_(float("nan"))
        assert torch.equal(net(x), before)
    assert not net.outer_tokens.requires_grad


def test_excitation_scales_the_mlp_by_what_the_mean_of_all_tokens_says() -> None:
    net = filled(TNT(Config(**(vars(SMALL) | {"excite": True, "depth": 1}))))
    block, x = net.blocks[0], torch.randn(2, 3, 32, 48)
    assert {key for key in net.state_dict() if "se_layer" in key and "weight" in key} == {
        f"blocks.0.se_layer.fc.{i}.weight" for i in (0, 1, 3)
    }
    with torch.no_grad():
        words, tokens = net.embed(x)
        thought = []
        block.outer_mlp.register_forward_hook(lambda _mlp, _given, out: thought.append(out))
        _, out = block(words, tokens)
        layer, block.se_layer = block.se_layer, None
        _, plain = block(words, tokens)
        norm, fc1, _, fc2, _ = layer.fc
        gate = torch.tanh(fc2(F.relu(fc1(norm(thought[0].mean(1))))))
    torch.testing.assert_close(out, plain + gate[:, None] * thought[0], rtol=1e-5, atol=1e-5)


def test_a_dynamic_export_takes_any_picture_size_with_resized_positions() -> None:
    net = filled(TNT(SMALL))
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"x": {0: dynamic, 2: dynamic, 3: dynamic}}
    exported = torch.export.export(net, (torch.randn(2, 3, 48, 64),), dynamic_shapes=shapes, strict=False).module()
    for size in ((48, 80), (64, 32), (64, 96)):  # six patches, as trained for, would be another program
        x = torch.randn(3, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), net(x), rtol=1e-5, atol=1e-5)


def test_merged_words_keep_their_places_in_the_picture() -> None:
    """A merge whose convolution reads one word: the 8 x 8 words of four patches, every other one, in picture order."""
    merge = pyramid_tnt.WordAggregation(2, 2).eval()
    with torch.no_grad():
        merge.norm.register_forward_hook(lambda _norm, given, _out: given[0])
        merge.conv[0].weight.zero_()
        merge.conv[0].bias.zero_()
        merge.conv[0].weight[:, :, 1, 1] = torch.eye(2)
        picture = torch.randn(1, 2, 2 * 8, 3 * 8)  # words of a grid of 4 x 6 patches
        cut = F.unfold(picture, 4, stride=4).unflatten(1, (2, 16)).permute(0, 3, 2, 1)  # [B, N, M, c]
        merged = merge(cut.flatten(2), (4, 6)).unflatten(2, (16, 2))
        half = F.unfold(picture[:, :, ::2, ::2], 4, stride=4).unflatten(1, (2, 16)).permute(0, 3, 2, 1)
    torch.testing.assert_close(merged, half, rtol=0, atol=0)


def test_words_are_heard_in_the_first_block_of_a_stage_and_in_two_of_a_deep_one() -> None:
    with torch.device("meta"):
        net = pyramid_tnt.PyramidTNT(pyramid_tnt.PAPER.variants["ptnt_s_256"])
    heard = [[block.words > 0 for block in stage.blocks].count(True) for stage in net.stages]
    assert heard == [1, 2, 1, 1]
    assert [stage.relative_pos.shape[3] for stage in net.stages] == [64, 64, 64, 16]


def test_sizes_that_the_pyramid_s_positions_do_not_fit_are_named_errors() -> None:
    with pytest.raises(CompiledAttnError, match=r"no such picture size[\s\S]*224[\s\S]*multiples of 64"):
        pyramid_tnt.Config(**(vars(pyramid_tnt.PAPER.tiny) | {"img_size": 224}))
    net = pyramid_tnt.PyramidTNT(pyramid_tnt.PAPER.tiny)
    with pytest.raises(CompiledAttnError, match=r"128 x 64[\s\S]*128 x 128"):
        net(torch.randn(1, 3, 128, 64))


def test_a_pyramid_of_a_picture_that_is_not_square_runs_and_depends_on_all_of_it() -> None:
    config = pyramid_tnt.Config(**(vars(pyramid_tnt.PAPER.tiny) | {"img_size": (64, 128)}))
    net = filled(pyramid_tnt.PyramidTNT(config))
    x = torch.randn(1, 3, 64, 128, requires_grad=True)
    net(x).square().sum().backward()
    assert x.grad.abs().amax(1).unfold(1, 8, 8).unfold(2, 8, 8).amax((3, 4)).gt(0).all()
