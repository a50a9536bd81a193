"""`doctor` and `explain` as text: one fact a line, each "missing" with what is off and how to get it."""

import shutil

import pytest
import torch
from small_nets import Net, pictures

from compiled_attn.ir.notes import Notes
from compiled_attn.runtime import doctor as ours
from compiled_attn.runtime.build import Settings, prepare
from compiled_attn.runtime.doctor import Fact, Report, doctor
from compiled_attn.runtime.report import Explanation, aligned, ordered


@pytest.fixture(scope="module")
def report() -> Report:
    return doctor()


def test_this_machine_can_compile(report):
    assert report.ok, str(report)
    assert report["torch"].value.startswith(torch.__version__)


def test_every_missing_fact_says_what_is_off_and_how_to_get_it(report):
    lines = str(report).splitlines()
    for fact in report.missing:
        assert fact.value.startswith("missing") or fact.name in ("torch", "processor")
        assert any(line.strip() == f"off: {fact.off}" for line in lines)
        assert any(line.strip() == f"get: {fact.get}" for line in lines)


def test_facts_are_aligned_and_named_once(report):
    lines = str(report).splitlines()
    start = next(i for i, c in enumerate(lines[0]) if i > len("platform") and c != " ")
    assert all(line[start - 1] == " " and line[start] != " " for line in lines)
    assert len({fact.name for fact in report}) == len(report.facts)


def test_a_machine_with_no_compiler_is_told_so(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(ours.shutil, "which", lambda _name: None)
    report = doctor()
    assert not report.ok
    assert {"compiler", "OpenMP", "cmake"} <= {fact.name for fact in report.missing}
    assert "g++" in report["compiler"].get


def test_a_missing_package_names_its_extra(monkeypatch):
    real = ours.importlib.util.find_spec
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda n, *a: None if n == "onnx" else real(n, *a))
    assert doctor()["ONNX"] == Fact("ONNX", "missing", "export to .onnx", "pip install 'compiled-attn[onnx]'")


def test_a_torch_out_of_range_is_told_so(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    fact = doctor()["torch"]
    assert not fact.there
    assert "torch >= 2.11, < 2.14" in fact.get


def test_every_platform_has_its_sentence():
    assert {"Linux", "Darwin"} == {system for system, arch in ours.PLATFORMS if arch == "aarch64"}
    assert shutil.which("g++") is None or ours.compiler() is not None


def test_rows_are_aligned_and_repeats_left_blank():
    text = aligned([("a", "long cell", "x"), ("a", "b", "y"), ("bb", "c", "")])
    assert text == "a   long cell  x\n    b          y\nbb  c"


def test_notes_are_grouped_by_place_and_told_once():
    notes = Notes()
    notes.did("a", "fold", "done")
    notes.did("b", "fold", "done")
    notes.miss("a", "raise", "it is read twice")
    notes.miss("a", "raise", "it is read twice")
    assert [r.where for r in ordered(notes)] == ["a", "a", "b"]


def test_an_explanation_says_what_was_done_and_what_not():
    build = prepare(Net().eval(), (pictures(2),), None, Settings.of("cpu"))
    build.notes.miss("attn", "triton_attention", "target cpu has no Triton")
    text = str(Explanation("Net for cpu, inference", (build,), ("captured: first call",)))
    assert text.startswith("Net for cpu, inference\n\ninput  x  f32[2, 3, 16, 16]")
    assert "raise-attention" in text
    assert "not triton_attention" in text
    assert "because target cpu has no Triton" in text
    assert text.endswith("captured: first call")
