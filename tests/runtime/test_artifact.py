"""An artifact gives the model's numbers, or a worded error before anything of it runs."""

import copy
import gc
import hashlib
import os
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from artifact_models import rich_inputs
from damage import AT_LOADING, DAMAGES, forged, set_at
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import ContractError
from compiled_attn.runtime import archive, call, contract
from compiled_attn.runtime import load as loading
from compiled_attn.runtime.load import load, read


@pytest.fixture(scope="module")
def loaded(rich):
    return load(rich.path)


@pytest.fixture(scope="module")
def loaded_fixed(fixed):
    return load(fixed.path)


@pytest.fixture
def nothing_opens(monkeypatch):
    """Any attempt to open native code of a file fails the test."""

    def opened(*_args, **_kwargs):
        pytest.fail("native code of the file was opened")

    monkeypatch.setattr(_torch, "package_loader", opened)


def both(model, artifact, args, kwargs):
    """Results and state after the call, of the model and of the artifact, each on its own copy of the state."""
    answers = []
    for function in (model, artifact):
        mine = copy.deepcopy((args, kwargs))
        with torch.no_grad():
            answers.append((function(*mine[0], **mine[1]), mine[0][-1]))
    return answers


def agree(model, artifact, args, kwargs):
    eager, ours = both(model, artifact, args, kwargs)
    # the state adds up to 80 numbers of about 3: their sum rounds by up to 80 * 3 * 2**-23
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=3e-5)


def is_worded(error, where):
    return all((error.what, error.facts, error.do)) and where in error.where


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_the_artifact_gives_the_models_results_and_state_in_its_structure(rich, loaded, batch):
    args, kwargs = rich_inputs(batch)
    agree(rich.model, loaded, args, kwargs)
    result = loaded(*args, **kwargs)
    assert list(result) == ["y", "none", "count", "rows"]
    assert result["none"] is None and result["count"] == 2 * batch and isinstance(result["rows"], tuple)


def test_arguments_may_be_given_by_name_and_dicts_in_any_order(rich, loaded):
    (x, extra, pair, cache), kwargs = rich_inputs(3)
    backwards = dict(reversed(extra.items()))
    by_name = loaded(pair=pair, cache=cache.clone(), extra=backwards, x=x, **kwargs)
    torch.testing.assert_close(by_name["y"], rich.model(x, extra, pair, cache, **kwargs)["y"])


def test_the_contract_names_shapes_ranges_state_and_passes(rich):
    stated = read(rich.path).contract
    described = {t.name: call.describe(t) for t in stated.call.tensors}
    assert described == {
        "x": "float32[batch, 5]",
        "extra_mask": "bool[batch, 3]",
        "extra_half": "bfloat16[batch, 2]",
        "pair": "float32[2*batch, 4]",
        "cache": "float32[2, 3]",
    }
    assert stated.call.state == ["cache"]
    assert stated.call.symbols == {"batch": contract.Range(1, 16)}
    assert [o.name for o in stated.call.outputs] == ["y", "none", "count", "rows.0", "rows.1", "rows.2"]
    assert stated.versions["torch"] == torch.__version__ and stated.target.device == "cpu"
    assert {m.name for m in stated.members} == set(read(rich.path).members)


def test_the_artifacts_text_and_digest_are_those_of_the_file(rich):
    assert rich.artifact.sha256 == hashlib.sha256(rich.data).hexdigest()
    assert rich.artifact.size == len(rich.data)
    assert rich.artifact.sha256 in str(rich.artifact) and "2*batch" in str(rich.artifact)


def test_torchs_own_loader_accepts_the_artifact(fixed):
    runner = torch._inductor.aoti_load_package(str(fixed.path))
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    torch.testing.assert_close(runner(x), fixed.model(x))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)])
def test_any_memory_order_is_converted_to_the_one_wanted(fixed, loaded_fixed, order):
    x = torch.randn([(2, 3, 4, 5)[d] for d in order]).permute([order.index(d) for d in range(4)])
    torch.testing.assert_close(loaded_fixed(x), fixed.model(x))


def test_strided_expanded_and_offset_inputs_are_converted(rich, loaded):
    (_, extra, pair, cache), kwargs = rich_inputs(4)
    wide = torch.randn(9, 20)
    for x in (wide[1:9:2, 3:18:3], wide[:1, :5].expand(4, 5), wide.t()[:4, 2:7], wide[1:5, 1:6]):
        agree(rich.model, loaded, (x, extra, pair, cache), kwargs)


