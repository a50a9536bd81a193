"""SinkLoRA beyond the laws: its host against transformers, who sees whom, low-rank updates, caches that drop."""

import pytest
import torch
import torch.nn.functional as F
import torchvision_shim  # noqa: F401  (before transformers' models)
from torch import Tensor

from compiled_attn import zoo
from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.layers.eviction import (
    Cache,
    Everything,
    HeavyHitters,
    MaskedHeavyHitters,
    Policy,
    SinkAndRecent,
    SnapKV,
)
from compiled_attn.zoo.sinklora import Config, SinkLoRA, merged, visible

SMALL = Config(vocabulary=50, width=48, hidden=64, depth=2, heads=6, groups=2)


def model(**changes: object) -> SinkLoRA:
    torch.manual_seed(3)
    built = SinkLoRA(Config(**(vars(SMALL) | changes))).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def texts(batch: int, length: int) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(1))


def decode(net: SinkLoRA, tokens: Tensor, policy: Policy, prompt: int) -> tuple[Tensor, list[list[Cache]]]:
    """Logits of a prompt and then token by token, and the caches behind every step."""
    with torch.no_grad():
        out, caches = net.extend(tokens[:, :prompt], net.caches(tokens.shape[0]), policy, 0)
        outs, seen = [out], [caches]
        for at in range(prompt, tokens.shape[1]):
            out, caches = net.extend(tokens[:, at : at + 1], caches, policy, at)
            outs.append(out)
            seen.append(caches)
    return torch.cat(outs, 1), seen


def influence(net: SinkLoRA, tokens: Tensor, at: int) -> Tensor:
    """Which positions' logits change with the token at `at`."""
    other = tokens.clone()
    other[:, at] = (other[:, at] + 1) % 50
    with torch.no_grad():
        return (net(tokens) - net(other)).abs().amax((0, 2)) > 1e-6


