"""PruneTokens on stock models equals the rule in plain PyTorch, picture by picture; what it refuses, and how."""

import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from models import enliven, timm_model
from torch.nn.functional import scaled_dot_product_attention as sdpa

sys.path.insert(0, str(Path(__file__).parent))

from prune_reference import pruned
from test_follow import COUNT, WIDTH, with_attention, with_head
from test_reorganize_tokens import capture_raised, poolers, raised, stock, tensors, worst

from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.verify import verify
from compiled_attn.passes import pipelines
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.prune_tokens import PruneTokens, with_kept_masks
from compiled_attn.passes.raise_attention import RaiseAttention
from compiled_attn.passes.reorganize_tokens import ReorganizeTokens
from compiled_attn.runtime.capture import capture

MASS = {"mass": (0.9, 0.8, 0.85), "at": (0, 1, 2)}
THRESHOLD = {"threshold": 0.05, "at": (0, 2), "keep_at_least": 3, "keep_at_most": 9}
MODELS = ("deit_small_patch16_224", "vit_base_patch16_224", "ViTModel", "Dinov2Model")
MORE = ("deit3_small_patch16_224", "vit_small_patch14_dinov2", "DeiTModel", "flexivit_small")
TABLES = ("beit_base_patch16_224", "eva02_tiny_patch14_224", "DINOv3ViTModel")  # a bias by pairs, rotary tables


@functools.cache
def cleaned(name, *, full=False):
    """A stock model captured with symbolic batch, its attention raised and masks that hide nothing dropped."""
    model, side = stock(name, full=full)
    program = capture(model, (torch.randn(2, 3, side, side),), dynamic_shapes=({0: "batch"},))
    return run_passes(program, pipelines.portable(), None, Notes())[0]


def prune(program, notes=None, **options):
    """The program pruned and verified, with its masks as a second output."""
    changed, _ = run_passes(program, [PruneTokens(**options)], None, Notes() if notes is None else notes)
    asked = with_kept_masks(changed)
    verify(asked, changed, after="kept masks")
    return asked


def check(program, model, side, options, batch, *, counts_differ=True):
    x = torch.randn(batch, 3, side, side)
    with torch.no_grad():
        out, masks = prune(program, **options)(x)
        want, wanted = pruned(model, x, **options)
    assert [m.tolist() for m in masks] == [m.tolist() for m in wanted]
    assert worst(tensors(out), want) < 1e-5
    if counts_differ:
        assert batch == 1 or len({*masks[-1].sum(1).tolist()}) > 1


@pytest.mark.parametrize("name", MODELS)
def test_a_stock_model_pruned_equals_the_rule_picture_by_picture(name):
    model, side = stock(name)
    for options, batch in ((MASS, 6), (THRESHOLD, 5)):
        check(cleaned(name), model, side, options, batch, counts_differ=False)


@pytest.mark.parametrize("name", TABLES)
def test_biases_by_pairs_and_rotary_tables_are_those_of_the_tokens_that_are_left(name):
    model, side = stock(name)
    check(raised(name), model, side, MASS, 5, counts_differ=False)


@pytest.mark.deep
@pytest.mark.parametrize("name", [*MODELS, *MORE, *TABLES])
def test_more_stock_models_and_options_equal_the_rule(name):
    model, side = stock(name)
    for at in ((0,), (1, 2), (0, 1, 2)):
        for rule in ({"mass": 0.5}, {"mass": 0.97}, {"threshold": 0.03}, {"threshold": 1.0}):
            for bounds in ({}, {"keep_at_least": 4}, {"keep_at_most": 6}):
                check(cleaned(name), model, side, {**rule, **bounds, "at": at}, 4, counts_differ=False)


@pytest.mark.deep
@pytest.mark.parametrize("name", MODELS)
def test_a_stock_model_in_its_published_size_equals_the_rule(name):
    model, side = stock(name, full=True)
    check(cleaned(name, full=True), model, side, {"mass": 0.9, "at": (3, 6, 9)}, 3)


def test_pictures_of_one_batch_keep_different_numbers():
    model, side = stock("deit_small_patch16_224")
    check(cleaned("deit_small_patch16_224"), model, side, MASS, 12)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_pruned_as_well(batch):
    model, side = stock("Dinov2Model")
    program = capture(model, (torch.randn(batch, 3, side, side),))
    program, _ = run_passes(program, pipelines.portable(), None, Notes())
    check(program, model, side, MASS, batch, counts_differ=False)


@pytest.mark.parametrize("score", ["mean-query", "key-norm", "token-norm"])
def test_tokens_without_a_class_token_are_ranked_by_a_stated_score_and_averaged(score):
    model, program = poolers()
    check(program, model, 64, {"mass": (0.6, 0.7), "at": (0, 2), "score": score}, 5, counts_differ=False)


def test_patches_are_averaged_without_the_class_token():
    tiny = {"depth": 2, "embed_dim": 24, "num_heads": 3}
    model = timm_model("vit_base_patch16_224", "sdpa", img_size=64, global_pool="avg", **tiny).eval()
    enliven(model)
    program = capture_raised(model, torch.randn(2, 3, 64, 64), {0: "batch"})
    check(program, model, 64, {"mass": 0.8, "at": (0, 1)}, 5)


def test_a_picture_does_not_change_what_another_says():
    _, side = stock("ViTModel")
    program = prune(cleaned("ViTModel"), **MASS)
    x = torch.randn(4, 3, side, side)
    with torch.no_grad():
        alone = tensors(program(x[2:3]))
        x[0] = torch.nan
        found = tensors(program(x))
    for a, b in zip(alone, found, strict=True):
        assert torch.equal(a[0], b[2]) if a.dtype == torch.bool else torch.allclose(a[0], b[2], atol=1e-5)


