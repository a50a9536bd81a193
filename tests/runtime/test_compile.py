"""`compile`: eager's numbers at every call, captured again when it must be, never an answer from stale weights."""

import random
import threading

import pytest
import torch
from torch import nn

import compiled_attn as ca
from compiled_attn.ir.errors import CaptureError, ContractError, PassError, TargetError
from compiled_attn.ops import local_attention


class Small(nn.Module):
    """One linear and a norm: the smallest thing with weights that get folded."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, x, scale=1.0):
        return {"y": self.norm(self.linear(x)) * scale, "mean": x.mean(-1)}


@pytest.fixture(scope="module")
def shared():
    """One model compiled with a dynamic batch, for all tests that only call it."""
    torch.manual_seed(0)
    model = Small().eval()
    fast = ca.compile(model, example_inputs=(torch.randn(1, 8),), dynamic_shapes={"x": {0: "batch"}})
    return model, fast


def check(fast, model, *args, tolerance=1e-5, **kwargs):
    with torch.no_grad():
        found, want = fast(*args, **kwargs), model(*args, **kwargs)
    assert found.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(found[key], want[key], rtol=tolerance, atol=tolerance)


def test_a_dynamic_batch_is_captured_once(shared):
    model, fast = shared
    for batch in (1, 2, 33):
        check(fast, model, torch.randn(batch, 8))
    assert len(fast.programs) == 1


def test_a_non_contiguous_input_gives_the_same_numbers(shared):
    model, fast = shared
    check(fast, model, torch.randn(8, 5).t())
    check(fast, model, torch.randn(10, 16)[::2, ::2])


def test_a_call_that_needs_gradients_has_them(shared):
    model, fast = shared
    x = torch.randn(3, 8, requires_grad=True)
    fast(x)["y"].square().sum().backward()
    found, x.grad = x.grad, None
    model(x)["y"].square().sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-5)
    assert any("gradient" in event for event in fast.events)


def test_autocast_is_kept(shared):
    model, fast = shared
    x = torch.randn(3, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, want = fast(x), model(x)
    assert found["y"].dtype == want["y"].dtype
    torch.testing.assert_close(found["y"], want["y"], rtol=2e-2, atol=2e-2)


def test_calls_from_many_threads_do_not_mix(shared):
    model, fast = shared
    inputs = [torch.randn(4, 8) for _ in range(8)]
    found = [None] * len(inputs)

    def work(i):
        for _ in range(20):
            found[i] = fast(inputs[i])["y"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for x, y in zip(inputs, found, strict=True):
            torch.testing.assert_close(y, model(x)["y"], rtol=1e-5, atol=1e-5)


def test_a_wrong_rank_or_dtype_is_captured_anew_or_refused_in_words(shared):
    _, fast = shared
    before = len(fast.programs)
    with pytest.raises(CaptureError):
        fast(torch.randn(2, 9))
    assert len(fast.programs) == before


def test_explain_says_what_was_done(shared):
    _, fast = shared
    text = str(fast.explain())
    assert "canonicalize" in text and "captured: first call" in text


def test_stale_weights_are_folded_again():
    model = Small().eval()
    fast = ca.compile(model)
    x = torch.randn(2, 8)
    check(fast, model, x)
    with torch.no_grad():
        model.linear.weight.mul_(2.0)
    check(fast, model, x)
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})
    check(fast, model, x)
    model.double()
    check(fast, model, x.double())
    assert sum("changed after it was folded in" in event for event in fast.events) == 2
    assert len(fast.programs) <= 2


def test_a_flex_attention_call_that_follows_no_pattern_is_compiled_as_it_is():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    class Documents(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)
            self.register_buffer("document", torch.tensor([0] * 10 + [1] * 20 + [2] * 18))
            own = self.document
            self.mask = create_block_mask(
                lambda _b, _h, q, k: (own[q] == own[k]) & (q >= k), None, None, 48, 48, device="cpu"
            )

        def forward(self, x):
            q, k, v = self.qkv(x).view(-1, 48, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            return flex_attention(q, k, v, block_mask=self.mask).transpose(1, 2).flatten(2)

    model = Documents().eval()
    x = torch.randn(2, 48, 16)
    fast = ca.compile(model, example_inputs=(x,))
    with torch.no_grad():
        assert (fast(x) - model(x)).abs().max() < 1e-5
    assert any("follows no window" in miss.because for miss in fast.explain().misses)


def test_what_can_be_no_argument_is_named_before_anything_is_compiled():
    with pytest.raises(CaptureError, match="give a tuple"):
        ca.compile(Small(), example_inputs=torch.randn(2, 8))
    with pytest.raises(CaptureError, match="an argument is a ndarray"):
        ca.compile(Small())(torch.randn(2, 8).numpy())
    with pytest.raises(PassError, match="passes is a list"):
        ca.compile(Small(), passes=ca.passes.RaiseAttention())


@pytest.mark.parametrize("how", ["assigned", "parameter", "module"])
def test_weights_that_others_took_the_place_of_are_folded_again(how):
    model = Small().eval()
    fast = ca.compile(model)
    x = torch.randn(2, 8)
    check(fast, model, x)
    if how == "assigned":
        model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}, assign=True)
    elif how == "parameter":
        model.linear.weight = nn.Parameter(model.linear.weight.detach() + 0.1)
    else:
        model.linear = nn.Linear(model.linear.in_features, model.linear.out_features)
    check(fast, model, x)
    assert len(fast.programs) == 1


def test_another_shape_dtype_or_keyword_is_captured_again_up_to_a_limit(monkeypatch):
    import importlib

    monkeypatch.setattr(importlib.import_module("compiled_attn.runtime.compile"), "LIMIT", 3)
    model = Small().eval()
    fast = ca.compile(model)
    check(fast, model, torch.randn(2, 8))
    check(fast, model, torch.randn(3, 8))
    check(fast, model, torch.randn(2, 8), scale=2.0)
    assert len(fast.programs) == 3
    with pytest.raises(CaptureError, match="was captured 3 times"):
        fast(torch.randn(5, 8))


def test_precision_bf16_keeps_the_callers_dtype():
    model = Small().eval()
    x = torch.randn(4, 8)
    fast = ca.compile(model, precision="bf16", example_inputs=(x,))
    with torch.no_grad():
        found, want = fast(x), model(x)
    assert found["y"].dtype == torch.float32
    torch.testing.assert_close(found["y"], want["y"], rtol=3e-2, atol=3e-2)
    assert "bfloat16 inside" in str(fast.explain())
    assert next(model.parameters()).dtype == torch.float32


class TwoReaders(nn.Module):
    """A table that folds to a constant, read once as it is and once through a view that folds again."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(9, 4))

    def forward(self, index):
        table = torch.cat([torch.zeros_like(self.rows[:1]), self.rows[1:]])
        return table[index] @ table.T


