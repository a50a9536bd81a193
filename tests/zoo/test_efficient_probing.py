"""Efficient probing beyond the laws: its rule written query by query, the options of the card, any batch and size."""

import math

import pytest
import torch
from torch import Tensor

import compiled_attn as ca
from compiled_attn import zoo
from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo import deit
from compiled_attn.zoo.efficient_probing import POOLINGS, Config, EfficientProbing, Head, Probed, ProbedViT, probe
from compiled_attn.zoo.layers import poolings

WIDTH = 48


def tokens(count: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(("queries", "d_out"), [(1, 1), (6, 1), (4, 2), (3, 8)])
def test_each_query_pools_its_own_slice_of_the_values(queries: int, d_out: int) -> None:
    pool = EfficientProbing(WIDTH, queries, d_out)
    x = tokens(20)
    size = WIDTH // d_out // queries
    slices = []
    with torch.no_grad():
        for j in range(queries):
            weights = torch.softmax(x @ pool.cls_token[0, j] / math.sqrt(WIDTH), dim=1)
            slices.append(torch.einsum("bn,bnc->bc", weights, x @ pool.v.weight[j * size : (j + 1) * size].T))
        torch.testing.assert_close(pool(x), torch.cat(slices, dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", POOLINGS)
def test_every_pooling_takes_one_picture_and_another_count_of_tokens(name: str) -> None:
    head = probe(WIDTH, 5, Head(name, queries=4, heads=4, tokens=25)).eval()
    x = tokens(25)
    with torch.no_grad():
        one = head(x[1:2])
        assert one.shape == (1, 5)
        torch.testing.assert_close(one, head(x)[1:2], rtol=1e-5, atol=1e-5)
        if name != "clip":  # whose positions are of one size
            assert head(tokens(36)).isfinite().all()


@pytest.mark.parametrize("attended", ["both", "map", "none"])
@pytest.mark.parametrize(("activation", "depth"), [("tanh", 2), ("relu", 3), ("tanh", 1)])
@pytest.mark.parametrize("patches_only", [True, False])
def test_the_options_of_abmilp_are_those_of_the_card(
    attended: str, activation: str, depth: int, patches_only: bool
) -> None:
    torch.manual_seed(0)
    pool = poolings.Abmilp(WIDTH, attended, activation, depth, positions=4, patches_only=patches_only)
    given = tokens(17)
    with torch.no_grad():
        x = given[:, 1:] if patches_only else given
        seen = x
        if attended != "none":
            q, k, v = (x @ pool.self_attn.qkv.weight.T).chunk(3, dim=2)
            seen = pool.self_attn.proj(torch.softmax(q @ k.mT / math.sqrt(WIDTH), dim=2) @ v)
        score = pool.attention_predictor(seen + pool.pos_embed)
        weights = score[..., 0].exp() / score[..., 0].exp().sum(1, keepdim=True)
        want = torch.einsum("bn,bnc->bc", weights, seen if attended == "both" else x)
        torch.testing.assert_close(pool(given), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_grid_positions_are_sines_and_cosines_of_column_and_row(first: bool) -> None:
    table = poolings.grid_positions(16, 3, first)[0]
    for row in range(3):
        for column in range(3):
            want = []
            for place in (column, row):
                angles = [place / 10000 ** (i / 4) for i in range(4)]
                want += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[first + 3 * row + column], torch.tensor(want), rtol=0, atol=1e-6)
    assert not first or not table[0].any()


def test_coca_answers_with_query_zero_of_the_full_attention() -> None:
    pool = poolings.Coca(WIDTH, queries=7)
    x = tokens(9)
    with torch.no_grad():
        q = pool.to_q(pool.norm(pool.img_queries)).unflatten(1, (8, 64)).transpose(0, 1)
        k, v = pool.to_kv(x).chunk(2, dim=2)
        full = torch.softmax(torch.einsum("hqd,bnd->bhqn", q, k) / 8, dim=3) @ v[:, None]
        want = pool.to_out(full.transpose(1, 2).flatten(2))[:, 0]
        torch.testing.assert_close(pool(x), want, rtol=1e-4, atol=1e-5)


def test_tokens_of_no_square_picture_are_a_named_error_for_cbam() -> None:
    with pytest.raises(CompiledAttnError, match=r"no square map[\s\S]*there are 20 tokens"):
        poolings.Cbam(WIDTH)(tokens(20))


@pytest.mark.parametrize(
    ("chosen", "pooling"), [("patches", "ep"), ("all", "siglip"), ("cls", "linear"), ("mean", "linear")]
)
def test_a_probe_reads_the_tokens_that_it_is_named_before_the_final_norm(chosen: str, pooling: str) -> None:
    config = Config(
        WIDTH, 4, depth=2, img_size=32, patch_size=8, classes=5, head=Head(pooling, queries=4), tokens=chosen
    )
    net = ProbedViT(config).eval()
    x = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        want = net.embed(x)
        for block in net.blocks:
            want = block(want)
        want = {"patches": want[:, 1:], "all": want, "cls": want[:, 0], "mean": want[:, 1:].mean(1)}[chosen]
        assert torch.equal(net.tokens(x), want)
        assert torch.equal(net(x), net.head(want))


def test_a_probe_stands_on_any_observed_backbone_and_leaves_it_frozen() -> None:
    torch.manual_seed(0)
    backbone = deit.DeiT(deit.Config(WIDTH, 4, depth=2, img_size=32, patch_size=8, classes=7)).eval()
    mine = ProbedViT(Config(WIDTH, 4, depth=2, img_size=32, patch_size=8, classes=5, head=Head(queries=4))).eval()
    state = {key: value for key, value in backbone.state_dict().items() if not key.startswith("head.")}
    zoo.load_checkpoint(mine, {**mine.state_dict(), **state})
    probed = Probed(ca.observe(backbone, taps=["blocks.1"]), "blocks.1", mine.head, first=1)
    x = torch.randn(2, 3, 32, 32)
    out = probed(x)
    torch.testing.assert_close(out, mine(x), rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert mine.head[0].cls_token.grad.any()
    assert all(parameter.grad is None for parameter in backbone.parameters())
