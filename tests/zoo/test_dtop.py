"""DToP beyond the laws: the rule written picture by picture on both hosts, whom it keeps, whole networks, sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.zoo.dtop import Config, DToP, SETRHead, easy, feature_map

SMALL = {"width": 24, "heads": 3, "depth": 4, "img_size": 48, "patch_size": 4, "classes": 6, "keep": 3}
SEGVIT = Config(**SMALL, stages=(0, 2, 3), thresholds=(0.25, 0.012), channels=16, head_heads=2, layers=2)
SETR = Config(**SMALL, stages=(1, 2, 3), thresholds=(0.4, 0.4), channels=16, host="setr")


def network(config: Config) -> DToP:
    torch.manual_seed(1)
    net = DToP(config).eval()
    with torch.no_grad():  # scores and confidences far from one another, so that some tokens are sure
        for name, parameter in net.named_parameters():
            if "norm" not in name and "ln" not in name:
                parameter.add_(0.25 * torch.randn_like(parameter))
    return net


def pictures(*size: int) -> Tensor:
    return (
        torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))
        * torch.arange(1, size[0] + 1)[:, None, None, None]
    )


def attend(x: Tensor, memory: Tensor, maps: list[tuple[Tensor, Tensor]], heads: int) -> tuple[Tensor, Tensor]:
    """Attention of rows to rows with its mean scaled scores; maps: weight and bias of q, k, v."""
    q, k, v = (
        F.linear(rows, w, b).unflatten(1, (heads, -1)).transpose(0, 1)
        for rows, (w, b) in zip((x, memory, memory), maps, strict=True)
    )
    scores = q @ k.mT / math.sqrt(q.shape[2])
    return (scores.softmax(2) @ v).transpose(0, 1).flatten(1), scores.mean(0)


def fused(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True))


def head_of(head: nn.Module, x: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Scores [classes, M] that go on the canvas, and the classes' weights [classes, 1], of tokens [M, C]."""
    if config.host == "setr":
        conv = head.up_convs[0][0]
        hidden = F.relu(conv.bn(F.linear(head.norm(x), conv.conv.weight[..., 0, 0]).T[None, :, :, None])[0, ..., 0].T)
        return F.linear(hidden, head.conv_seg.weight[..., 0, 0], head.conv_seg.bias).T, torch.ones(config.classes, 1)
    x, q = head.proj_norm(head.input_proj(x)), head.q.weight
    for layer in head.decoder.layers:
        q = layer.norm1(q + layer.self_attn.out_proj(attend(q, q, fused(layer.self_attn), config.head_heads)[0]))
        cross = layer.multihead_attn
        got, scores = attend(q, x, [(m.weight, m.bias) for m in (cross.q, cross.k, cross.v)], config.head_heads)
        q = layer.norm2(q + cross.proj(got))
        q = layer.norm3(q + layer.linear2(F.relu(layer.linear1(q))))
    return scores, head.class_embed(q).softmax(1)[:, :1]


