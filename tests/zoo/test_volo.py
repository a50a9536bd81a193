"""VOLO beyond the laws: outlook attention against unfold and fold, odd sizes, the heads, positions of another size."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn import ops, zoo
from compiled_attn.zoo.volo import PAPER, VOLO, ClassBlock, OutlookAttention, sum_overlaps


def random(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def by_unfold_and_fold(attention: OutlookAttention, x: Tensor) -> Tensor:
    """The paper's algorithm 1, with its buffers."""
    batch, height, width, channels = x.shape
    heads, count = attention.heads, -(-height // 2) * -(-width // 2)
    v = F.unfold(attention.v(x).permute(0, 3, 1, 2), 3, padding=1, stride=2)  # [B, C 9, N]
    v = v.view(batch, heads, channels // heads, 9, count).permute(0, 1, 4, 3, 2)  # [B, H, N, 9, D]
    pooled = nn.AvgPool2d(2, 2, ceil_mode=True)(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    logits = attention.attn(pooled).view(batch, count, heads, 9, 9).permute(0, 2, 1, 3, 4)
    out = (logits * (channels // heads) ** -0.5).softmax(-1) @ v
    out = out.permute(0, 1, 4, 3, 2).reshape(batch, channels * 9, count)
    return attention.proj(F.fold(out, (height, width), 3, padding=1, stride=2).permute(0, 2, 3, 1))


@pytest.mark.parametrize("size", [(8, 6), (7, 9), (5, 4), (2, 2), (1, 3), (1, 1)])
def test_outlook_attention_needs_no_fold(size: tuple[int, int]) -> None:
    attention, x = random(OutlookAttention(8, 2)), torch.randn(2, *size, 8)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), by_unfold_and_fold(attention, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [6, 7, 1])
def test_overlaps_are_counted_as_often_as_windows_hold_a_pixel(length: int) -> None:
    count = -(-length // 2)
    counts = sum_overlaps([torch.ones(count)] * 3, dim=-1)[:length]
    want = torch.zeros(length)
    for middle in range(0, length, 2):
        for pixel in range(max(middle - 1, 0), min(middle + 2, length)):
            want[pixel] += 1
    assert torch.equal(counts, want)


def test_windows_hold_their_pixels_in_row_major_order() -> None:
    pixels = torch.arange(1.0, 17.0).view(1, 4, 4, 1, 1)
    each = torch.eye(9).expand(1, 2, 2, 1, 9, 9)
    seen = ops.neighborhood_apply(each, pixels, window=[3, 3], stride=[2, 2], block=[1, 1], border="zero")
    assert seen[0, 0, 0, 0, :, 0].tolist() == [0, 0, 0, 0, 1, 2, 0, 5, 6]
    assert seen[0, 1, 1, 0, :, 0].tolist() == [6, 7, 8, 10, 11, 12, 14, 15, 16]


def test_half_of_the_strongest_token_is_added_to_each_class() -> None:
    net, x = random(VOLO(PAPER.tiny)), torch.randn(2, 3, 80, 80)
    plain = random(VOLO(replace(PAPER.tiny, return_dense=False)))
    zoo.load_checkpoint(plain, {k: v for k, v in net.state_dict().items() if not k.startswith("aux_head")})
    with torch.no_grad():
        tokens = net.aux_head(net.features(x)[:, 1:])
        torch.testing.assert_close(net(x), plain(x) + 0.5 * tokens.max(1).values)


def test_the_mean_of_tokens_needs_no_class_token() -> None:
    net = random(VOLO(replace(PAPER.tiny, class_blocks=0, return_dense=False, return_mean=True)))
    assert not any(key.startswith(("cls_token", "post_network", "aux_head")) for key in net.state_dict())
    x = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.head(net.features(x).mean(1)))


def test_training_gives_the_logits_of_every_token_beside() -> None:
    logits, tokens = VOLO(PAPER.tiny).train()(torch.randn(2, 3, 80, 80))
    assert (logits.shape, tokens.shape) == ((2, 10), (2, 25, 10))


def test_class_attention_leaves_the_other_tokens_alone() -> None:
    net = random(VOLO(PAPER.tiny))
    block = net.post_network[0]
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        out = block(x)
        q, (k, v) = block.attn.q(block.norm1(x)[:, :1]), block.attn.kv(block.norm1(x)).chunk(2, 2)
        heads = [t.unflatten(2, (4, 8)).transpose(1, 2) for t in (q, k, v)]
        shares = torch.softmax(heads[0] @ heads[1].mT * 8**-0.5, 3)
        first = x[:, :1] + block.attn.proj((shares @ heads[2]).transpose(1, 2).flatten(2))
    assert isinstance(block, ClassBlock)
    assert torch.equal(out[:, 1:], x[:, 1:])
    torch.testing.assert_close(out[:, :1], first + block.mlp(block.norm2(first)))


def test_positions_of_another_size_are_resized_on_request() -> None:
    small, large = VOLO(PAPER.tiny), VOLO(replace(PAPER.tiny, img_size=112))
    report = zoo.load_checkpoint(large, small.state_dict(), resize=True)
    assert report.resized == {"pos_embed": ((1, 5, 5, 32), (1, 7, 7, 32))}
    want = F.interpolate(small.pos_embed.permute(0, 3, 1, 2), size=(7, 7), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(large.pos_embed, want)
