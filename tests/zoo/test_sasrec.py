"""SASRec beyond the laws: each layout written step by step, what pads do in each, lengths, heads and scores."""

import math

import pytest
import torch
from torch import Tensor, nn

from compiled_attn.zoo.sasrec import LAYOUTS, Config, OfficialSASRec, Recommender, build

SETTINGS = [*((layout, False) for layout in LAYOUTS), ("port2025", True)]
settings = pytest.mark.parametrize(("layout", "norm_first"), SETTINGS)


def network(layout: str, norm_first: bool = False, heads: int = 2) -> Recommender:
    torch.manual_seed(5)
    net = build(Config(30, length=9, width=12, depth=2, heads=heads, layout=layout, norm_first=norm_first)).eval()
    with torch.no_grad():  # norms, biases and row 0 away from where they start
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


SEQUENCE = torch.tensor([[0, 0, 0, 4, 9, 30, 2, 4, 11], [7, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 0, 0, 0, 0, 3]])


def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt() * scale + shift


def attend(
    query: list[Tensor], x: list[Tensor], maps: list[tuple[Tensor, Tensor]], heads: int, keys: list[bool]
) -> list[Tensor]:
    """Causal attention one step and one head at a time; maps: (weight [out, in], bias) of q, k and v."""
    q, k, v = ([w @ row + b for row in rows] for (w, b), rows in zip(maps, (query, x, x), strict=True))
    size, out = len(q[0]) // heads, []
    for i, asked in enumerate(q):
        parts = []
        for h in range(heads):
            cut = slice(h * size, (h + 1) * size)
            score = [float(asked[cut] @ k[j][cut]) / math.sqrt(size) if keys[j] else -(2.0**32) for j in range(i + 1)]
            weight = [math.exp(s - max(score)) for s in score]
            parts.append(sum(w / sum(weight) * v[j][cut] for j, w in enumerate(weight)))
        out.append(torch.cat(parts))
    return out


def by_the_card(net: Recommender, sequence: Tensor) -> Tensor:
    """Features [L, C] of one sequence, by the card's words for its layout."""
    config, layout = net.config, net.config.layout
    state = net.state_dict()
    official = layout == "official"
    items = state["SASRec.input_embeddings.lookup_table" if official else "item_emb.weight"].clone()
    places = state["SASRec.dec_pos.lookup_table" if official else "pos_emb.weight"]
    items[0] = items[0] * (not official)
    ids = sequence.tolist()
    masks_rows = layout in ("official", "port2020")
    where = [i if masks_rows else (i + 1) * (s != 0) for i, s in enumerate(ids)]
    real = [s != 0 or not masks_rows for s in ids]
    x = [(items[s] * math.sqrt(config.width) + places[p]) * r for s, p, r in zip(ids, where, real, strict=True)]
    for b in range(config.depth):
        if official:
            at = f"SASRec.num_blocks_{b}."
            norms = [(state[at + n + ".Variable_1"], state[at + n + ".Variable"]) for n in ("ln", "ln_1")]
            dense = [at + "self_attention.dense" + n for n in ("", "_1", "_2")]
            maps = [(state[d + ".kernel"].T, state[d + ".bias"]) for d in dense]
            conv = [at + "multihead_attention.conv1d" + n for n in ("", "_1")]
            mlp = [(state[c + ".kernel"][0].T, state[c + ".bias"]) for c in conv]
            final = (torch.eye(config.width), torch.zeros(config.width))
        else:
            kinds = ("attention_layernorms", "forward_layernorms")
            norms = [(state[f"{n}.{b}.weight"], state[f"{n}.{b}.bias"]) for n in kinds]
            at = f"attention_layers.{b}."
            maps = list(zip(state[at + "in_proj_weight"].chunk(3), state[at + "in_proj_bias"].chunk(3), strict=True))
            conv = [f"forward_layers.{b}.conv{i}" for i in (1, 2)]
            mlp = [(state[c + ".weight"][..., 0], state[c + ".bias"]) for c in conv]
            final = (state[at + "out_proj.weight"], state[at + "out_proj.bias"])

        def forward(row: Tensor, mlp: list[tuple[Tensor, Tensor]] = mlp) -> Tensor:
            (w1, b1), (w2, b2) = mlp
            return w2 @ (w1 @ row + b1).clamp(min=0) + b2

        keys = [s != 0 for s in ids] if official else [True] * len(ids)
        first = [norm(row, *norms[0]) for row in x]
        if layout == "port2025":
            asked = first if config.norm_first else x
            seen = [final[0] @ o + final[1] for o in attend(asked, asked, maps, config.heads, keys)]
            x = [row + s for row, s in zip(x, seen, strict=True)]
            if config.norm_first:
                x = [row + forward(norm(row, *norms[1])) for row in x]
            else:
                x = [norm(row, *norms[0]) for row in x]
                x = [norm(row + forward(row), *norms[1]) for row in x]
        else:
            seen = [final[0] @ o + final[1] for o in attend(first, x, maps, config.heads, keys)]
            x = [norm(row + s, *norms[1]) for row, s in zip(first, seen, strict=True)]
            x = [(row + forward(row)) * r for row, r in zip(x, real, strict=True)]
    last = (
        ("SASRec.ln.Variable_1", "SASRec.ln.Variable") if official else ("last_layernorm.weight", "last_layernorm.bias")
    )
    return torch.stack([norm(row, state[last[0]], state[last[1]]) for row in x])