def _calls(batch=4):
    (x, extra, pair, cache), kwargs = rich_inputs(batch)
    half = {**extra, "half": extra["half"].float()}
    short = {**extra, "mask": extra["mask"][1:]}
    return {
        "input x has another size in dimension 1": ((x[:, :4], extra, pair, cache), kwargs),
        "input x has another rank": ((x[0], extra, pair, cache), kwargs),
        "input x has another dtype": ((x.double(), extra, pair, cache), kwargs),
        "input extra_half has another dtype": ((x, half, pair, cache), kwargs),
        "input x is on another device": ((x.to("meta"), extra, pair, cache), kwargs),
        "input x has another layout": ((x.to_sparse(), extra, pair, cache), kwargs),
        "input x is no plain tensor": (([1.0], extra, pair, cache), kwargs),
        "input extra_mask has another size in dimension 0": ((x, short, pair, cache), kwargs),
        "input pair has another size in dimension 0": ((x, extra, pair[1:], cache), kwargs),
        "input x has a size out of range in dimension 0": rich_inputs(17),
        "state cache has another memory order": ((x, extra, pair, cache.t().contiguous().t()), kwargs),
        "state cache shares memory with input pair": ((x, extra, pair, pair.view(-1)[:6].view(2, 3)), kwargs),
        "input flag has another value": ((x, extra, pair, cache), {"flag": 4}),
        "argument flag is missing": ((x, extra, pair, cache), {}),
        "argument pair is missing": ((x, extra), {"cache": cache, **kwargs}),
        "argument more is not taken": ((x, extra, pair, cache), {**kwargs, "more": x}),
        "argument x is given twice": ((x, extra, pair, cache), {**kwargs, "x": x}),
        "the call has too many arguments": ((x, extra, pair, cache, 3, x), {}),
        "argument extra has another structure": ((x, {"mask": x}, pair, cache), kwargs),
    }


@pytest.mark.parametrize("what", _calls())
def test_a_wrong_call_is_a_named_error_and_leaves_the_state_alone(rich, loaded, what):
    args, kwargs = _calls()[what]
    before = args[3].clone() if len(args) > 3 else None
    with pytest.raises(ContractError) as caught:
        loaded(*args, **kwargs)
    assert caught.value.what == what and is_worded(caught.value, str(rich.path))
    assert before is None or torch.equal(before, args[3])


def test_an_empty_batch_is_out_of_range(loaded):
    args, kwargs = rich_inputs(0)
    with pytest.raises(ContractError, match="batch is allowed 1 to 16, given is 0"):
        loaded(*args, **kwargs)


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (2, 3, 5, 4), (2, 3, 4), (2, 3, 4, 5, 1), (0, 3, 4, 5), ()])
def test_a_static_input_of_another_shape_is_refused(loaded_fixed, shape):
    with pytest.raises(ContractError, match="input x has another"):
        loaded_fixed(torch.zeros(shape))


FORMS = {
    "plain": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t,
    "strided": lambda t: torch.stack([t, t], -1).select(-1, 1),
    "offset": lambda t: torch.cat([t, t])[t.shape[0] :] if t.dim() else t,
}
RIGHT_DTYPES = (torch.float32, torch.bool, torch.bfloat16, torch.float32)
X_DTYPES = [torch.float32] * 4 + [torch.float64, torch.float16, torch.int64, torch.bool]


@st.composite
def specs(draw):
    """A seed; shape, dtype and memory form of x, extra.mask, extra.half and pair, mostly near what is wanted."""
    batch = draw(st.integers(0, 18))
    wanted = [(batch, 5), (batch, 3), (batch, 2), (2 * batch, 4)]
    dtypes = [draw(st.sampled_from(X_DTYPES)), torch.bool, torch.bfloat16, torch.float32]
    if draw(st.booleans()):
        at = draw(st.integers(0, 3))
        shape = list(wanted[at])
        change = draw(st.sampled_from(["dim", "rank up", "rank down", "dtype"]))
        if change == "dim":
            shape[draw(st.integers(0, 1))] = draw(st.integers(0, 40))
        elif change == "rank up":
            shape.insert(draw(st.integers(0, 2)), draw(st.integers(0, 3)))
        elif change == "rank down":
            shape.pop()
        else:
            dtypes[at] = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.uint8]))
        wanted[at] = tuple(shape)
    forms = [draw(st.sampled_from(sorted(FORMS))) for _ in wanted]
    return draw(st.integers(0, 999)), tuple(zip(wanted, dtypes, forms, strict=True))


