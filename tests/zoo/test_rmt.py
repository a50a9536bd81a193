"""RMT beyond the laws: attention with decay written pair by pair, odd maps, and the head for token labels."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compiled_attn.zoo.rmt import PAPER, RMT, Config, ManhattanSelfAttention, RelativePosition


def model(**changes: object) -> RMT:
    torch.manual_seed(3)
    return RMT(Config(**(vars(PAPER.tiny) | changes))).eval()


def pair_by_pair(attn: ManhattanSelfAttention, x: Tensor, start: float, reach: float) -> Tensor:
    """The card's rule for one map [Y, X, C], one query and one key at a time."""
    height, length, width = x.shape
    heads, size = attn.heads, width // attn.heads
    places = [(y, column) for y in range(height) for column in range(length)]
    angles = [10000 ** -(j / (size // 2 - 1)) for j in range(size // 2)]

    def turned(vector: Tensor, place: tuple[int, int]) -> Tensor:
        number, out = place[0] * length + place[1], []
        for j, angle in enumerate(angles):
            c, s = math.cos(number * angle), math.sin(number * angle)
            out += [vector[2 * j] * c - vector[2 * j + 1] * s, vector[2 * j + 1] * c + vector[2 * j] * s]
        return torch.stack(out)

    q, k, v, out = attn.q_proj(x), attn.k_proj(x) * size**-0.5, attn.v_proj(x), torch.zeros(height, length, width)
    for head in range(heads):
        at, decay = slice(head * size, (head + 1) * size), math.log(1 - 2 ** (-start - reach * head / heads))
        queries, keys = {p: turned(q[*p][at], p) for p in places}, {p: turned(k[*p][at], p) for p in places}

        def mixed(at_place: tuple[int, int], seen: list[tuple[int, int]], values: Tensor) -> Tensor:
            steps = [abs(at_place[0] - p[0]) + abs(at_place[1] - p[1]) for p in seen]
            logits = [queries[at_place] @ keys[p] + decay * n for p, n in zip(seen, steps, strict=True)]  # noqa: B023
            return torch.softmax(torch.stack(logits), 0) @ torch.stack([values[*p] for p in seen])

        values = v[..., at]
        if attn.decomposed:
            lines = [mixed(p, [(p[0], column) for column in range(length)], values) for p in places]
            values = torch.stack(lines).reshape(height, length, size)
            lines = [mixed(p, [(y, p[1]) for y in range(height)], values) for p in places]
        else:
            lines = [mixed(p, places, values) for p in places]
        out[..., at] = torch.stack(lines).reshape(height, length, size)
    return attn.out_proj(out + attn.lepe(v[None])[0])


@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (4, 2), (1, 3)])
def test_attention_equals_the_rule_pair_by_pair(decomposed: bool, shape: tuple[int, int]) -> None:
    attn, positions = ManhattanSelfAttention(16, 2, decomposed), RelativePosition(16, 2, start=2, reach=5)
    x = 2 * torch.randn(2, *shape, 16)
    with torch.no_grad():
        want = torch.stack([pair_by_pair(attn, one, 2, 5) for one in x])
        torch.testing.assert_close(attn(x, positions(*shape)), want, rtol=1e-5, atol=2e-5)


def test_heads_reach_as_far_as_start_and_range_say() -> None:
    positions = RelativePosition(32, 4, start=2, reach=6)
    assert torch.equal(positions(3, 4).decay, positions.decay)
    assert positions.decay.exp().tolist() == pytest.approx([1 - 2 ** (-2 - 6 * h / 4) for h in range(4)])


@pytest.mark.parametrize("size", [(32, 48), (37, 50), (5, 3)])
def test_maps_of_any_size_go_through_and_halve_rounding_up(size: tuple[int, int]) -> None:
    net, seen = model(), []
    for stage in net.layers:
        stage.register_forward_hook(lambda _stage, given, _out: seen.append(tuple(given[0].shape[1:3])))
    with torch.no_grad():
        assert net(torch.randn(2, 3, *size)).isfinite().all()
    first = tuple(-(-side // 4) for side in size)
    assert seen[0] == first
    assert seen[1] == tuple(-(-side // 2) for side in first)


def test_an_export_of_any_picture_size_equals_the_network() -> None:
    net, dynamic = model(), torch.export.Dim.DYNAMIC
    shapes = {"x": {0: dynamic, 2: dynamic, 3: dynamic}}
    exported = torch.export.export(net, (torch.randn(2, 3, 40, 72),), dynamic_shapes=shapes, strict=False).module()
    for size in ((48, 64), (33, 90)):
        x = torch.randn(3, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), net(x), rtol=1e-5, atol=1e-5)


def test_token_labels_add_half_of_each_class_s_best_position() -> None:
    net, x = model(token_labels=True), torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        answer, maps = net(x), []
        net.aux_head.register_forward_hook(lambda _head, _given, out: maps.append(out))
        plain = RMT(replace(net.config, token_labels=False)).eval()
        plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("aux_head")})
        net(x)
        torch.testing.assert_close(answer, plain(x) + 0.5 * maps[0].max(1).values, rtol=1e-6, atol=1e-6)
    logits, positions = net.train()(x)
    assert logits.shape == (2, 10)
    assert positions.shape == (2, 2 * 3, 10)


def test_branches_are_scaled_in_the_stages_that_say_so() -> None:
    keys = [key for key in model().state_dict() if "gamma" in key]
    assert keys == ["layers.1.blocks.0.gamma_1", "layers.1.blocks.0.gamma_2"]
    assert model(layer_scale=0.25).layers[1].blocks[0].gamma_2.unique().tolist() == [0.25]