def by_the_card(net: DToP, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Canvas and last weights of one picture's embedded tokens [N, C], and who was done behind each head."""
    config, prefix = net.config, net.backbone.prefix
    count = x.shape[0] - prefix
    gone, canvas, after, begin = torch.zeros(count, dtype=torch.bool), torch.zeros(config.classes, count), [], 0
    for head, end, threshold in zip(net.heads, config.stages, (*config.thresholds, 1.0), strict=True):
        rows = torch.cat([torch.ones(prefix, dtype=torch.bool), ~gone])
        for layer in net.backbone.layers[begin : end + 1]:
            kept, new = x[rows], torch.zeros_like(x)
            normed = layer.ln1(kept)
            kept = kept + layer.attn.attn.out_proj(attend(normed, normed, fused(layer.attn.attn), config.heads)[0])
            new[rows] = kept + layer.ffn.layers[1](F.gelu(layer.ffn.layers[0][0](layer.ln2(kept))))
            x = new
        last = net.backbone.ln1(x) if prefix and end == config.depth - 1 else x
        scores, weight = head_of(head, last[prefix:][~gone], config)
        canvas[:, ~gone] = scores
        if threshold < 1:
            sure = scores.softmax(0) if config.host == "setr" else weight * scores.sigmoid()
            value, kind = sure.max(0)
            leaving = value > threshold
            for c in range(config.classes):
                mine = [j for j in range(len(value)) if leaving[j] and kind[j] == c]
                for j in sorted(mine, key=lambda j: -float(value[j]))[: config.keep]:
                    leaving[j] = False
            gone = gone.clone()
            gone[(~gone).nonzero()[leaving]] = True
            after.append(gone)
        begin = end + 1
    return canvas, weight, after


@pytest.mark.parametrize("config", [SEGVIT, SETR], ids=["segvit", "setr"])
def test_canvas_and_leavers_equal_the_rule_written_picture_by_picture(config: Config) -> None:
    net, given = network(config), pictures(3, 3, 48, 48)
    with torch.no_grad():
        x, grid = net.backbone.embed(given)
        stages = net.stages(x)
        counts = []
        for b in range(3):
            canvas, weight, after = by_the_card(net, x[b])
            torch.testing.assert_close(stages[-1].canvas[b, :, -144:], canvas, rtol=1e-4, atol=1e-4)
            for stage, gone in zip(stages[1:], after, strict=True):
                assert torch.equal(~stage.live.here[b, -144:], gone)
                assert not feature_map(stage, grid)[b].flatten(1)[:, gone].any()
            counts.append([int(gone.sum()) for gone in after])
            if config.host == "segvit":
                torch.testing.assert_close(stages[-1].weight[b], weight, rtol=1e-4, atol=1e-5)
        assert len({tuple(c) for c in counts}) == 3  # every picture keeps its own count
        assert all(0 < first < second for first, second in counts)
        fixed = 3 * net.backbone.prefix
        for stage, gone in zip(stages[1:], zip(*counts, strict=True), strict=True):
            assert stage.x.shape == (fixed + 3 * 144 - sum(gone), 24)  # who has left costs nothing


@pytest.mark.parametrize("keep", [1, 3, 5])
def test_the_surest_of_each_class_stay_though_they_are_easy(keep: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    confidence = torch.rand(4, 5, 60, generator=generator)
    real = torch.rand(4, 60, generator=generator) < 0.8
    found = easy(confidence, real, 0.7, keep)
    for b in range(4):
        value, kind = confidence[b].max(0)
        for c in range(5):
            mine = [j for j in range(60) if real[b, j] and value[j] > 0.7 and kind[j] == c]
            leaving = sorted(mine, key=lambda j: -float(value[j]))[keep:]
            assert sorted(leaving) == [j for j in range(60) if found[b, j] and kind[j] == c]
        assert not (found[b] & ~(real[b] & (value > 0.7))).any()


def test_a_threshold_of_one_lets_nothing_leave_and_is_exclusive() -> None:
    net = network(Config(**{**vars(SEGVIT), "thresholds": (1.0, 1.0)}))
    with torch.no_grad():
        x, _ = net.backbone.embed(pictures(2, 3, 48, 48))
        assert all(stage.live is None for stage in net.stages(x))
    confidence = torch.full((1, 1, 9), 0.5)
    assert not easy(confidence, None, 0.5, 1).any()
    assert easy(confidence, None, 0.4999, 1).sum() == 8


def test_setr_maps_before_it_enlarges_what_the_reference_maps_after() -> None:
    torch.manual_seed(0)
    head = SETRHead(SETR).eval()
    x = torch.randn(2, 144, 24)
    with torch.no_grad():
        conv = head.up_convs[0][0]
        hidden = F.relu(conv.bn(conv.conv(head.norm(x).mT.unflatten(2, (12, 12)))))
        want = head.conv_seg(F.interpolate(hidden, scale_factor=4, mode="bilinear", align_corners=False))
        canvas, weight = head(x, None)
        found = head.enlarge(canvas, weight, (12, 12), (48, 48))
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [SEGVIT, SETR], ids=["segvit", "setr"])
@pytest.mark.parametrize("size", [(48, 48), (40, 40), (30, 50), (64, 36)])
def test_pictures_of_other_sizes_are_filled_up_to_whole_patches(config: Config, size: tuple[int, int]) -> None:
    net, given = network(config), pictures(2, 3, *size)
    filled = F.pad(given, (0, -size[1] % 4, 0, -size[0] % 4))
    with torch.no_grad():
        found = net(given)
        square = size[0] == size[1] and config.host == "segvit"
        assert found.shape == (2, 6, *((48, 48) if square else size))
        grid = tuple(side // 4 for side in filled.shape[2:])
        x, seen = net.backbone.embed(given)
        assert tuple(seen) == grid
        torch.testing.assert_close(x, net.backbone.embed(filled)[0])
        last = net.stages(x)[-1]
        confidence = net.decode_head.predict(last.canvas[:, :, net.backbone.prefix :], last.weight)
        if config.host == "segvit":
            want = F.interpolate(confidence.unflatten(2, grid), found.shape[2:], mode="bilinear", align_corners=False)
            torch.testing.assert_close(found, want)


@pytest.mark.parametrize("config", [SEGVIT, SETR], ids=["segvit", "setr"])
def test_an_export_runs_pictures_whose_counts_differ_from_those_at_capture(config: Config) -> None:
    net, given = network(config), pictures(3, 3, 48, 48)
    batch = {"pictures": {0: torch.export.Dim("batch", max=32)}}
    exported = torch.export.export(net, (given[:2],), dynamic_shapes=batch, strict=False).module()
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(net)(given), net(given))
        for x in (given, given[2:], pictures(4, 3, 48, 48)):
            torch.testing.assert_close(exported(x), net(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(given)[1:2], net(given[1:2]), rtol=1e-4, atol=1e-5)
