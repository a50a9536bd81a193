"""ConViT beyond the laws: the gated attention written over all pairs of patches, its start, options, picture sizes."""

import pytest
import torch
from torch import Tensor

from compiled_attn.zoo.convit import Config, ConViT, GatedPositionalSelfAttention

SMALL = Config(width=36, heads=9, depth=3, local_blocks=2, img_size=(24, 40), patch_size=8, classes=7)


def model(**changes: object) -> ConViT:
    torch.manual_seed(3)
    built = ConViT(Config(**(vars(SMALL) | changes))).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


def over_all_pairs(attn: GatedPositionalSelfAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The card's rule with three N x N tables, one head at a time."""
    width = x.shape[2] // attn.heads
    y, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    y, column = y.flatten(), column.flatten()
    dx, dy = column[None, :] - column[:, None], y[None, :] - y[:, None]  # key minus query
    features = torch.stack([dx, dy, dx**2 + dy**2], dim=2).float()
    by_position = torch.softmax(attn.pos_proj(features), dim=1)  # [N, M, H]
    q, k = attn.qk(x).chunk(2, dim=2)
    v, outs = attn.v(x), []
    for head in range(attn.heads):
        at = slice(head * width, (head + 1) * width)
        by_content = torch.softmax(q[..., at] @ k[..., at].mT * width**-0.5, dim=2)
        gate = torch.sigmoid(attn.gating_param[head])
        weights = (1 - gate) * by_content + gate * by_position[..., head]
        outs.append(weights / weights.sum(2, keepdim=True) @ v[..., at])
    return attn.proj(torch.cat(outs, dim=2))


@pytest.mark.parametrize("grid", [(3, 5), (1, 4), (4, 1), (1, 1), (7, 7)])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_gated_attention_equals_the_rule_over_all_pairs(grid: tuple[int, int], qkv_bias: bool) -> None:
    net = model(qkv_bias=qkv_bias)
    x = torch.randn(2, grid[0] * grid[1], 36)
    for block in net.blocks[:2]:
        with torch.no_grad():
            torch.testing.assert_close(block.attn(x, grid), over_all_pairs(block.attn, x, grid), rtol=1e-5, atol=1e-5)


def test_a_fresh_network_begins_as_a_convolution_with_one_shift_a_head() -> None:
    attn = ConViT(SMALL).blocks[0].attn
    assert torch.equal(attn.v.weight, torch.eye(36))
    shifts = {tuple((row[:2] / 2).tolist()) for row in attn.pos_proj.weight}
    assert shifts == {(x, y) for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)}
    with torch.no_grad():  # head 5 = 2 + 3 * 1: no shift in x, one down; each patch reads the one below it
        attn.pos_proj.weight *= 20
        values = torch.randn(1, 9, 25, 4)
        moved = attn.by_position(values, (5, 5)).unflatten(2, (5, 5))
    torch.testing.assert_close(moved[0, 5, :4], values.unflatten(2, (5, 5))[0, 5, 1:], rtol=0, atol=1e-5)


def test_the_class_token_enters_behind_the_local_blocks_and_without_position() -> None:
    net, seen = model(), []
    for block in net.blocks:
        block.register_forward_hook(lambda _block, given, _out: seen.append(given[0]))
    with torch.no_grad():
        net(torch.randn(2, 3, 24, 40))
    assert [x.shape[1] for x in seen] == [15, 15, 16]
    assert torch.equal(seen[2][:, :1], net.cls_token.expand(2, -1, -1))


def test_without_positions_the_network_has_no_such_key_and_takes_any_size() -> None:
    net = model(positions=False)
    assert "pos_embed" not in net.state_dict()
    with torch.no_grad():
        assert net(torch.randn(1, 3, 56, 17)).isfinite().all()


def test_an_export_of_any_picture_size_equals_the_network() -> None:
    net = model()
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"x": {0: dynamic, 2: dynamic, 3: dynamic}}
    exported = torch.export.export(net, (torch.randn(2, 3, 40, 72),), dynamic_shapes=shapes, strict=False).module()
    for size in ((48, 24), (25, 48), (64, 64)):  # fifteen patches, as trained for, would be another program
        x = torch.randn(3, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), net(x), rtol=1e-5, atol=1e-5)
