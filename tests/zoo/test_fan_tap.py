"""FAN and TAP beyond the laws: pooling by unfolded squares, channel gates, positions, class blocks, the loss."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo import fan_tap
from compiled_attn.zoo.fan_tap import (
    FAN,
    PAPER,
    Block,
    ChannelProcessing,
    ClassAttentionBlock,
    Config,
    SampleNorm2d,
    attention_diversification_loss,
    dilated_mean,
    fourier,
)

SMALL = Config((12, 12), (3, 3), scales=4, patch_size=4, img_size=16, classes=5, mlp_ratio=2)


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_a_dilated_mean_divides_by_nine_at_the_border_too(dilation: int) -> None:
    x = torch.randn(2, 3, 5, 7)
    taps = F.unfold(x, 3, dilation=dilation, padding=dilation).reshape(2, 3, 9, 5, 7)
    torch.testing.assert_close(dilated_mean(x, dilation), taps.mean(2), rtol=1e-5, atol=1e-6)


def test_pooled_tokens_are_each_token_s_own_mixture() -> None:
    block, tokens = Block(SMALL, 0).eval(), torch.randn(2, 25, 12)
    x = tokens.mT.reshape(2, 12, 5, 5)
    with torch.no_grad():
        hidden = block.dilation_predictor.proj[1](block.dilation_predictor.proj[0](x))
        mask = torch.softmax(block.dilation_predictor.proj[2](hidden), dim=1)
        wanted = mask[:, :1] * x
        for d in (1, 2, 3):
            wanted += mask[:, d : d + 1] * F.unfold(x, 3, dilation=d, padding=d).reshape(2, 12, 9, 5, 5).mean(2)
        torch.testing.assert_close(block.pooled(tokens), wanted.flatten(2).mT, rtol=1e-5, atol=1e-6)


def test_the_residual_of_attention_is_not_pooled() -> None:
    block, x = Block(SMALL, 0).eval(), torch.randn(1, 12, 4, 4)
    with torch.no_grad():
        block.gamma1.zero_()
        block.gamma2.zero_()
        torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_channel_gates_are_written_head_by_head() -> None:
    net, x = ChannelProcessing(12, 3, 24, bias=True).eval(), torch.randn(1, 16, 12)
    torch.nn.init.normal_(net.temperature)
    with torch.no_grad():
        gates = []
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            query = torch.softmax(net.q(x)[0, :, part], dim=0)  # over tokens
            key = torch.softmax(x[0, :, part], dim=0).mean(1)
            gates.append(torch.sigmoid(query.T @ key) * net.temperature[head, 0, 0])
        torch.testing.assert_close(net.gates(x)[0, 0], torch.cat(gates))
        torch.testing.assert_close(net(x, 4, 4), torch.cat(gates) * net.norm_v(net.mlp_v(x, 4, 4)))


def test_the_mlp_s_only_activation_is_between_its_convolutions() -> None:
    mlp, x = ChannelProcessing(8, 2, 16, bias=True).mlp_v.eval(), torch.randn(1, 16, 8)
    with torch.no_grad():
        mlp.gamma.zero_()
        torch.testing.assert_close(mlp(x, 4, 4), mlp.fc2(mlp.fc1(x)))


def test_the_backbone_s_norms_divide_by_one_channel_less_but_for_the_stem_s() -> None:
    net = FAN(replace(SMALL, scales=None, hybrid=(1, 1), hybrid_widths=(4, 6)))
    backbone, x = net.patch_embed.backbone, torch.randn(1, 4, 3, 3)
    assert type(backbone.stem[1]) is fan_tap.LayerNorm2d
    assert type(backbone.stages[0].blocks[0].norm) is type(backbone.stages[1].downsample[0]) is SampleNorm2d
    with torch.no_grad():
        out = backbone.stages[0].blocks[0].norm(x)
    torch.testing.assert_close(out.var(1, correction=1), torch.ones(1, 3, 3), rtol=1e-4, atol=1e-4)


def test_positions_are_sines_and_cosines_of_rows_then_columns() -> None:
    found = fourier(3, 5, torch.zeros(1))
    for channel in (0, 1, 7, 31):
        period = 10_000 ** (2 * (channel // 2) / 32)
        wave = math.cos if channel % 2 else math.sin
        for y in range(3):
            for x in range(5):
                row, column = (y + 1) / (3 + 1e-6) * 2 * math.pi, (x + 1) / (5 + 1e-6) * 2 * math.pi
                assert found[0, channel, y, x].item() == pytest.approx(wave(row / period), abs=2e-6)
                assert found[0, 32 + channel, y, x].item() == pytest.approx(wave(column / period), abs=2e-6)


@pytest.mark.parametrize("tokens_norm", [True, False])
def test_a_class_block_transforms_the_class_token_and_doubles_the_others(tokens_norm: bool) -> None:
    block, x = ClassAttentionBlock(replace(SMALL, tokens_norm=tokens_norm)), torch.randn(2, 6, 12)
    torch.nn.init.normal_(block.norm2.weight)
    with torch.no_grad():
        patches = x[:, 1:] + block.norm1(x)[:, 1:]
        patches = block.norm2(patches) if tokens_norm else patches
        out = block(x)
        torch.testing.assert_close(out[:, 1:], 2 * patches)
        cls = block.norm2(x[:, :1] + block.attn(block.norm1(x)))
        torch.testing.assert_close(out[:, :1], cls + block.mlp(cls))


def loss_by_loops(attentions: list[Tensor], threshold: float) -> float:
    total = 0.0
    for attention in attentions:
        similarities = []
        for picture in attention.mean(1):
            least = threshold / len(picture)
            mean = torch.tensor([float(p) if p > least else 0.0 for p in picture.mean(0)])
            for row in picture:
                kept = torch.where(row > least, row, torch.zeros(()))
                norms = max(float(kept.norm() * mean.norm()), 1e-8)
                similarities.append(float(kept @ mean) / norms)
        total += sum(similarities) / len(similarities)
    return total / (len(attentions) + 1e-6)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("threshold", [0, 1, 2])
def test_the_loss_is_the_mean_cosine_of_kept_attention_for_any_batch(batch: int, threshold: float) -> None:
    attentions = [torch.softmax(3 * torch.randn(batch, 2, 9, 9), dim=3) for _ in range(3)]
    wanted = loss_by_loops(attentions, threshold)
    assert attention_diversification_loss(attentions, threshold).item() == pytest.approx(wanted, abs=1e-5)


def test_attention_comes_with_the_same_logits_and_trains() -> None:
    net, x = FAN(SMALL).eval(), torch.randn(2, 3, 16, 16)
    logits, attentions = net.forward_with_attention(x)
    torch.testing.assert_close(logits, net(x))
    assert [tuple(a.shape) for a in attentions] == [(2, 3, 16, 16)] * 2
    attention_diversification_loss(attentions, 0).backward()
    assert net.blocks[0].attn.q.weight.grad.any()


def test_plain_fan_takes_any_shape_and_tap_a_square_of_tokens() -> None:
    x = torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        assert FAN(replace(SMALL, scales=None)).eval()(x).isfinite().all()
        with pytest.raises(CompiledAttnError, match="do not make a square"):
            FAN(SMALL).eval()(x)


def test_a_change_of_width_halves_the_map() -> None:
    net = FAN(replace(SMALL, widths=(12, 12, 24), heads=(3, 3, 4), img_size=32)).eval()
    with torch.no_grad():
        assert net.blocks(net.embed(torch.randn(1, 3, 32, 32))).shape == (1, 24, 4, 4)
        assert net(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert "blocks.1.downsample.proj.weight" in net.state_dict()


def test_the_small_hybrid_has_ten_blocks_whatever_its_name_says() -> None:
    assert len(PAPER.variants["tap_fan_small_12_p4_hybrid"].widths) == 10
    assert fan_tap.SIZES["fan_large_16_p4_hybrid"].hybrid == (3, 5)
