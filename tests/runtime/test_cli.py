"""The command line: each command, its help, its exit codes, its errors without a traceback."""

import re

import pytest
import torch
from click.testing import CliRunner, Result

from compiled_attn.runtime import cli, doctor
from compiled_attn.zoo import PAPERS
from compiled_attn.zoo.paper import pictures

COMMANDS = ("list", "show", "run", "export", "inspect", "bench", "explain", "doctor")


def call(*args: object) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="compiled-attn")


@pytest.fixture
def tiny(monkeypatch):
    """The papers' tiny networks, as variants of their own."""
    for paper in PAPERS.values():
        monkeypatch.setitem(paper.variants, "tiny", paper.tiny)


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.new("RGB", (60, 40), (200, 30, 90)).save(path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_help(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: compiled-attn {command}")


def test_the_help_names_every_command():
    output = call("--help").output
    assert all(re.search(rf"^  {command} ", output, re.M) for command in COMMANDS)


def test_list_prints_every_variant():
    output = call("list").output
    assert all(variant in output for paper in PAPERS.values() for variant in paper.variants)


def test_show_prints_a_papers_record():
    output = call("show", "evit").output
    assert PAPERS["evit"].title in output
    assert PAPERS["evit"].link in output
    assert PAPERS["evit"].reference in output
    assert "22,050,664" in output


def test_an_unknown_name_is_an_error_in_four_parts_that_names_close_ones():
    result = call("show", "evit_s_k07_fused")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert lines[0] == "no model is named 'evit_s_k07_fused'"
    assert [line.split()[0] for line in lines[1:]] == ["where:", "facts:", "do:"]
    assert "evit_s_k07_fuse" in lines[2]


def test_a_name_of_two_papers_asks_which():
    result = call("show", "digits_tiny")
    assert result.exit_code == 1
    assert "deit/digits_tiny, evit/digits_tiny" in result.stderr


def test_wrong_usage_has_its_own_exit_code():
    assert call("export", "deit").exit_code == 2
    assert call("nonsense").exit_code == 2


def test_a_fault_of_ours_has_its_own_exit_code_and_no_traceback(monkeypatch):
    def broken():
        raise RuntimeError("broken")

    monkeypatch.setattr(doctor, "doctor", broken)
    result = call("doctor")
    assert result.exit_code == 3
    assert "Traceback" not in result.output
    assert "RuntimeError: broken" in result.stderr
    assert isinstance(call("--traceback", "doctor").exception, RuntimeError)


def test_doctor_prints_its_report_and_says_by_its_exit_code_whether_it_can_compile(monkeypatch):
    assert call("doctor").exit_code == 0
    monkeypatch.setattr(doctor, "compiler", lambda: None)
    result = call("doctor")
    assert result.exit_code == 1
    assert "get: " in result.output


def test_inspect_prints_the_contract(rich):
    result = call("inspect", rich.path)
    assert result.exit_code == 0
    assert re.search(r"^input +x ", result.output, re.M)
    assert re.search(r"^size +batch ", result.output, re.M)


def test_inspect_refuses_what_is_no_artifact(tmp_path):
    path = tmp_path / "no.pt2"
    path.write_bytes(b"nothing")
    result = call("inspect", path)
    assert result.exit_code == 1
    assert str(path) in result.stderr


@pytest.mark.usefixtures("tiny")
def test_export_writes_an_artifact_with_reorganized_tokens(tmp_path):
    from compiled_attn.runtime.load import load

    path = tmp_path / "tiny.pt2"
    result = call("export", "deit/tiny", "-o", path, "--keep-rate", 0.5, "--at", 1, "--dynamic-batch", "--batch", 2)
    assert result.exit_code == 0, result.output
    assert "reorganize-tokens" in result.output
    assert load(path)(torch.randn(3, 3, 32, 32)).shape == (3, 10)


@pytest.mark.usefixtures("tiny")
def test_export_writes_onnx_by_the_files_name(tmp_path):
    path = tmp_path / "tiny.onnx"
    result = call("export", "deit/tiny", "-o", path)
    assert result.exit_code == 0, result.output
    assert path.stat().st_size > 10_000
    assert "opset 20" in result.output


@pytest.mark.usefixtures("tiny")
def test_explain_needs_no_device_of_the_target():
    result = call("explain", "deit/tiny", "--target", "a100", "--keep-rate", 0.5, "--at", 1)
    assert result.exit_code == 0, result.output
    assert "16 -> 9 tokens" in result.output


@pytest.mark.usefixtures("tiny")
def test_run_classifies_a_picture(picture):
    result = call("run", "deit/tiny", "--image", picture, "--random-weights", "--top", 3)
    assert result.exit_code == 0, result.output
    shares = [float(x) for x in re.findall(r"class \d+ +([\d.]+) %", result.output)]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)


def test_run_with_no_weights_says_how_to_give_them(picture):
    result = call("run", "deit_s", "--image", picture)
    assert result.exit_code == 1
    assert "--checkpoint" in result.stderr


@pytest.mark.usefixtures("tiny")
def test_run_on_a_file_that_is_no_picture_says_so(tmp_path):
    path = tmp_path / "words.png"
    path.write_text("words")
    result = call("run", "deit/tiny", "--image", path, "--random-weights")
    assert result.exit_code == 1
    assert "the picture can not be read" in result.stderr


@pytest.mark.parametrize("options", [("--at", "x", "--keep-rate", 0.5), ("-p", "Nonsense"), ("--keep-rate", 3)])
@pytest.mark.usefixtures("tiny")
def test_options_that_name_nothing_are_errors(options):
    result = call("explain", "deit/tiny", *options)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].strip().startswith("do:")


