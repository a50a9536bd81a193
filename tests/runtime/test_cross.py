"""A build for a GPU that is not here: its patches, its child process, its artifact, and who refuses it.

Nothing that is built here has run on a device.
"""

import importlib
import json
import os
import re
import sys
import textwrap
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from cross_models import Tiny
from damage import CLASH, forged, parts, sealed, set_at
from runs import run
from torch import nn

import compiled_attn as ca
from compiled_attn.ir import _torch_cross, machine, targets
from compiled_attn.ir.errors import CaptureError, ContractError, LowerError, TargetError
from compiled_attn.ir.machine import Gpu
from compiled_attn.runtime import archive, bundle, contract, cross, describe, package
from compiled_attn.runtime.build import Settings, prepare
from compiled_attn.runtime.contract import CROSS, NATIVE
from compiled_attn.runtime.load import load, read
from compiled_attn.runtime.lower import lower

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2]))
checks = importlib.import_module("bench.cross_checks")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have the target: nothing is cross")
headers = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None, reason="the CUDA headers of the extra `cross` are not installed"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Tiny for an A100 in float16, its batch open: the artifact, its bytes and the build."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("cross") / "tiny.pt2"
    settings = Settings.of("a100", precision="fp16", dynamic_shapes={"x": {0: "batch"}})
    build = prepare(Tiny().eval(), (torch.randn(2, 10, 64),), None, settings)
    from compiled_attn.runtime.export import export_build

    artifact = export_build(build, path)
    return artifact, path.read_bytes(), build


@no_gpu
@headers
def test_a_build_for_an_absent_gpu_holds_our_kernels_every_weight_and_only_known_symbols(built):
    artifact, _, build = built
    found = checks.check(artifact.path, 80, checks.weights_of(build.program))
    assert found.problems == ()
    assert found.templates == ("attention_0", "class_row_logits_1", "class_row_mean_2", "select_tokens_3")
    assert found.weights >= 3 and found.cubins >= 5 and found.symbols > 50
    assert [n.what for n in build.notes.done if n.rule == "fused attention"] == ["flash"]


@no_gpu
@headers
def test_its_contract_says_that_it_has_not_run_and_asks_for_a_plain_host(built):
    artifact, _, _ = built
    stated = read(artifact.path).contract
    assert stated.target.origin == CROSS == "cross-compiled, not run on the target"
    assert "sm_80" in stated.target.isa and not any("avx512" in flag for flag in stated.target.isa)
    assert stated.call.tensors[0].device == "cuda" and stated.call.tensors[0].shape[0] == "batch"
    assert CROSS in describe.text(stated)


@no_gpu
@headers
def test_its_library_uses_no_instruction_beyond_the_plain_host(built):
    _, members = parts(built[1])
    assert b"AVX512" not in next(b for n, b in members.items() if n.endswith("wrapper_metadata.json"))
    source = next(b for n, b in members.items() if n.endswith(".wrapper.cpp"))
    assert b"-march=x86-64-v3" in source and b"-march=native" not in source


def _machine_with(monkeypatch, *gpus):
    here = machine.here()
    monkeypatch.setattr(machine, "here", lambda: replace(here, gpus=gpus))


@no_gpu
@headers
@pytest.mark.parametrize(
    ("gpus", "named"),
    [
        ((), "here is no GPU"),
        ((Gpu("NVIDIA H100", 90, 132, 80.0),), r"NVIDIA H100 \(compute capability 9\.0\)"),
        ((Gpu("NVIDIA A10", 86, 72, 24.0),), r"NVIDIA A10 \(compute capability 8\.6\)"),
    ],
)
def test_loading_it_without_its_gpu_names_the_one_it_needs_and_those_that_are_here(built, monkeypatch, gpus, named):
    _machine_with(monkeypatch, *gpus)
    with pytest.raises(ContractError, match="needs a GPU that is not here") as caught:
        load(built[0].path)
    assert "a100, compute capability 8.0" in caught.value.facts
    assert re.search(named, caught.value.facts)


@no_gpu
@headers
def test_loading_it_onto_the_wrong_one_of_two_gpus_is_refused(built, monkeypatch):
    _machine_with(monkeypatch, Gpu("NVIDIA A100", 80, 108, 80.0), Gpu("NVIDIA A10", 86, 72, 24.0))
    with pytest.raises(ContractError, match="built for another GPU") as caught:
        load(built[0].path, device="cuda:1")
    assert "NVIDIA A10" in caught.value.facts