def test_attention_is_ragged_behind_the_first_stage_and_dense_before():
    text = str(prune(raised("deit_small_patch16_224"), mass=0.9, at=(1, 2)))
    assert text.count("= scaled_dot_product_attention(") == 1
    assert text.count("= compiled_attn::attention_with_class_row(") == 1
    assert text.count("= compiled_attn::ragged_attention(") == 1
    assert text.count("= compiled_attn::pack_tokens(") == 2


def test_the_same_program_gives_the_same_text_up_to_the_number_of_its_size():
    program = raised("deit_small_patch16_224")
    texts = {re.sub(r"u\d+", "u", str(prune(program, **MASS))) for _ in range(2)}
    assert len(texts) == 1


def pruned_net(model, x):
    """A network of test_follow.py pruned behind its first two blocks, run."""
    program, _ = run_passes(capture(model.eval(), (x,)), [RaiseAttention()], None, Notes())
    with torch.no_grad():
        return prune(program, mass=0.7, at=(0, 1))(x)


def test_a_boolean_mask_hides_what_the_same_mask_added_to_the_scores_does():
    seen = torch.rand(COUNT, COUNT) > 0.4
    seen[:, 0] = True
    torch.manual_seed(1)
    hidden = with_attention(lambda s, q, k, v: sdpa(q, k, v, s.seen), seen=seen)
    bias = torch.zeros(COUNT, COUNT).masked_fill(~seen, -torch.inf)
    torch.manual_seed(1)
    added = with_attention(lambda s, q, k, v: sdpa(q, k, v, s.seen), seen=bias)
    x = torch.randn(4, COUNT - 1, WIDTH)
    (out, masks), (want, wanted) = pruned_net(hidden, x), pruned_net(added, x)
    assert [m.tolist() for m in masks] == [m.tolist() for m in wanted]
    assert 0 < masks[-1].sum() < masks[0].sum() < masks[0].numel()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


def test_a_class_token_taken_off_and_put_on_stands_in_front_of_its_own_patches():
    torch.manual_seed(1)
    doubled = with_head(lambda x: torch.cat([x[:, :1] * 2, x[:, 1:]], 1))
    torch.manual_seed(1)
    plain = with_head(lambda x: x)
    x = torch.randn(4, COUNT - 1, WIDTH) * torch.tensor([0.1, 1.0, 3.0, 9.0]).view(-1, 1, 1)
    (out, _), (want, masks) = pruned_net(doubled, x), pruned_net(plain, x)
    assert len({*masks[-1].sum(1).tolist()}) > 1
    want[:, 0] *= 2
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)


REFUSED = {
    "weights over tokens": (lambda x: x.softmax(1)[:, 0], "softmax over packed tokens would reach over the borders"),
    "products of tokens": (
        lambda x: torch.einsum("bnc,bnd->bcd", x, x),
        "packed tokens with packed tokens, over the borders of pictures",
    ),
    "tokens doubled": (lambda x: torch.cat([x, x], 1)[:, 0], "it joins packed tokens to others than fixed ones"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_packed_tokens_is_refused_in_words(name):
    head, because = REFUSED[name]
    with pytest.raises(PassError, match="can not follow the tokens through") as error:
        pruned_net(with_head(head), torch.randn(4, COUNT - 1, WIDTH))
    assert because in error.value.facts


def test_what_can_not_be_followed_is_a_miss_that_names_the_node():
    notes = Notes()
    with pytest.raises(PassError, match=r"can not follow the tokens through .*blocks\.1") as error:
        prune(raised("beit_base_patch16_224"), notes, mass=0.9, at=(0, 1), score="mean-query")
    (miss,) = notes.misses
    assert re.search("the mean of its bias or mask over the queries that are left is not known", miss.because)
    assert miss.because == error.value.facts
    assert "blocks.1" in miss.where and "timm" in error.value.where


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "takes a threshold or a mass"),
        ({"mass": 0.9, "threshold": 0.1}, "takes a threshold or a mass"),
        ({"mass": 1.5}, "is no share"),
        ({"threshold": -0.1}, "is no share"),
        ({"mass": (0.9, 0.8)}, "does not fit"),
        ({"mass": 0.9, "at": (6, 3)}, "does not fit"),
        ({"mass": 0.9, "keep_at_least": 0}, "no number of patches"),
        ({"mass": 0.9, "keep_at_least": 5, "keep_at_most": 4}, "no number of patches"),
        ({"mass": 0.9, "score": "rollout"}, "unknown score"),
    ],
)
def test_wrong_options_are_refused_at_once(options, what):
    with pytest.raises(PassError, match=what):
        PruneTokens(**options)


def test_a_program_without_such_blocks_or_class_token_or_pruned_already_is_refused():
    program = raised("deit_small_patch16_224")
    with pytest.raises(PassError, match="has no block 9"):
        PruneTokens(mass=0.9).run(program, None, Notes())
    with pytest.raises(PassError, match="finds no class token"):
        PruneTokens(mass=0.9, at=(0,)).run(poolers()[1], None, Notes())
    once, _ = run_passes(program, [PruneTokens(mass=0.9, at=(1,))], None, Notes())
    for again in (PruneTokens(mass=0.9, at=(0,)), ReorganizeTokens(at=(0,))):
        with pytest.raises(PassError, match="reorganized already"):
            again.run(once, None, Notes())
    with pytest.raises(PassError, match="keeps every token"):
        with_kept_masks(program)
