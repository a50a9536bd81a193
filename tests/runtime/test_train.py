"""`compile(mode="train")`: the user's own Parameters, eager's gradients, one program per train/eval state."""

import copy

import pytest
import torch
from small_nets import Net, pictures, worst

from compiled_attn.ir.errors import PassError
from compiled_attn.runtime.build import Settings
from compiled_attn.runtime.train import TrainedModel, compile_train

TOLERANCE = 1e-5  # float32, of the largest value
BATCH = {"x": {0: "batch"}}


def loss(out: dict[str, torch.Tensor]) -> torch.Tensor:
    return out["logits"].sin().sum() + out["tokens"].cos().mean()


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    torch.manual_seed(0)
    return compile_train(Net(), None, None, Settings.of("cpu", mode="train", dynamic_shapes=BATCH))


def test_the_result_shares_the_users_parameters_buffers_and_keys(trained):
    model = trained._model
    assert list(trained.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(trained.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(trained.buffers(), model.buffers(), strict=True))


def test_gradients_and_statistics_equal_eager_at_two_batch_sizes_with_one_capture(trained):
    trained.train()
    plain = copy.deepcopy(trained._model)
    before = len(trained.builds)
    for batch in (4, 6):
        x = pictures(batch).requires_grad_()
        y = x.detach().clone().requires_grad_()
        trained.zero_grad()
        plain.zero_grad()
        mine, theirs = trained(x), plain(y)
        loss(mine).backward()
        loss(theirs).backward()
        assert worst(mine["logits"], theirs["logits"]) < TOLERANCE
        assert worst(x.grad, y.grad) < 1e-4
        for (name, p), q in zip(trained.named_parameters(), plain.parameters(), strict=True):
            if name != "conv.bias":  # batch norm removes it: its gradient is rounding
                assert worst(p.grad, q.grad) < 1e-4, name
        assert worst(trained.bn.running_mean, plain.bn.running_mean) < TOLERANCE
        assert trained.bn.num_batches_tracked == plain.bn.num_batches_tracked
    assert len(trained.builds) == before + 1
    assert [n.where for n in trained.builds[-1].notes.done if n.rule == "raise-attention"] == ["attn"]


class Windows(torch.nn.Module):
    """Overlapping windows, whose gradients are summed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.unfold(x, 3, padding=1, stride=2).view(2, 4, 9, 49).permute(0, 3, 2, 1).sin()


def test_gradients_of_overlapping_windows_equal_eager():
    fast = compile_train(Windows(), None, None, Settings.of("cpu", mode="train"))
    x = torch.randn(2, 4, 14, 14, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    weights = torch.randn(2, 49, 9, 4)
    (fast(x) * weights).sum().backward()
    (Windows()(y) * weights).sum().backward()
    assert worst(x.grad, y.grad) < 1e-5


def test_an_optimizer_step_on_either_module_is_seen_by_the_next_call(trained):
    trained.train()
    x = pictures(4).requires_grad_()
    optimizer = torch.optim.SGD(trained._model.parameters(), 0.1)
    optimizer.zero_grad()
    first = trained(x)
    loss(first).backward()
    optimizer.step()
    second = trained(x)
    assert worst(second["logits"], first["logits"]) > 1e-3
    assert worst(second["logits"], trained._model(x)["logits"]) < TOLERANCE


def test_eval_mode_has_its_own_program_and_acts_on_both_modules(trained):
    trained.eval()
    assert not trained._model.training
    x = pictures(4)
    with torch.no_grad():
        assert worst(trained(x)["logits"], trained._model(x)["logits"]) < TOLERANCE
    count = trained.bn.num_batches_tracked.item()
    captured = len(trained.builds)
    trained.train()
    assert trained._model.training
    trained(x.requires_grad_())
    assert trained.bn.num_batches_tracked == count + 1
    assert len(trained.builds) == captured


def test_loaded_weights_are_used_by_the_next_call(trained):
    trained.eval()
    x = pictures(4)
    trained.load_state_dict(Net().state_dict())
    with torch.no_grad():
        assert worst(trained(x)["logits"], trained._model(x)["logits"]) < TOLERANCE


def test_a_copy_is_independent_of_the_original(trained):
    other = copy.deepcopy(trained)
    assert other.head.weight is not trained.head.weight
    assert torch.equal(other.head.weight, trained.head.weight)
    assert other.builds == []


def test_attention_with_dropout_keeps_its_dropout():
    net = Net(dropout=0.5)
    compiled = compile_train(net, None, None, Settings.of("cpu", mode="train"))
    x = pictures(4)
    torch.manual_seed(1)
    first = compiled(x)["tokens"]
    torch.manual_seed(1)
    again = compiled(x)["tokens"]
    other = compiled(x)["tokens"]
    assert [n.where for n in compiled.builds[0].notes.done if n.rule == "raise-attention"] == ["attn"]
    assert torch.equal(first, again)
    assert worst(first, other) > 1e-3
    mean = torch.stack([compiled(x)["tokens"] for _ in range(400)]).mean(0)
    net.eval()
    net.bn.train()  # the statistics of the batch, without dropout
    assert worst(mean, net(x)["tokens"]) < 0.1  # 400 draws at p = 0.5: a standard error of about 0.03


def test_a_precision_is_refused_in_training():
    with pytest.raises(PassError, match="autocast"):
        compile_train(Net(), None, None, Settings.of("cpu", mode="train", precision="bf16"))


def test_a_model_with_no_module_is_refused():
    with pytest.raises(Exception, match=r"not an nn\.Module"):
        compile_train(lambda x: x, None, None, Settings.of("cpu", mode="train"))


@pytest.mark.deep
def test_a_call_under_autocast_goes_through_dynamo_and_trains():
    net = Net()
    compiled = compile_train(net, None, None, Settings.of("cpu", mode="train"))
    plain = copy.deepcopy(net)
    x = pictures(4)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = compiled(x)["logits"], plain(x)["logits"]
    mine.float().sum().backward()
    assert worst(mine, theirs) < 3e-2
    assert any("autocast" in event for event in compiled.events)
    assert net.head.weight.grad is not None
