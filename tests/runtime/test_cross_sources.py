"""The package of sources: written for a GPU with another host, checked, and compiled to an artifact where finished.

Here it is finished on x86-64 against stubs of CUDA's libraries. Nothing of it has run on a device.
"""

import importlib
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from cross_models import Tiny

import compiled_attn as ca
from compiled_attn.ir.errors import ContractError, LowerError
from compiled_attn.runtime import cross_sources, cross_toolchain
from compiled_attn.runtime.contract import CROSS
from compiled_attn.runtime.cross_sources import finish, read_sources
from compiled_attn.runtime.load import load, read

pytest.importorskip("triton")
pytest.importorskip("nvidia")
sys.path.insert(0, str(Path(__file__).parents[2]))
checks = importlib.import_module("bench.cross_checks")
pytestmark = [pytest.mark.deep, pytest.mark.skipif(torch.cuda.is_available(), reason="stubs are for a CPU build")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Tiny in float16 for Orin, its batch open: (artifact, path)."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sources") / "tiny.zip"
    args = (torch.randn(2, 10, 64),)
    shapes = {"x": {0: "batch"}}
    return ca.export(Tiny().eval(), args, target="orin", path=path, precision="fp16", dynamic_shapes=shapes), path


def test_it_holds_sources_weights_cubins_and_ptx_for_orin(sources):
    artifact, path = sources
    stated, files = read_sources(path)
    assert stated.target.origin == CROSS and stated.target.machine == "aarch64" and stated.target.isa == ("sm_87",)
    assert {"CMakeLists.txt", "model.cpp", "constants.S", "weights.bin", "metadata.json"} <= set(files)
    cubins, ptx = ([n for n in files if n.endswith(s)] for s in (".cubin", ".ptx"))
    assert len(cubins) == len(ptx) >= 5
    assert all(b".target sm_87" in files[n] for n in ptx)
    assert artifact.size == path.stat().st_size


def test_its_sources_name_no_folder_and_no_instruction_set_of_the_machine_that_made_them(sources):
    _, files = read_sources(sources[1])
    text = files["model.cpp"] + files["CMakeLists.txt"]
    assert str(Path.home()).encode() not in text
    assert b"-march" not in text and b"avx" not in text.lower().replace(b"defined(cpu_capability_avx", b"")


def test_every_weight_and_kernel_passes_the_checks(sources):
    assert checks.check(sources[1], 87, {"shift": torch.linspace(-1, 1, 64).half()}).problems == ()


def test_a_file_changed_missing_or_added_is_refused_in_words(sources, tmp_path):
    with zipfile.ZipFile(sources[1]) as source:
        files = {n: source.read(n) for n in source.namelist()}

    def written(change):
        path = tmp_path / "changed.zip"
        with zipfile.ZipFile(path, "w") as out:
            for name, data in change(dict(files)).items():
                out.writestr(name, data)
        return path

    changes = {
        "is not the one that the contract names": lambda f: f | {"model.cpp": f["model.cpp"] + b" "},
        "the files are not those": lambda f: {n: b for n, b in f.items() if n != "weights.bin"},
        "the files are not those that": lambda f: f | {"more": b""},
        "no package of sources": lambda f: {n: b for n, b in f.items() if n != cross_sources.CONTRACT},
    }
    for sentence, change in changes.items():
        with pytest.raises(ContractError, match=sentence):
            read_sources(written(change))
    (tmp_path / "words.zip").write_text("words")
    with pytest.raises(ContractError, match="no package of sources"):
        finish(tmp_path / "words.zip", tmp_path / "m.pt2")


def test_sources_made_with_another_torch_are_refused(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    with pytest.raises(ContractError, match="made with another torch"):
        finish(sources[1], tmp_path / "m.pt2")


def test_without_cuda_headers_the_compilers_word_comes_back(sources, tmp_path):
    with pytest.raises(LowerError, match="the host code can not be built") as caught:
        finish(sources[1], tmp_path / "m.pt2", cuda_dir=tmp_path)
    assert "cuda" in caught.value.facts


def test_finished_it_is_an_artifact_with_the_weights_at_its_end_that_load_checks_and_asks_a_gpu_for(sources, tmp_path):
    toolkit = cross_toolchain.prepare(tmp_path / "toolkit")
    artifact = finish(sources[1], tmp_path / "tiny.pt2", cuda_dir=toolkit)
    assert artifact.contract.target.origin == CROSS and artifact.contract.target.isa == ("sm_87",)
    found = checks.check(artifact.path, 87, {"shift": torch.linspace(-1, 1, 64).half()})
    assert found.problems == ()
    members = read(artifact.path).members
    library = bytes(next(b for n, b in members.items() if n.endswith(".so")))
    weights = read_sources(sources[1])[1]["weights.bin"]
    assert library.endswith(weights) and (len(library) - len(weights)) % 65536 == 0
    with pytest.raises(ContractError, match="needs a GPU that is not here") as caught:
        load(artifact.path)
    assert "orin, compute capability 8.7" in caught.value.facts