def _first_cubin_changed(data):
    _, members = parts(data)
    name = next(n for n in members if n.endswith(".cubin"))
    at = data.index(members[name]) + 100
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _other_capability(stated):
    isa = stated["target"]["isa"]
    isa[isa.index("sm_80")] = "sm_90"


DAMAGED = {
    "a cubin changed": (_first_cubin_changed, "is damaged"),
    "cut short": (lambda data: data[:-100], ""),
    "another capability": (forged(_other_capability), CLASH),
    "another capability, restamped": (forged(_other_capability, restamp=True), CLASH),
    "said to have run": (forged(set_at("target", "origin", NATIVE)), CLASH),
    "another device": (forged(set_at("target", "device", "cpu"), restamp=True), CLASH),
    "another torch": (forged(set_at("versions", "torch", "2.12.0"), restamp=True), "built with another torch"),
}


@no_gpu
@headers
@pytest.mark.parametrize(("damage", "sentence"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_forged_cross_artifact_is_refused_in_words(built, tmp_path, monkeypatch, damage, sentence):
    _machine_with(monkeypatch, Gpu("NVIDIA A100", 80, 108, 80.0), Gpu("NVIDIA H100", 90, 132, 80.0))
    path = tmp_path / "damaged.pt2"
    path.write_bytes(damage(built[1]))
    with pytest.raises(ContractError) as caught:
        load(path)
    assert sentence in caught.value.what
    assert caught.value.do


@no_gpu
@headers
def test_a_cubin_of_another_target_put_in_by_someone_who_knows_the_writer_is_found_by_the_checks(built, tmp_path):
    stated, members = parts(built[1])
    name = next(n for n in members if n.endswith(".cubin"))
    members[name] = members[name][:48] + bytes([90]) + members[name][49:]
    path = tmp_path / "other.pt2"
    path.write_bytes(sealed(stated, members))
    assert any("is for sm_90, not sm_80" in problem for problem in checks.check(path, 80, {}).problems)


@pytest.mark.parametrize("patch", _torch_cross.PATCHES, ids=lambda patch: patch.name)
def test_each_patch_fits_the_installed_torch(patch):
    assert patch.misfit() is None
    assert patch.reason and patch.upstream


def test_a_patch_whose_place_is_gone_says_which():
    patch = replace(_torch_cross.PATCHES[0], names=("torch.cuda.is_available", "torch.cuda.gone"))
    assert patch.misfit() == "patch torch-cuda replaces torch.cuda.gone, which this torch does not have"
    assert "torch.gone" in replace(patch, names=("torch.gone.further",)).misfit()


def test_patches_are_undone_when_the_block_ends():
    before = torch.cuda.is_available, torch.cuda.get_device_properties
    with _torch_cross.patched(targets.load("h100")):
        assert torch.cuda.is_available() and torch.cuda.get_device_properties().major == 9
    assert (torch.cuda.is_available, torch.cuda.get_device_properties) == before


@pytest.mark.parametrize("name", [name for name in targets.names() if targets.load(name).kind == "cuda"])
def test_a_build_is_prepared_for_every_gpu_of_the_table(name):
    target = targets.load(name)
    props = _torch_cross.properties(target)
    assert (props.major, props.minor) == divmod(target.sm, 10)
    assert props.shared_memory_per_block_optin == target.shared_bytes_per_block


def test_a_torch_that_is_not_verified_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(_torch_cross, "VERIFIED", ("2.99",))
    _machine_with(monkeypatch)
    with pytest.raises(TargetError, match="not verified on this torch") as caught:
        ca.export(Tiny().eval(), (torch.randn(2, 10, 64),), target="a100", path=tmp_path / "m.pt2")
    assert "2.99" in caught.value.facts and caught.value.do
    assert list(tmp_path.iterdir()) == []


@no_gpu
def test_a_target_whose_host_is_no_x86_gets_sources_or_a_word(tmp_path):
    with pytest.raises(TargetError, match="host of orin is aarch64") as caught:
        ca.export(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), target="orin", path=tmp_path / "m.pt2")
    assert ".zip" in caught.value.do and "finish" in caught.value.do
    with pytest.raises(TargetError, match="no package of sources for"):
        ca.export(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), target="cpu", path=tmp_path / "m.zip")


def test_a_machine_that_has_the_gpu_does_not_cross(monkeypatch):
    _machine_with(monkeypatch, Gpu("NVIDIA A100", 80, 108, 80.0))
    assert not cross.wanted(targets.load("a100"))
    assert cross.wanted(targets.load("h100"))
    assert not cross.wanted(targets.load("cpu"))