@pytest.mark.deep
@pytest.mark.usefixtures("tiny")
def test_bench_times_only_right_numbers():
    result = call("bench", "deit/tiny", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert re.search(r"^eager +[\d.]+ +1\.00x", result.output, re.M)
    assert re.search(r"^compiled_attn +[\d.]+ ", result.output, re.M)
    assert "differ by" in result.output


@pytest.mark.parametrize("name", [name for name, paper in PAPERS.items() if paper.inputs is not pictures])
@pytest.mark.usefixtures("tiny")
def test_models_of_other_inputs_than_pictures_are_explained_and_run_takes_none_of_them(name, picture):
    result = call("explain", f"{name}/tiny", "--batch", 2)
    assert result.exit_code == 0, result.stderr
    assert "input" in result.output
    refused = call("run", f"{name}/tiny", "--image", picture, "--random-weights")
    assert refused.exit_code == 1
    assert "tiny takes no pictures" in refused.stderr


@pytest.mark.parametrize("arguments", [("--batch", 0), ("--batch", -2)])
def test_counts_begin_at_one(arguments):
    assert call("explain", "deit", *arguments).exit_code == 2


def test_only_passes_are_named_as_passes():
    result = call("explain", "deit/digits_tiny", "-p", "Pass")
    assert result.exit_code == 1
    assert "there are Canonicalize, " in result.stderr
    assert "Pass," not in result.stderr


@pytest.mark.parametrize(
    ("code", "said", "arguments"),
    [
        (1, "there is no such map", ("--size", "0,4")),
        (1, "there is no such map", ("--size", "-3")),
        (2, "too many to draw", ("--size", "9000,9")),
        (2, "too many to draw", ("--size", "9", "--dilation", "99999999999999999999")),
        (1, "sinks -2 are fewer than none", ("--size", "9", "--sinks", "-2")),
    ],
)
def test_patterns_that_can_not_be_drawn_say_why(code, said, arguments):
    result = call("show", "local_attention", "--window", 3, *arguments)
    assert result.exit_code == code
    assert said in result.stderr


@pytest.mark.parametrize("name", ["absent/tiny.pt2", "absent/tiny.onnx", ""])
def test_a_path_that_can_not_be_written_is_refused_before_any_work(name, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "model_of", None)
    result = call("export", "deit", "-o", tmp_path / name)
    assert result.exit_code == 1
    assert "the artifact can not be written" in result.stderr