def test_with_full_attention_it_is_transformers_llama() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    )
    net, host = model(rope_factor=2.0), transformers.LlamaForCausalLM(config).eval()
    report = zoo.load_checkpoint(host, {"state_dict": net.state_dict()})
    assert report.complete
    tokens = texts(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(net(tokens), host(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rolling", [False, True])
def test_a_cache_that_keeps_everything_answers_like_the_whole_text(rolling: bool) -> None:
    net, tokens = model(), texts(2, 14)
    out, seen = decode(net, tokens, Everything(rolling), prompt=5)
    with torch.no_grad():
        torch.testing.assert_close(out, net(tokens), rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[-1][0].positions, torch.arange(14).expand(2, 2, -1))
    # every query gives each of its three heads' keys one unit of attention in all
    torch.testing.assert_close(seen[-1][1].scores.sum(2), torch.full((2, 2), 3.0 * 14), rtol=1e-5, atol=1e-5)


def test_the_form_without_flash_attention_leaks_the_end_of_the_text_into_its_beginning() -> None:
    tokens = texts(1, 16)
    assert influence(model(pattern="shifted"), tokens, 15)[:2].all()
    for pattern in ("full", "segments", "sinks"):
        assert not influence(model(pattern=pattern), tokens, 15)[:15].any()


def test_sinks_are_seen_by_all_and_segments_by_themselves() -> None:
    tokens = texts(1, 16)
    one = {"depth": 1}  # a second layer hands on what the first saw
    assert influence(model(pattern="sinks", **one), tokens, 3)[3:].all()
    assert influence(model(pattern="segments", **one), tokens, 3).nonzero().flatten().tolist() == [3, 4, 5]
    seen = visible(4, 16, 4, 0, torch.device("cpu"))
    assert seen[0, 7].nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert seen[3, 7].nonzero().flatten().tolist() == [6, 7]
    assert seen[3, 1].nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("pattern", ["segments", "shifted"])
def test_grouped_attention_equals_plain_attention_of_each_group(pattern: str) -> None:
    net, tokens = model(pattern=pattern, depth=1), texts(2, 24)
    layer = net.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(net.model.embed_tokens(tokens))
        q, k, v = layer.self_attn.heads_of(x)
        q, k = (layer.self_attn.rotate(t, torch.arange(24)) for t in (q, k))
        k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        out = torch.zeros_like(q)
        for head in range(6):
            order = torch.arange(24) if head < 3 else torch.arange(24).roll(-3)
            groups = list(order.split(6))
            if head >= 3 and pattern == "segments":  # the last group is the text's end and its beginning
                groups = [*groups[:3], groups[3][:3], groups[3][3:]]
            for at in groups:
                part = (t[:, head : head + 1, at] for t in (q, k, v))
                out[:, head, at] = F.scaled_dot_product_attention(*part, is_causal=True)[:, 0]
        want = layer.self_attn.join(out)
        seen = []
        layer.self_attn.register_forward_hook(lambda _attn, _given, out: seen.append(out))
        net(tokens)
    torch.testing.assert_close(seen[0], want, rtol=1e-5, atol=1e-5)


def test_texts_that_do_not_divide_and_unknown_patterns_are_named_errors() -> None:
    with pytest.raises(CompiledAttnError, match=r"does not divide[\s\S]*13 tokens[\s\S]*multiple of 4"):
        model(pattern="shifted")(texts(1, 13))
    with pytest.raises(CompiledAttnError, match=r"'shift'[\s\S]*segments"):
        Config(pattern="shift")


def test_low_rank_updates_merge_in_place_and_from_a_checkpoint_and_train_alone() -> None:
    net, tokens = model(rank=3, alpha=6.0), texts(2, 8)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    net.train_as_published()
    learning = {name.split(".")[-2] for name, p in net.named_parameters() if p.requires_grad}
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert learning == {"lora_A", "lora_B", "embed_tokens"} | norms
    with torch.no_grad():
        want = net(tokens)
        net.merge()
        torch.testing.assert_close(net(tokens), want, rtol=1e-5, atol=1e-5)
        assert not any("lora" in key for key in net.state_dict())
        updates = {f"base_model.model.{key}": value for key, value in state.items() if "lora_" in key}
        base = {key: value for key, value in state.items() if "lora_" not in key}
        updates["base_model.model.model.norm.weight"] = base["model.norm.weight"]
        base["model.norm.weight"] = torch.zeros(48)
        plain = model()
        zoo.load_checkpoint(plain, merged(base, updates, alpha=6.0))
        torch.testing.assert_close(plain(tokens), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "policy", [SinkAndRecent(2, 5), HeavyHitters(3, 4), HeavyHitters(3, 4, rolling=True)], ids=repr
)
def test_a_budget_is_never_exceeded_and_what_must_stay_stays(policy: Policy) -> None:
    _, seen = decode(model(), texts(2, 30), policy, prompt=9)
    for step, caches in enumerate(seen):
        for cache in caches:
            at = cache.positions
            assert at.shape == (2, 2, 7)
            assert (at.diff(dim=2) > 0).all()
            last = torch.arange(8 + step - 3, 8 + step + 1)
            assert torch.equal(at[..., -4:], last.expand(2, 2, -1))
            if isinstance(policy, SinkAndRecent):
                assert torch.equal(at[..., :2], torch.arange(2).expand(2, 2, -1))


def test_heavy_hitters_are_those_with_the_largest_sums_of_attention() -> None:
    scores = torch.tensor([[[0.1, 3.0, 0.2, 2.0, 1.0, 9.0, 0.0]]])
    slots = torch.zeros(1, 1, 7, 4)
    cache = Cache(slots, slots, torch.arange(10, 17).expand(1, 1, -1), scores)
    kept = cache.kept(HeavyHitters(heavy=2, recent=3).keep(cache))
    assert kept.positions.tolist() == [[[11, 13, 14, 15, 16]]]
    assert kept.scores.flatten().tolist() == pytest.approx([3.0, 2.0, 1.0, 9.0, 0.0])
    assert HeavyHitters(heavy=3, recent=4).keep(cache) is None


def test_the_simulation_hides_a_token_for_one_step_when_it_leaves_the_window() -> None:
    policy, scores = MaskedHeavyHitters(), torch.tensor([[[5.0, 0.1, 0.2, 4.0, 0.3]]])
    mask, remembered = policy.step(scores, heavy=1, recent=2)
    assert mask.tolist() == [[[1, 0, 0, 0, 1, 1]]]  # the recent two count the token to come; slot 3 is in neither set
    assert remembered.flatten().tolist() == pytest.approx([5.0, 0, 0, 4.0, 0.3])
    mask, remembered = policy.step(scores, heavy=2, recent=0)
    assert mask.tolist() == [[[1, 0, 0, 1, 0, 0]]]
    assert torch.equal(remembered, scores)
    assert policy.budgets(25) == (2, 2)


@pytest.mark.parametrize("pooling", ["avgpool", "maxpool"])
def test_snapkv_keeps_the_window_and_the_best_of_smoothed_attention(pooling: str) -> None:
    q, k = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    policy = SnapKV(window=4, capacity=9, kernel=3, pooling=pooling)
    index = policy.keep(q, k)
    weights = torch.softmax((q @ k.mT * 8**-0.5).masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf")), 3)
    mass = F.pad(weights[:, :, -4:, :-4].sum(2), (1, 1))
    windows = mass.unfold(2, 3, 1)
    score = windows.mean(3) if pooling == "avgpool" else windows.amax(3)
    torch.testing.assert_close(policy.scores(q, k), score, rtol=1e-5, atol=1e-6)
    best = score.sort(2, descending=True).values[..., :5]  # by score: neighbours under one maximum tie
    torch.testing.assert_close(score.gather(2, index[..., :5]), best, rtol=1e-5, atol=1e-6)
    assert all(len(set(row.tolist())) == 9 for row in index.flatten(0, 1))
    assert torch.equal(index[..., 5:], torch.arange(16, 20).expand(2, 3, -1))
    assert SnapKV(window=4, capacity=21).keep(q, k) is None