CHILDREN = {
    "dies": ("import os, sys\nprint('no room left', file=sys.stderr, flush=True)\nos.kill(os.getpid(), 9)", "SIGKILL"),
    "leaves": ("raise SystemExit(3)", "exit code 3"),
}


def _lowered():
    settings = Settings.of("a100")
    build = prepare(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), None, settings)
    call = cross.call_on_cuda(describe.call_of(build.program))
    return lower(build.program, settings.target, build.notes), call, settings.target


def _child(monkeypatch, tmp_path, source):
    (tmp_path / "a_child.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cross, "CHILD", "a_child")


@pytest.mark.parametrize(("source", "ended"), CHILDREN.values(), ids=CHILDREN)
def test_a_child_that_ends_without_an_answer_is_an_error_in_words(monkeypatch, tmp_path, source, ended):
    _child(monkeypatch, tmp_path, source)
    with pytest.raises(LowerError, match="ended without an answer") as caught, cross.built(*_lowered(), sources=False):
        pass
    assert ended in caught.value.facts
    assert "no room left" in caught.value.facts or "nothing" in caught.value.facts


def test_a_childs_error_comes_back_in_its_four_parts_and_kind(monkeypatch, tmp_path):
    source = """
        import json, sys, pathlib
        parts = dict(kind="CaptureError", what="a", where="b", facts="c", do="d")
        pathlib.Path(sys.argv[1], "result.json").write_text(json.dumps({"error": parts}))
    """
    _child(monkeypatch, tmp_path, textwrap.dedent(source))
    with pytest.raises(CaptureError) as caught, cross.built(*_lowered(), sources=False):
        pass
    assert (caught.value.what, caught.value.where, caught.value.facts, caught.value.do) == ("a", "b", "c", "d")


def test_an_interrupted_build_leaves_no_child_behind(monkeypatch, tmp_path):
    note = tmp_path / "pid"
    source = f"""
        import os, pathlib, time
        pathlib.Path({str(note)!r}).write_text(str(os.getpid()))
        print("go", flush=True)
        time.sleep(99)
    """
    _child(monkeypatch, tmp_path, textwrap.dedent(source))

    class Stop:
        def __init__(self, _count):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def __call__(self, _name):
            raise KeyboardInterrupt

    monkeypatch.setattr(cross, "Stages", Stop)
    with pytest.raises(KeyboardInterrupt), cross.built(*_lowered(), sources=False):
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_a_candidate_that_spills_is_taken_only_where_all_do_and_the_fuller_multiprocessor_is_preferred():
    props = _torch_cross.properties(targets.load("a100"))

    def kernel(registers, spills, shared, warps=4):
        return _torch_cross.Kernel("k", "c", 3, registers, spills, shared, warps)

    assert _torch_cross.choose([kernel(255, 64, 0), kernel(255, 0, 0)], props) == 1
    assert _torch_cross.choose([kernel(255, 64, 0), kernel(255, 32, 0)], props) == 1
    assert _torch_cross.choose([kernel(32, 0, 160_000), kernel(32, 0, 8_000)], props) == 1
    assert _torch_cross.choose([kernel(32, 0, 0), kernel(32, 0, 0)], props) == 0


@pytest.fixture(scope="module")
def several(built, fixed, tmp_path_factory):
    """One file for an A100 and for this CPU, of two models: the CPU's is Fixed."""
    path = tmp_path_factory.mktemp("several") / "both.pt2"
    return bundle.write_bundle(path, [fixed.artifact, built[0]]), path


@no_gpu
@headers
def test_of_a_file_for_several_targets_load_takes_the_one_that_is_here(several, fixed):
    whole, path = several
    assert [part.contract.target.device for part in whole.parts] == ["cuda", "cpu"]
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    torch.testing.assert_close(load(path)(x), fixed.model(x))


@no_gpu
@headers
def test_the_runner_takes_the_part_that_is_here_and_says_why_not_the_others(several, fixed, runner, tmp_path):
    x = torch.randn(2, 3, 4, 5)
    np.save(tmp_path / "x.npy", x.numpy())
    words = ["--input", f"x={tmp_path}/x.npy", "--output-dir", tmp_path]
    done = run(runner, several[1], *words)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "output.npy"), fixed.model(x).detach().numpy(), rtol=1e-5, atol=1e-6)
    refused = run(runner, several[1], *words, "--device", "mps")
    assert refused.returncode == 1
    assert "none of the file's targets is here" in refused.stderr and "not a100 because" in refused.stderr
    damaged = tmp_path / "damaged.pt2"
    data = bytearray(several[1].read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert run(runner, damaged, *words).returncode == 1


@no_gpu
@headers
def test_a_gpu_that_is_here_goes_before_the_cpu_and_a_named_device_before_both(several, monkeypatch):
    path = several[1]
    members, digest = archive.unpack(memoryview(path.read_bytes()), "file")
    parts = bundle.parts_of(members, digest, "file")
    _machine_with(monkeypatch, Gpu("NVIDIA H100", 90, 132, 80.0), Gpu("NVIDIA A100", 80, 108, 80.0))
    assert bundle.choose(parts, "file")[0].target.name == "a100"
    assert bundle.choose(parts, "file", device="cuda:1")[0].target.name == "a100"
    assert bundle.choose(parts, "file", device="cpu")[0].target.device == "cpu"
    with pytest.raises(ContractError, match="none of the file's targets is here") as caught:
        bundle.choose(parts, "file", device="cuda:0")
    assert "NVIDIA H100 (9.0)" in caught.value.facts and "cuda:0 was asked for" in caught.value.facts


@no_gpu
@headers
def test_a_part_can_be_read_and_taken_out_by_its_targets_name(several, built, tmp_path):
    path = several[1]
    assert read(path, target="a100").contract == built[0].contract
    assert bundle.extract(path, "a100", tmp_path / "part.pt2") == built[0].sha256
    assert (tmp_path / "part.pt2").read_bytes() == built[1]
    with pytest.raises(ContractError, match="holds no build for h100") as caught:
        read(path, target="h100")
    assert "it holds a100, " in caught.value.facts
    with pytest.raises(ContractError, match="two builds are for a100"):
        bundle.write_bundle(tmp_path / "twice.pt2", [built[0], built[0]])


def _rewritten(path, edit, folder):
    """The file with another index, sealed by someone who knows the writer."""
    members, _ = archive.unpack(memoryview(path.read_bytes()), "file")
    index = json.loads(bytes(members.pop(bundle.INDEX)))
    index = edit(index) or index
    text = contract.canonical(index)
    changed = folder / "changed.pt2"
    changed.write_bytes(b"".join(archive.pack([(bundle.INDEX, text), *members.items()], sha256(text).hexdigest())))
    return changed


FORGED_INDEX = {
    "names swapped": (lambda i: i["parts"][1]["target"].update(name="zen9"), "index of targets contradicts a contract"),
    "a part less": (lambda i: i.update(parts=i["parts"][:1]), "not those that the index of targets names"),
    "another digest": (lambda i: i["parts"][1].update(sha256="0" * 64), "is not the one that the index names"),
    "another version": (lambda i: i.update(bundle_version=2), "not well formed"),
    "no list": (lambda i: i.update(parts=3), "not well formed"),
    "no text": (lambda i: i["parts"][0]["target"].update(isa=[3]), "not well formed"),
    "nothing": (lambda _: {"none": []}, "not well formed"),
}


@no_gpu
@headers
@pytest.mark.parametrize(("edit", "sentence"), FORGED_INDEX.values(), ids=FORGED_INDEX)
def test_an_index_of_targets_that_lies_is_refused_in_words(several, runner, tmp_path, edit, sentence):
    path = _rewritten(several[1], edit, tmp_path)
    with pytest.raises(ContractError) as caught:
        load(path)
    assert sentence in caught.value.what and caught.value.do
    assert sentence in run(runner, path, "--output-dir", tmp_path).stderr.splitlines()[0]


@pytest.mark.parametrize(("counted", "stated"), [(2**31 - 1, 2**31 - 1), (1000, None)])
def test_a_contract_takes_over_what_32_bit_indices_count_and_no_other_bound(counted, stated):
    spec = contract.TensorSpec("x", "float32", ("b", 3), (0, 1), "cuda")
    call = contract.Call(("x",), 1, (spec,), (), {"b": contract.Range(1, None)}, (), "", "")
    inputs = {0: package.InputFacts(highest={0: counted})}
    facts = package.PackageFacts({}, inputs, (1, 0), {}, memoryview(b""), {})
    assert package.narrowed(call, facts).symbols == {"b": contract.Range(1, stated)}


def test_several_targets_are_no_package_of_sources_and_none_is_no_target(tmp_path):
    model, args = nn.Linear(4, 4).eval(), (torch.randn(2, 4),)
    for wanted, name in ((("a100", "l4"), "m.zip"), ((), "m.pt2")):
        with pytest.raises(TargetError):
            ca.export(model, args, target=wanted, path=tmp_path / name)
    assert list(tmp_path.iterdir()) == []
