"""HaloNet beyond the laws: halo attention by unfolding, pixel by pixel, stock timm, odd blocks, cut blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.zoo.halonet import PAPER, Config, HaloAttention, HaloNet, Stage, divisible


def random(module: nn.Module, std: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


def query_by_query(layer: HaloAttention, x: Tensor, block: int, halo: int) -> Tensor:
    """The layer on maps [B, C, Y, X] whose sides are multiples of the block, without its pooling."""
    heads, dim, step = layer.heads, layer.dim_head, layer.q.stride[0]
    few, window = block // step, block + 2 * halo
    q = layer.q(x).unflatten(1, (heads, dim))
    kv = F.pad(layer.kv(x), (halo,) * 4).unflatten(1, (heads, -1))
    out = torch.zeros(x.shape[0], heads, kv.shape[2] - dim, *q.shape[3:])
    rows, columns = layer.pos_embed.height_rel, layer.pos_embed.width_rel
    for y in range(q.shape[3]):
        for z in range(q.shape[4]):
            top, left = y // few * block, z // few * block  # of the window in the padded map
            seen = kv[..., top : top + window, left : left + window]
            query = q[..., y, z]
            logits = torch.einsum("bhd,bhdij->bhij", query, seen[:, :, :dim]) * dim**-0.5
            i, j = y % few, z % few
            logits = logits + (query @ rows[window - 1 - i : 2 * window - 1 - i].T)[..., :, None]
            logits = logits + (query @ columns[window - 1 - j : 2 * window - 1 - j].T)[..., None, :]
            shares = logits.flatten(2).softmax(2).view_as(logits)
            out[..., y, z] = torch.einsum("bhij,bhdij->bhd", shares, seen[:, :, dim:])
    return out.flatten(1, 2)


@pytest.mark.parametrize(("block", "halo", "stride"), [(4, 1, 1), (4, 2, 2), (2, 3, 1), (3, 1, 1), (6, 0, 2)])
def test_queries_of_a_block_see_its_window_and_zeros_count(block: int, halo: int, stride: int) -> None:
    layer, x = random(HaloAttention(16, 2, block, halo, stride)), torch.randn(2, 16, 2 * block, 3 * block)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), query_by_query(layer, x, block, halo), rtol=1e-5, atol=1e-5)


def test_odd_blocks_pool_their_output_for_a_stride() -> None:
    layer, x = random(HaloAttention(16, 2, 3, 1, stride=2)), torch.randn(1, 16, 6, 6)
    assert layer.q.stride == (1, 1)
    with torch.no_grad():
        want = F.avg_pool2d(query_by_query(layer, x, 3, 1), 2)
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_a_cut_block_s_window_goes_on_with_zeros() -> None:
    layer, x = random(HaloAttention(16, 2, 4, 1)), torch.randn(1, 16, 6, 7)
    with torch.no_grad():
        want = query_by_query(layer, F.pad(x, (0, 1, 0, 2)), 4, 1)[:, :, :6, :7]
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_narrow_queries_have_heads_of_their_own_width() -> None:
    layer = HaloAttention(32, 2, 4, 1, dim_head=4)
    assert (layer.q.out_channels, layer.kv.out_channels, layer.pos_embed.width_rel.shape) == (8, 40, (11, 4))
    assert layer(torch.randn(1, 32, 4, 8)).shape == (1, 32, 4, 8)


def test_channels_are_rounded_to_eights() -> None:
    assert [divisible(c) for c in (511.5, 4, 11, 12, 64)] == [512, 8, 16, 16, 64]
    assert divisible(4, least_share=0) == 8


@pytest.mark.parametrize("name", ["sehalonet33ts", "eca_halonext26ts", "halonet50ts", "halonet_h1"])
def test_keys_and_shapes_are_timm_s(name: str) -> None:
    import torchvision_shim  # noqa: F401

    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        stock, ours = timm.create_model(name), HaloNet(PAPER.variants[name])
    assert {k: v.shape for k, v in stock.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}


@pytest.mark.parametrize("gate", ["se", "eca", None])
def test_gates_groups_and_pools_run(gate: str | None) -> None:
    stages = (Stage(1, 32), Stage(2, 64, (1,), heads=2))
    config = Config(stages, block=4, halo=1, act="silu", stem=(8, 16), gate=gate, group_size=4, features=24, classes=5)
    with torch.no_grad():
        assert random(HaloNet(config), std=0.1)(torch.randn(2, 3, 64, 32)).shape == (2, 5)
