"""Checkpoints: the containers that trainers write, what does not fit, and that a model is never half changed."""

import argparse
import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compiled_attn import zoo
from compiled_attn.ir.errors import CheckpointError, CompiledAttnError
from compiled_attn.zoo.deit import Config, DeiT

TINY = Config(width=32, heads=2, depth=1, img_size=32, patch_size=8, classes=5)


def net(**changes: object) -> DeiT:
    return DeiT(Config(**(vars(TINY) | changes))).eval()


@pytest.mark.parametrize("nest", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module._orig_mod."])
def test_nested_and_prefixed_torch_files_load_whole(tmp_path: Path, nest: str | None, prefix: str) -> None:
    given = net()
    state = {prefix + key: value for key, value in given.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save(state if nest is None else {nest: state, "epoch": 300, "args": argparse.Namespace(lr=1e-3)}, path)
    model = net()
    assert zoo.load_checkpoint(model, path).complete
    for key, value in given.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_safetensors_load_and_the_model_keeps_its_own_dtype(tmp_path: Path) -> None:
    given = net()
    save_file({key: value.half() for key, value in given.state_dict().items()}, tmp_path / "half.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model = net().to(dtype)
        assert zoo.load_checkpoint(model, tmp_path / "half.safetensors").complete
        assert {value.dtype for value in model.state_dict().values()} == {dtype}
        assert torch.equal(model.head.weight, given.head.weight.half().to(dtype))


class Planted:
    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit('the checkpoint ran')",))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Planted()}, tmp_path / "planted.pth")
    with pytest.raises(CheckpointError, match=r"cannot be read[\s\S]*planted\.pth[\s\S]*do:"):
        zoo.load_checkpoint(net(), tmp_path / "planted.pth")


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors", "absent.pth", "absent.safetensors"])
def test_a_broken_or_absent_file_is_a_named_error(tmp_path: Path, name: str) -> None:
    if name.startswith("broken"):
        (tmp_path / name).write_bytes(b"\x80\x02not weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        zoo.load_checkpoint(net(), tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
def test_every_damaged_torch_file_is_a_named_error_or_not_damaged_where_it_counts(tmp_path: Path, zipped: bool) -> None:
    model, path = net(), tmp_path / "weights.pth"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(before, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    pick = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole[: pick.choice([0, 1, 5, len(whole) // 2, len(whole), len(whole), len(whole)])])
        for _ in range(3 if damaged else 0):
            damaged[pick.randrange(min(len(damaged), 4000))] ^= 1 << pick.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            zoo.load_checkpoint(model, path)
        if zipped:  # its members carry checksums
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "turned", [lambda w: w.to(torch.complex64), lambda w: w.to(torch.int8), lambda w: w.to("meta"), Tensor.to_sparse]
)
def test_weights_that_can_not_be_copied_as_they_are_are_named(turned: Callable[[Tensor], Tensor]) -> None:
    model = net()
    state = {**model.state_dict(), "head.weight": turned(model.head.weight.detach())}
    with pytest.raises(CheckpointError, match=r"checkpoint's head.weight can not be copied"):
        zoo.load_checkpoint(model, state)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"epoch": 3}}])
def test_a_file_without_tensors_is_a_named_error(content: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        zoo.load_checkpoint(net(), content)


def test_what_does_not_fit_is_listed_and_the_model_stays_as_it_was() -> None:
    state = net(classes=9).state_dict()
    del state["norm.bias"]
    state["head_dist.bias"] = torch.zeros(9)
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        zoo.load_checkpoint(model, state)
    for part in ("missing norm.bias", "unexpected head_dist.bias", "head.weight [9, 32] for [5, 32]", "strict=False"):
        assert part in str(raised.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = zoo.load_checkpoint(model, state, strict=False)
    assert report.missing == ("norm.bias",)
    assert report.unexpected == ("head_dist.bias",)
    assert report.misshapen == {"head.weight": ((9, 32), (5, 32)), "head.bias": ((9,), (5,))}
    assert "misshapen   head.weight: [9, 32] in the checkpoint, the model has [5, 32]" in str(report)
    assert torch.equal(model.cls_token, state["cls_token"])


@pytest.mark.parametrize("distilled", [False, True])
def test_positions_of_another_picture_size_are_resized_on_request_and_reported(distilled: bool) -> None:
    given, model = net(distilled=distilled), net(img_size=64, distilled=distilled)
    with pytest.raises(CheckpointError, match="resize=True"):
        zoo.load_checkpoint(model, given.state_dict())
    report = zoo.load_checkpoint(model, given.state_dict(), resize=True)
    prefix = 2 if distilled else 1
    assert report.complete
    assert report.resized == {"pos_embed": ((1, prefix + 16, 32), (1, prefix + 64, 32))}
    assert "resized     pos_embed" in str(report)
    assert torch.equal(model.pos_embed[:, :prefix], given.pos_embed[:, :prefix])
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), given(x), rtol=1e-5, atol=1e-6)  # which resizes at each call


def test_a_wrapped_model_takes_the_wrapped_keys_as_they_are() -> None:
    given, wrapped = net(), nn.Sequential()
    wrapped.add_module("module", net())
    report = zoo.load_checkpoint(wrapped, {"module." + key: value for key, value in given.state_dict().items()})
    assert report.complete


def test_unknown_names_and_absent_weights_are_named_errors() -> None:
    with pytest.raises(CompiledAttnError, match=r"no paper of that name[\s\S]*deit"):
        zoo.create("dait", "deit_s")
    with pytest.raises(CompiledAttnError, match=r"no variant of that name[\s\S]*deit_ti"):
        zoo.create("deit", "deit_small")
    with pytest.raises(CheckpointError, match="carries no weights for 'deit_ti'"):
        zoo.create("deit", "deit_ti", pretrained=True)
