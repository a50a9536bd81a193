"""EViT beyond the laws: an independent reference of the rule, what the arguments do, other picture sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn import zoo
from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo import deit, evit
from compiled_attn.zoo.evit import Config, EViT, rates

SMALL = Config(
    width=48, heads=3, depth=6, img_size=48, patch_size=8, classes=7, keep_rate=rates(0.6, (1, 3, 4), 6), fuse=True
)


def model(**changes: object) -> EViT:
    torch.manual_seed(3)
    built = EViT(Config(**(vars(SMALL) | changes))).eval()
    with torch.no_grad():  # far from the flat attention of a fresh network, so that ranks are clear
        for parameter in built.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return built


def by_the_card(net: EViT, x: Tensor, rate_of: list[float]) -> Tensor:
    """Logits by the rule written once more, one picture and one token at a time."""
    logits = []
    for picture in x:
        tokens = net.embed(picture[None])[0]
        for block, rate in zip(net.blocks, rate_of, strict=True):
            q, k, v = (t[0] for t in block.attn.heads_of(block.norm1(tokens)[None]))
            weights = torch.softmax(q @ k.mT * q.shape[2] ** -0.5, dim=2)
            tokens = tokens + block.attn.proj((weights @ v).permute(1, 0, 2).flatten(1))
            keep = math.ceil(rate * (len(tokens) - 1))
            if keep < len(tokens) - 1:
                score = weights[:, 0, 1:].mean(0)
                order = sorted(range(len(score)), key=lambda j: -float(score[j]))
                rows = [tokens[0]] + [tokens[1 + j] for j in order[:keep]]
                if net.config.fuse:
                    rows.append(sum(score[j] * tokens[1 + j] for j in order[keep:]))
                tokens = torch.stack(rows)
            tokens = tokens + block.mlp(block.norm2(tokens))
        logits.append(net.head(net.norm(tokens)[0]))
    return torch.stack(logits)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("rate", [0.9, 0.7, 0.6, 0.5, 0.1])
def test_logits_equal_the_rule_written_token_by_token(rate: float, fuse: bool) -> None:
    net = model(keep_rate=rates(rate, (1, 3, 4), 6), fuse=fuse)
    x = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = by_the_card(net, x, list(net.config.keep_rate))
        torch.testing.assert_close(net(x), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("rate", "fuse", "counts"), [
    (0.7, True, (139, 99, 71)), (0.7, False, (138, 97, 68)), (0.5, True, (99, 51, 27)), (0.5, False, (98, 49, 25)),
])  # fmt: skip
def test_token_counts_at_224_pixels_are_those_of_the_paper(rate: float, fuse: bool, counts: tuple[int, ...]) -> None:
    count, seen = 196, []
    for _ in counts:
        count = evit.kept_count(count, rate) + fuse
        seen.append(count)
    assert tuple(seen) == counts


def test_a_rate_of_one_everywhere_is_plain_deit() -> None:
    net = model(keep_rate=rates(1.0, (), 6))
    plain = deit.DeiT(deit.Config(width=48, heads=3, depth=6, img_size=48, patch_size=8, classes=7)).eval()
    zoo.load_checkpoint(plain, net.state_dict())
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain(x), rtol=0, atol=0)


def test_a_rate_at_call_time_changes_only_the_blocks_that_shrink() -> None:
    net, other = model(), model(keep_rate=rates(0.8, (1, 3, 4), 6))
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(net(x, keep_rate=0.8), other(x))
        _, kept = net.forward_with_kept(x, keep_rate=1.0)
    assert kept == []


def test_tokens_force_the_exact_count_in_any_block_that_they_name() -> None:
    net = model()
    with torch.no_grad():
        _, kept = net.forward_with_kept(torch.randn(2, 3, 48, 48), tokens=[20, None, None, 7, 8, None])
    # block 1 keeps its own ceil(0.6 * 21); block 3 is told 7; block 4 is told 8, all that it has, and drops nothing
    assert [index.shape[1] for index in kept] == [20, 13, 7]


def test_patch_numbers_are_ascending_and_name_the_fused_token_after_the_last_patch() -> None:
    net = model()
    kept = [torch.tensor([[5, 2, 9]]), torch.tensor([[3, 1]])]  # the second keeps the fused token (position 3) and 2
    first, second = net.patch_numbers(kept, patches=36)
    assert first.tolist() == [[2, 5, 9]]
    assert second.tolist() == [[2, 36]]


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (52, 52), (32, 72)])
def test_another_picture_size_gets_bicubic_positions(size: tuple[int, int]) -> None:
    net = model()
    y, x = size[0] // 8, size[1] // 8
    grid = net.pos_embed[:, 1:].reshape(1, 6, 6, 48).permute(0, 3, 1, 2)
    new = F.interpolate(grid, size=(y, x), mode="bicubic", align_corners=False).flatten(2).mT
    want = net.pos_embed[:, 1:] if y * x == 36 else new  # the same count keeps them, as in the reference
    patches = net.patch_embed(pictures := torch.randn(1, 3, *size)).flatten(2).mT
    with torch.no_grad():
        torch.testing.assert_close(net.embed(pictures)[:, 1:], patches + want, rtol=0, atol=1e-6)
        assert net(pictures).isfinite().all()


def test_the_count_of_a_symbolic_picture_size_is_computed_by_integers() -> None:
    net = model(depth=2, keep_rate=(1.0, 0.6))
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"x": {0: dynamic, 2: dynamic, 3: dynamic}}
    exported = torch.export.export(net, (torch.randn(2, 3, 40, 64),), dynamic_shapes=shapes, strict=False).module()
    with torch.no_grad():
        for size in ((56, 56), (64, 40), (80, 96)):
            x = torch.randn(3, 3, *size)
            torch.testing.assert_close(exported(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [(1.0, 0.7), (1.0,) * 5 + (0.0,), (1.0,) * 5 + (1.5,)])
def test_keep_rates_that_do_not_fit_are_a_named_error(wrong: tuple[float, ...]) -> None:
    with pytest.raises(CompiledAttnError, match=r"keep rates do not fit[\s\S]*depth is 6[\s\S]*give 6 rates"):
        Config(**(vars(SMALL) | {"keep_rate": wrong}))


def test_the_distilled_network_averages_its_heads_and_trains_both() -> None:
    config = deit.Config(width=48, heads=3, depth=2, img_size=32, patch_size=8, classes=7, distilled=True)
    net = deit.DeiT(config).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        mean = net(x)
        first, second = net.train()(x)
    torch.testing.assert_close(mean, (first + second) / 2)
    assert not torch.equal(first, second)
