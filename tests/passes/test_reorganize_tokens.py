"""ReorganizeTokens on stock models equals the rule in plain PyTorch; what it refuses, and in which words."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from models import enliven, timm_model, transformers_model
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "goldens"))

import golden
from reorganize_reference import masked, reorganized

from compiled_attn import zoo
from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.verify import verify
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.raise_attention import RaiseAttention
from compiled_attn.passes.reorganize_tokens import ReorganizeTokens, kept, with_kept_patches
from compiled_attn.runtime.capture import capture

TIMM = {"depth": 3, "embed_dim": 48, "num_heads": 3}
HF = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
STOCK = {
    "deit_small_patch16_224": 64,
    "vit_base_patch16_224": 64,
    "deit3_small_patch16_224": 64,
    "vit_small_patch14_dinov2": 56,
    "beit_base_patch16_224": 64,
    "eva02_tiny_patch14_224": 56,
    "ViTModel": 64,
    "DeiTModel": 64,
    "Dinov2Model": 64,
}
UNFUSED = ("deit_small_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224", "DeiTModel")
MORE = {
    "vit_small_patch14_reg4_dinov2": 56,
    "flexivit_small": 64,
    "vit_base_patch16_clip_quickgelu_224": 64,
    "DINOv3ViTModel": 64,
}
OPTIONS = [
    {"keep_rate": 0.7, "at": (0, 1, 2), "fuse": True},
    {"keep_rate": (0.5, 0.9), "at": (0, 2), "fuse": False},
]


@functools.cache
def stock(name, attention="sdpa", *, full=False):
    """(a stock model with lively weights, the side of its pictures)."""
    side = 224 if full else (STOCK | MORE)[name]
    if name.endswith("Model"):
        model = transformers_model(name, attention, **({} if full else HF))
    else:
        model = timm_model(name, attention, img_size=side, **({} if full else TIMM))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        enliven(model)
    return model.eval(), side


@functools.cache
def raised(name, attention="sdpa", *, full=False):
    """A stock model captured with symbolic batch, its attention raised."""
    model, side = stock(name, attention, full=full)
    return capture_raised(model, torch.randn(2, 3, side, side), {0: "batch"})


def capture_raised(model, x, dynamic):
    program = capture(model, (x,), dynamic_shapes=None if dynamic is None else (dynamic,))
    return run_passes(program, [RaiseAttention()], None, Notes())[0]


def reorganize(program, notes=None, **options):
    """The program reorganized and verified, with its kept patches as a second output."""
    changed, _ = run_passes(program, [ReorganizeTokens(**options)], None, Notes() if notes is None else notes)
    asked = with_kept_patches(changed)
    verify(asked, changed, after="kept patches")
    return asked


def tensors(tree):
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def worst(got, want):
    """Largest difference relative to the largest value."""
    assert [g.shape for g in got] == [w.shape for w in want]
    return max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))


def check(program, model, side, options, batch):
    x = torch.randn(batch, 3, side, side)
    with torch.no_grad():
        out, patches = reorganize(program, **options)(x)
        want, numbers = reorganized(model, x, **options)
    assert worst(tensors(out), want) < 1e-5
    assert len(patches) == len(numbers)
    assert all(torch.equal(a, b) for a, b in zip(patches, numbers, strict=True))


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_model_reorganized_equals_the_rule_in_plain_pytorch(name):
    model, side = stock(name)
    check(raised(name), model, side, OPTIONS[0], 3)
    if name in UNFUSED:
        check(raised(name), model, side, OPTIONS[1], 1)


@pytest.mark.parametrize("name", ["Dinov2Model"])
def test_attention_written_out_is_reorganized_after_raising(name):
    model, side = stock(name, "eager")
    check(raised(name, "eager"), model, side, OPTIONS[0], 2)


@pytest.mark.deep
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*STOCK, *MORE])
def test_more_stock_models_and_options_equal_the_rule(name, attention):
    model, side = stock(name, attention)
    for fuse in (True, False):
        for rate in (0.5, 0.7, 0.9):
            for at in ((0,), (1, 2), (0, 1, 2)):
                check(raised(name, attention), model, side, {"keep_rate": rate, "at": at, "fuse": fuse}, 2)


@pytest.mark.deep
@pytest.mark.parametrize("name", STOCK)
def test_a_stock_model_in_its_published_size_equals_the_rule(name):
    model, side = stock(name, full=True)
    for fuse in (True, False):
        check(raised(name, full=True), model, side, {"fuse": fuse}, 2)


@pytest.mark.parametrize("name", ["DINOv3ViTModel"])
def test_registers_stay_in_front(name):
    model, side = stock(name)
    check(raised(name), model, side, OPTIONS[0], 2)


def test_unfused_the_class_token_hears_what_it_would_with_the_left_out_patches_masked():
    model, side = stock("DINOv3ViTModel")
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        out, _ = reorganize(raised("DINOv3ViTModel"), at=(0, 2), fuse=False)(x)
        want = masked(model, x, at=(0, 2), prefix=1 + model.config.num_register_tokens)
    assert worst([tensors(out)[1]], [tensors(want)[1]]) < 1e-5


def golden_case():
    return golden.load("evit__deit_s_k07_fuse_224")


def golden_difference(model, dynamic):
    """Largest difference of each output of the golden case."""
    case = golden_case()
    x = case.inputs["x"]
    notes = Notes()
    program = reorganize(capture_raised(model, x, dynamic), notes)
    assert [n.what for n in notes.done] == ["196 -> 139 tokens", "139 -> 99 tokens", "99 -> 71 tokens"]
    with torch.no_grad():
        logits, patches = program(x)
    return case.differences({"logits": logits, **{f"kept_patches_{j}": p for j, p in enumerate(patches, 1)}})


def reproduced(difference):
    return difference.pop("logits") < 1e-4 and set(difference.values()) == {0.0}


@pytest.mark.parametrize("library", ["timm", "zoo"])
def test_plain_deit_reorganized_reproduces_the_golden_case(library):
    weights = golden_case().weights
    if library == "timm":
        import timm

        model = timm.create_model("deit_small_patch16_224")
        model.load_state_dict(weights)
    else:
        model = zoo.create("deit", "deit_s")
        zoo.load_checkpoint(model, weights)
    assert reproduced(golden_difference(model.eval(), None))


@pytest.mark.deep
def test_timm_deit_with_symbolic_batch_reproduces_the_golden_case():
    import timm

    model = timm.create_model("deit_small_patch16_224").eval()
    model.load_state_dict(golden_case().weights)
    assert reproduced(golden_difference(model, {0: "batch"}))


def test_pictures_of_symbolic_size_are_reorganized_by_integers():
    model = timm_model("vit_base_patch16_224", "sdpa", img_size=64, dynamic_img_size=True, **TIMM).eval()
    enliven(model)
    free = torch.export.Dim.DYNAMIC
    program = capture_raised(model, torch.randn(2, 3, 64, 64), {0: "batch", 2: free, 3: free})
    changed = reorganize(program, at=(0, 2))
    for shape in ((1, 3, 96, 48), (3, 3, 64, 64), (2, 3, 32, 32)):
        x = torch.randn(*shape)
        with torch.no_grad():
            out, patches = changed(x)
            want, numbers = reorganized(model, x, at=(0, 2))
        assert worst([out], want) < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(patches, numbers, strict=True))


@pytest.mark.parametrize("score", ["mean-query", "key-norm", "token-norm"])
def test_a_model_without_class_token_is_ranked_by_a_stated_score(score):
    model, program = poolers()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        out, patches = reorganize(program, at=(0, 2), score=score)(x)
        want, numbers = reorganized(model, x, at=(0, 2), score=score)
    assert worst([out], want) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(patches, numbers, strict=True))


@functools.cache
def poolers():
    """A network that averages its tokens and has none in front."""
    model = timm_model("vit_base_patch16_224", "sdpa", img_size=64, class_token=False, global_pool="avg", **TIMM).eval()
    enliven(model)
    return model, capture_raised(model, torch.randn(2, 3, 64, 64), {0: "batch"})


def test_no_class_token_is_refused_with_the_scores_to_choose_from():
    with pytest.raises(PassError, match="finds no class token") as error:
        reorganize(poolers()[1], at=(0,))
    assert 'score="mean-query"' in error.value.do


def test_every_stage_that_keeps_all_patches_leaves_the_very_program():
    program = raised("deit_small_patch16_224")
    notes = Notes()
    changed = ReorganizeTokens(keep_rate=(1.0, 0.99), at=(0, 1)).run(program, None, notes)
    assert changed is program
    assert [m.because for m in notes.misses] == [
        "keep_rate 1.0 keeps all 16 patches",
        "keep_rate 0.99 keeps all 16 patches",
    ]


def test_the_same_program_gives_the_same_text_twice():
    program = raised("eva02_tiny_patch14_224")
    texts = {str(reorganize(program, **OPTIONS[0])) for _ in range(2)}
    assert len(texts) == 1


def test_a_program_that_is_reorganized_already_is_refused():
    changed, _ = run_passes(raised("deit_small_patch16_224"), [ReorganizeTokens(at=(1,))], None, Notes())
    with pytest.raises(PassError, match="reorganized already"):
        ReorganizeTokens(at=(0,)).run(changed, None, Notes())


def test_attention_stays_fused_and_only_the_stages_ask_for_the_class_row():
    text = str(reorganize(raised("deit_small_patch16_224"), at=(1, 2)))
    assert text.count("= compiled_attn::attention_with_class_row(") == 2
    assert text.count("= scaled_dot_product_attention(") == 1
    assert text.count("= compiled_attn::select_tokens(") == 2
    assert "softmax" not in text


def test_names_of_nodes_and_modules_do_not_matter():
    edit = raised("beit_base_patch16_224").edit()
    for i, node in enumerate(list(edit.graph.nodes)):
        if node.op == "call_function":
            node._rename(f"anything_{i}")
            node.meta["nn_module_stack"] = {"": ("", "Anything")}
    model, side = stock("beit_base_patch16_224")
    check(edit.finish("renamed"), model, side, OPTIONS[0], 2)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"keep_rate": 0.0}, "is no share"),
        ({"keep_rate": 1.5}, "is no share"),
        ({"keep_rate": (0.5, 0.5)}, "does not fit"),
        ({"at": (6, 3)}, "does not fit"),
        ({"at": (-1, 3)}, "does not fit"),
        ({"score": "rollout"}, "unknown score"),
    ],
)
def test_wrong_options_are_refused_at_once(options, what):
    with pytest.raises(PassError, match=what):
        ReorganizeTokens(**options)


def test_a_block_that_the_program_does_not_have_is_refused():
    with pytest.raises(PassError, match="has no block 9"):
        ReorganizeTokens().run(raised("deit_small_patch16_224"), None, Notes())


def test_windows_are_refused_as_no_tokens():
    model = timm_model(
        "swin_tiny_patch4_window7_224", "sdpa", img_size=56, embed_dim=24, depths=(2,), num_heads=(2,)
    ).eval()
    with pytest.raises(PassError, match="finds no self-attention over tokens"):
        ReorganizeTokens(at=(0,)).run(capture_raised(model, torch.randn(1, 3, 56, 56), None), None, Notes())


def test_kept_patches_of_a_dense_program_are_refused():
    with pytest.raises(PassError, match="keeps every patch"):
        with_kept_patches(raised("deit_small_patch16_224"))


def test_counts_are_those_of_the_papers_code():
    counts = [196]
    for _ in range(3):
        counts.append(kept(counts[-1], 0.7) + 1)
    assert counts == [196, 139, 99, 71]
    assert kept(100, 0.55) == 56  # 0.55 * 100 is 55.00000000000001
