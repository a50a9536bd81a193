"""Taps: modules' outputs and inputs, attention probabilities; eagerly, compiled, with gradients."""

import pytest
import torch
from small_nets import Net, pictures, worst
from torch import nn

from compiled_attn.ir.errors import PassError
from compiled_attn.ir.program import Program
from compiled_attn.runtime.capture import capture
from compiled_attn.runtime.observe import observe

TOLERANCE = 1e-5  # float32, of the largest value


def hooked(model: nn.Module, path: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(first input, output) of a module, by a forward hook."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


@pytest.fixture
def net() -> Net:
    return Net().eval()


def test_outputs_and_inputs_of_modules_are_those_that_hooks_see(net):
    x = pictures(2)
    with torch.no_grad():
        out, taps = observe(net, ["bn", "attn", "attn.qkv:input"])(x)
        assert worst(out["logits"], net(x)["logits"]) < TOLERANCE
    assert list(taps) == ["bn", "attn", "attn.qkv:input"]
    assert worst(taps["bn"], hooked(net, "bn", x)[1]) < TOLERANCE
    assert worst(taps["attn"], hooked(net, "attn", x)[1]) < TOLERANCE
    assert worst(taps["attn.qkv:input"], hooked(net, "attn.qkv", x)[0]) < TOLERANCE


def test_probabilities_are_given_where_attention_is_raised(net):
    x = pictures(2)
    observed = observe(net, ["*:probabilities"])
    with torch.no_grad():
        _, taps = observed(x)
        q, k, _ = hooked(net, "attn.qkv", x)[1].reshape(2, 16, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
    assert worst(taps["attn:probabilities"], (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)) < TOLERANCE
    assert "scaled_dot_product_attention" in str(capture(observed, (x,)))


class Masked(nn.Module):
    """Fused attention with a mask of one of three kinds: additive, boolean, causal."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.inner(x)
        mask = {"additive": x[:, :, :, 0:1] * torch.ones(6), "boolean": torch.ones(6, 6, dtype=torch.bool).tril()}
        causal = self.kind == "causal"
        return nn.functional.scaled_dot_product_attention(q, x, x, attn_mask=mask.get(self.kind), is_causal=causal)


@pytest.mark.parametrize("kind", ["additive", "boolean", "causal"])
def test_probabilities_of_masked_attention_reproduce_its_output(kind):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Masked(kind)

        def forward(self, x):
            return self.attn(x) + 0

    x = torch.randn(2, 2, 6, 8)
    with torch.no_grad():
        out, taps = observe(Outer(), ["attn:probabilities"])(x)
    found = taps["attn:probabilities"]
    assert torch.allclose(found.sum(-1), torch.ones(2, 2, 6), atol=1e-6)
    assert worst(found @ x, out) < TOLERANCE


class Capped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ x.transpose(-2, -1) / 3) * 3).softmax(-1) @ x


def test_probabilities_of_capped_attention_reproduce_its_output():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Capped()

        def forward(self, x):
            return self.attn(x) + 0

    x = torch.randn(2, 2, 6, 8)
    with torch.no_grad():
        out, taps = observe(Outer(), ["attn:probabilities"])(x)
    assert worst(taps["attn:probabilities"] @ x, out) < TOLERANCE


def test_a_module_called_twice_gives_both_values():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(self.inner(x)) * 2

    model, x = Twice(), torch.randn(3, 4)
    with torch.no_grad():
        _, taps = observe(model, ["inner"])(x)
        first = model.inner(x)
        assert len(taps["inner"]) == 2
        assert worst(taps["inner"][0], first) < TOLERANCE
        assert worst(taps["inner"][1], model.inner(first)) < TOLERANCE


def test_gradients_flow_through_taps_and_batch_norm_learns(net):
    net.train()
    x = pictures(4)
    out, taps = observe(net, ["norm"])(x)
    (grad,) = torch.autograd.grad(out["logits"].sum(), taps["norm"], retain_graph=True)
    assert grad.abs().sum() > 0
    taps["norm"].square().sum().backward()
    assert net.conv.weight.grad.abs().sum() > 0
    assert net.bn.num_batches_tracked == 1


def test_a_value_that_is_written_over_later_is_tapped_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    x = torch.randn(3, 4)
    _, taps = observe(model, ["0"])(x)
    assert worst(taps["0"], model[0](x)) < TOLERANCE
    assert taps["0"].min() < 0


def test_changed_weights_and_modes_are_seen(net):
    observed = observe(net, ["head"])
    x = pictures(2)
    with torch.no_grad():
        observed(x)
        net.head.weight.mul_(2)
        out, taps = observed(x)
        assert worst(out["logits"], net(x)["logits"]) < TOLERANCE
        assert worst(taps["head"], out["logits"]) == 0
    observed.train()
    assert net.training
    assert list(observed.state_dict()) == list(net.state_dict())


def test_a_pattern_that_matches_nothing_names_close_paths(net):
    with torch.no_grad(), pytest.raises(PassError, match=r"attn\.qvk[\s\S]*close: attn\.qkv"):
        observe(net, ["attn.qvk"])(pictures(1))


@pytest.mark.parametrize("taps", [["attn:weights"], "attn", [":input"]])
def test_a_tap_that_is_none_is_refused_at_once(net, taps):
    with pytest.raises(PassError):
        observe(net, taps)


def test_an_observed_model_is_captured_with_a_symbolic_batch(net):
    program = capture(observe(net, ["attn", "attn:probabilities"]), (pictures(2),), dynamic_shapes={"x": {0: "batch"}})
    assert isinstance(program, Program)
    x = pictures(5)
    with torch.no_grad():
        out, taps = program(x)
    assert taps["attn:probabilities"].shape == (5, 2, 16, 16)
    assert worst(out["tokens"], net(x)["tokens"]) < TOLERANCE


def test_an_observed_model_compiles(net):
    from compiled_attn.runtime.compile import compile

    x = pictures(2)
    fast = compile(observe(net, ["attn", "attn:probabilities"]), target="cpu")
    with torch.no_grad():
        out, taps = fast(x)
        expected = observe(net, ["attn", "attn:probabilities"])(x)
    assert worst(out["logits"], expected[0]["logits"]) < TOLERANCE
    assert worst(taps["attn"], expected[1]["attn"]) < TOLERANCE
    assert worst(taps["attn:probabilities"], expected[1]["attn:probabilities"]) < TOLERANCE