def _right(specs):
    shapes = [s for s, _, _ in specs]
    batch = shapes[0][0] if shapes[0] else 0
    fits = shapes == [(batch, 5), (batch, 3), (batch, 2), (2 * batch, 4)] and 1 <= batch <= 16
    return fits and tuple(d for _, d, _ in specs) == RIGHT_DTYPES


def right_numbers_or_an_error(rich, loaded, seed, drawn):
    torch.manual_seed(seed)
    x, mask, half, pair = (FORMS[form](torch.randn(shape).mul(3).to(dtype)) for shape, dtype, form in drawn)
    args, kwargs = (x, {"mask": mask, "half": half}, pair, torch.randn(2, 3)), {"flag": 3}
    if _right(drawn):
        agree(rich.model, loaded, args, kwargs)
        return
    state = args[3].clone()
    with pytest.raises(ContractError) as caught:
        loaded(*args, **kwargs)
    assert is_worded(caught.value, str(rich.path)) and torch.equal(args[3], state)


@given(specs())
@example((0, tuple(zip(((1, 5), (1, 3), (1, 2), (2, 4)), RIGHT_DTYPES, sorted(FORMS), strict=True))))
def test_any_input_gives_the_right_numbers_or_a_named_error(rich, loaded, drawn):
    right_numbers_or_an_error(rich, loaded, *drawn)


@pytest.mark.deep
@settings(max_examples=4000)
@given(specs())
def test_thousands_of_inputs_give_the_right_numbers_or_a_named_error(rich, loaded, drawn):
    right_numbers_or_an_error(rich, loaded, *drawn)


@pytest.mark.usefixtures("nothing_opens")
def test_a_device_that_the_package_does_not_name_is_a_contradiction(rich, tmp_path):
    path = tmp_path / "forged.pt2"
    path.write_bytes(forged(set_at("target", "device", "cuda"), restamp=True)(rich.data))
    with pytest.raises(ContractError, match="contradicts the package"):
        read(path)
    with pytest.raises(ContractError):
        load(path)


@pytest.mark.usefixtures("nothing_opens")
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_forged_file_is_refused_before_any_of_it_is_opened(rich, tmp_path, name):
    damage, what = DAMAGES[name]
    path = tmp_path / "damaged.pt2"
    path.write_bytes(damage(rich.data))
    for opening in (load, read):
        with pytest.raises(ContractError) as caught:
            opening(path)
        assert what in caught.value.what and is_worded(caught.value, str(path))


@pytest.mark.usefixtures("nothing_opens")
@pytest.mark.parametrize("name", AT_LOADING)
def test_another_torch_machine_or_cpu_is_refused_before_anything_is_opened(rich, tmp_path, name):
    damage, what = AT_LOADING[name]
    path = tmp_path / "elsewhere.pt2"
    path.write_bytes(damage(rich.data))
    with pytest.raises(ContractError) as caught:
        load(path)
    assert caught.value.what == what and is_worded(caught.value, str(path))


@pytest.mark.usefixtures("nothing_opens")
def test_a_range_wider_than_the_packages_own_is_a_contradiction(rich, tmp_path):
    path = tmp_path / "wide.pt2"
    path.write_bytes(forged(set_at("call", "symbols", "batch", "max", 99), restamp=True)(rich.data))
    with pytest.raises(ContractError, match="contradicts the package") as caught:
        load(path)
    assert "up to 99" in caught.value.facts and "up to 16" in caught.value.facts


@pytest.mark.usefixtures("nothing_opens")
def test_an_unsealed_package_of_torch_is_refused(fixed, tmp_path):
    members, _ = archive.unpack(memoryview(fixed.data), "")
    path = tmp_path / "raw.pt2"
    with torch.export.pt2_archive.PT2ArchiveWriter(str(path)) as writer:
        for name, payload in members.items():
            writer.write_bytes(name.removeprefix("model/"), bytes(payload))
    with pytest.raises(ContractError, match="the package has no contract"):
        load(path)


@pytest.mark.parametrize("path", ["nowhere.pt2", "."])
def test_a_file_that_can_not_be_read_is_refused(tmp_path, path):
    with pytest.raises(ContractError, match="the file can not be read"):
        load(tmp_path / path)