@settings
@pytest.mark.parametrize("heads", [1, 3])
def test_features_equal_the_layout_written_step_by_step(layout: str, norm_first: bool, heads: int) -> None:
    net = network(layout, norm_first, heads)
    with torch.no_grad():
        found = net.features(SEQUENCE)
        for row, ids in zip(found, SEQUENCE, strict=True):
            torch.testing.assert_close(row, by_the_card(net, ids), rtol=1e-4, atol=1e-4)


@settings
def test_a_later_item_changes_no_earlier_feature(layout: str, norm_first: bool) -> None:
    net = network(layout, norm_first)
    changed = SEQUENCE.clone()
    changed[:, -1] = 17
    with torch.no_grad():
        torch.testing.assert_close(net.features(changed)[:, :-1], net.features(SEQUENCE)[:, :-1])


@settings
def test_a_shorter_window_and_scores_of_chosen_items_are_taken(layout: str, norm_first: bool) -> None:
    net = network(layout, norm_first)
    items = torch.tensor([5, 0, 30])
    with torch.no_grad():
        scores = net(SEQUENCE[:, 3:])
        assert scores.shape == (3, 31)
        torch.testing.assert_close(net(SEQUENCE[:, 3:], items), scores[:, items])
        torch.testing.assert_close(net(SEQUENCE[:, 3:], items.expand(3, -1)), scores[:, items])


def test_only_the_official_layout_hides_pads_from_real_items_and_zeroes_item_0() -> None:
    for layout in LAYOUTS:
        net = network(layout)
        with torch.no_grad():
            before = net.features(SEQUENCE[:1])[:, 3:]
            table = net.SASRec.input_embeddings.lookup_table if layout == "official" else net.item_emb.weight
            table[0] += 1.0
            after = net.features(SEQUENCE[:1])[:, 3:]
        hidden = layout in ("official", "port2020")  # in 2020 pads are zero rows, seen but the same
        assert torch.equal(before, after) == hidden
        assert bool((net.score(before)[:, 0] == 0).all()) == (layout == "official")


@settings
def test_every_layout_is_traced_and_exported_with_the_same_numbers(layout: str, norm_first: bool) -> None:
    net = network(layout, norm_first)
    batch = {"sequence": {0: torch.export.Dim("batch", max=64)}}
    exported = torch.export.export(net, (SEQUENCE,), dynamic_shapes=batch, strict=False).module()
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(net)(SEQUENCE), net(SEQUENCE))
        torch.testing.assert_close(exported(SEQUENCE[:2]), net(SEQUENCE[:2]))


def test_attention_is_that_of_torch_under_the_same_keys() -> None:
    net = network("port2024", heads=3)
    mine, theirs = net.attention_layers[0], nn.MultiheadAttention(12, 3).eval()
    theirs.load_state_dict(mine.state_dict())
    query, x = torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    hidden = ~torch.ones(7, 7, dtype=torch.bool).tril()
    with torch.no_grad():
        want = theirs(query.mT.permute(2, 0, 1), x.mT.permute(2, 0, 1), x.mT.permute(2, 0, 1), attn_mask=hidden)[0]
        torch.testing.assert_close(mine(query, x, causal=True), want.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_the_official_parameters_start_as_tensorflow_names_them() -> None:
    keys = set(OfficialSASRec(Config(5, length=4, width=8, depth=1)).state_dict())
    assert {
        "SASRec.dec_pos.lookup_table",
        "SASRec.num_blocks_0.self_attention.dense_2.kernel",
        "SASRec.ln.Variable",
    } <= keys
    assert len(keys) == 2 + 14 + 2