def test_a_folded_constant_may_have_several_readers():
    model, index = TwoReaders().eval(), torch.tensor([3, 0, 8])
    for fast in (ca.compile(model, example_inputs=(index,)), torch.compile(model, backend="compiled_attn")):
        with torch.no_grad():
            torch.testing.assert_close(fast(index), model(index))


def test_a_model_that_torch_compiled_before_still_gets_its_templates(monkeypatch):
    from torch._inductor import lowering

    scale = random.uniform(0.5, 1.5)  # another graph each time: torch would fetch one that it knows

    class Local(nn.Module):
        def forward(self, qkv):
            return local_attention(*qkv.unbind(2), window=[3], scale=scale)

    monkeypatch.delitem(lowering.lowerings, local_attention.overload, raising=False)  # as in a process of its own
    torch._dynamo.reset()
    x = torch.randn(1, 9, 3, 2, 8)
    with torch.no_grad():
        wanted = torch.compile(Local())(x)
        assert local_attention.overload in lowering.lowerings
        fast = ca.compile(Local(), example_inputs=(x,), strict=True)  # refuses code without the template
        torch.testing.assert_close(fast(x), wanted, rtol=0, atol=1e-5)


def test_overlapping_blocks_are_summed_within_their_buffer():
    class Blocks(nn.Module):
        """Blocks of 3x3 at every second place, laid out so that Inductor turns a tile of them."""

        def forward(self, x):
            return nn.functional.fold(x.permute(0, 3, 2, 1).reshape(2, 36 * 9, 49), (14, 14), 3, padding=1, stride=2)

    x = torch.randn(2, 49, 9, 36)
    fast = ca.compile(Blocks(), example_inputs=(x,))
    torch.testing.assert_close(fast(x), Blocks()(x))


def test_a_size_outside_the_declared_range_is_refused():
    model = Small().eval()
    fast = ca.compile(
        model, example_inputs=(torch.randn(4, 8),), dynamic_shapes={"x": {0: torch.export.Dim("n", min=2, max=6)}}
    )
    check(fast, model, torch.randn(6, 8))
    with pytest.raises(ContractError, match="out of range"):
        fast(torch.randn(7, 8))


def test_bad_options_are_refused_in_words():
    with pytest.raises(TargetError, match="target"):
        ca.compile(Small(), target="a101")
    with pytest.raises(PassError, match="unknown precision"):
        ca.compile(Small(), precision="int3")
    with pytest.raises(CaptureError, match=r"is not an nn\.Module"):
        ca.compile(lambda x: x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have the target")
def test_a_target_that_is_not_here_is_refused_with_what_can_be_done():
    with pytest.raises(TargetError, match="target a100 is not at hand") as caught:
        ca.compile(Small().eval(), target="a100")
    assert "export" in caught.value.do and "explain" in caught.value.do


def test_attention_among_the_channels_of_many_pixels_stays_attention_among_channels():
    """Too wide for the template: Inductor is given it, batch and heads of one picture exchanged."""

    class Channels(torch.nn.Module):
        def forward(self, x):
            q, k, v = x.unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            return ((0.3 * k).transpose(2, 3) @ v).softmax(3) @ q.transpose(2, 3)

    x = torch.randn(1, 600, 48)
    fast = ca.compile(Channels(), example_inputs=(x,))
    torch.testing.assert_close(fast(x), Channels()(x.double()).float(), atol=1e-5, rtol=1e-5)