def _refused(data, path="flipped"):
    with pytest.raises(ContractError) as caught:
        loading._checked(Path(path), data, torch.__version__)
    assert all((caught.value.what, caught.value.where, caught.value.facts, caught.value.do))


def _flipped(data, at, xor):
    changed = bytearray(data)
    changed[at] ^= xor
    return bytes(changed)


def _outside(data):
    """Offsets of every byte that is no payload of a member other than the contract."""
    members, _ = archive.unpack(memoryview(data), "")
    offsets, at = [], 0
    for name, payload in members.items():
        start = at + 30 + len(name)
        offsets += range(at, start + (len(payload) if name == contract.MEMBER else 0))
        at = start + len(payload)
    return [*offsets, *range(at, len(data))]


@given(st.data())
def test_a_flipped_byte_anywhere_is_noticed(rich, data):
    outside = _outside(rich.data)
    at = data.draw(st.one_of(st.sampled_from(outside), st.integers(0, len(rich.data) - 1)))
    _refused(_flipped(rich.data, at, data.draw(st.integers(1, 255))))


@given(st.data())
def test_a_truncated_file_is_noticed_at_any_length(rich, data):
    _refused(rich.data[: data.draw(st.integers(0, len(rich.data) - 1))])


@pytest.mark.deep
def test_every_byte_outside_the_payloads_is_noticed_when_flipped(rich):
    for at in _outside(rich.data):
        _refused(_flipped(rich.data, at, 1 << at % 8))


@pytest.mark.deep
def test_thousands_of_payload_bytes_are_noticed_when_flipped(rich):
    for at in range(0, len(rich.data), max(len(rich.data) // 3000, 1)):
        _refused(_flipped(rich.data, at, 0x80))


def test_expect_sha256_admits_the_one_file(rich, fixed):
    assert read(rich.path, expect_sha256=rich.artifact.sha256.upper()).contract.call.inputs[0].name == "x"
    with pytest.raises(ContractError, match="the file is not the expected one") as caught:
        load(rich.path, expect_sha256=fixed.artifact.sha256)
    assert fixed.artifact.sha256 in caught.value.facts


@pytest.mark.usefixtures("nothing_opens")
def test_another_device_than_the_built_one_is_refused(rich):
    with pytest.raises(ContractError, match="built for another device"):
        load(rich.path, device="cuda:1")


def test_threads_are_checked_and_set(fixed):
    before = torch.get_num_threads()
    with pytest.raises(ContractError, match="not positive"):
        load(fixed.path, threads=0)
    try:
        load(fixed.path, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_private_copy_has_mode_0700_and_goes_with_the_model(fixed, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = load(fixed.path)
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert model(torch.zeros(2, 3, 4, 5)).shape == (2, 6)
    del model
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_torch_that_takes_only_files_is_given_one(fixed, monkeypatch):
    monkeypatch.setattr(_torch, "loads_directories", lambda: False)
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(load(fixed.path)(x), fixed.model(x))


def test_loads_and_calls_from_several_threads_agree_with_the_model(rich):
    inputs = [rich_inputs(1 + i % 16) for i in range(24)]
    with torch.no_grad():
        wanted = [rich.model(*copy.deepcopy(a), **k)["y"] for a, k in inputs]
    shared, errors = load(rich.path), []

    def work(mine):
        try:
            own = load(rich.path)
            for i in range(mine, len(inputs), 4):
                for model in (shared, own):
                    args, kwargs = copy.deepcopy(inputs[i])
                    torch.testing.assert_close(model(*args, **kwargs)["y"], wanted[i])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_gradient_is_not_asked_of_an_artifact(fixed, loaded_fixed):
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    result = loaded_fixed(x)
    assert not result.requires_grad
    torch.testing.assert_close(result, fixed.model(x).detach())


def test_writing_to_a_missing_folder_is_a_named_error_and_leaves_nothing(tmp_path, monkeypatch):
    from compiled_attn.runtime import artifact

    with pytest.raises(ContractError, match="can not be written"):
        artifact.write_file(tmp_path / "missing" / "a.pt2", [b"x"])

    def failing(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ContractError, match="can not be written"):
        artifact.write_file(tmp_path / "a.pt2", [b"x"])
    assert list(tmp_path.iterdir()) == []
