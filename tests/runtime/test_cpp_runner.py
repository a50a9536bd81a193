"""The C++ runner gives the numbers that Python gives, and refuses what Python refuses, with the same sentences."""

import copy
import subprocess
from random import Random

import numpy as np
import pytest
import torch
from artifact_models import rich_inputs
from damage import AT_LOADING, DAMAGES, forged, parts, sealed, set_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import run

from compiled_attn.ir.errors import ContractError, LowerError
from compiled_attn.runtime import archive, contract
from compiled_attn.runtime import runner as cpp
from compiled_attn.runtime.load import load, read


def first(done):
    """The error's first sentence; there are four parts."""
    assert done.returncode == 1, done.stdout
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ") and [line[:8] for line in lines[1:]] == ["  where:", "  facts:", "  do:   "]
    return lines[0].removeprefix("error: ")


def saved(folder, args):
    """Rich's tensors as .npy files; returns the --input words."""
    x, extra, pair, cache = args
    tensors = {"x": x, "extra_mask": extra["mask"], "extra_half": extra["half"], "pair": pair, "cache": cache}
    words = []
    for name, tensor in tensors.items():
        np.save(folder / f"{name}.npy", _numpy(tensor))
        words += ["--input", f"{name}={folder / f'{name}.npy'}"]
    return words


def _numpy(tensor):
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy().astype(_KIND(tensor))


def _KIND(tensor):
    return np.uint16 if tensor.dtype is torch.bfloat16 else str(tensor.dtype).removeprefix("torch.")


@pytest.mark.parametrize("batch", [1, 7])
def test_the_runner_gives_the_results_and_the_state_that_python_gives(rich, runner, tmp_path, batch):
    args, kwargs = rich_inputs(batch)
    words = saved(tmp_path, args)
    done = run(runner, rich.path, *words, "--output-dir", tmp_path / "out", "--repeat", 3)
    assert done.returncode == 0, done.stderr
    mine = copy.deepcopy(args)
    wanted = load(rich.path)(*mine, **kwargs)
    out = {p.stem: np.load(p) for p in (tmp_path / "out").iterdir()}
    assert set(out) == {"y", "count", "rows.0", "rows.1", "rows.2", "cache"}
    np.testing.assert_allclose(out["y"], wanted["y"].numpy(), rtol=1e-6)
    np.testing.assert_array_equal(out["rows.0"].view(np.int16), wanted["rows"][0].view(torch.int16).numpy())
    np.testing.assert_allclose(out["rows.1"], wanted["rows"][1].numpy(), rtol=1e-6)
    assert out["rows.2"] == wanted["rows"][2].item() and out["count"] == 2 * batch
    np.testing.assert_allclose(out["cache"], mine[3].numpy(), rtol=1e-6)


def test_the_runner_prints_timing_and_the_number_of_threads(fixed, runner, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 4, 5), np.float32))
    words = ["--input", f"x={tmp_path}/x.npy", "--output-dir", tmp_path / "out", "--repeat", 5, "--threads", 1]
    lines = run(runner, fixed.path, *words).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["output", "checked", "loaded", "first", "median"]
    assert lines[-1].endswith("of 5, 1 threads")


@pytest.mark.parametrize("order", ["C", "F"])
def test_files_of_either_memory_order_give_the_same(fixed, runner, tmp_path, order):
    x = torch.randn(2, 3, 4, 5)
    np.save(tmp_path / "x.npy", np.asarray(x.numpy(), order=order))
    done = run(runner, fixed.path, "--input", f"x={tmp_path}/x.npy", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "output.npy"), fixed.model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_info_describes_the_contract_without_running_anything(rich, runner):
    shown = run(runner, rich.path, "--info", TMPDIR="/nowhere").stdout
    assert shown.splitlines()[0].split() == ["input", "x", "float32[batch,", "5]"]
    assert "float32[2*batch, 4]" in shown and "1 to 16" in shown and "float32[2, 3], state" in shown


WRONG = {
    "input x has another size in dimension 1": lambda x, e, p, c: (x[:, :4], e, p, c),
    "input x has another rank": lambda x, e, p, c: (x[0], e, p, c),
    "input x has another dtype": lambda x, e, p, c: (x.double(), e, p, c),
    "input extra_half has another dtype": lambda x, e, p, c: (x, {**e, "half": e["half"].float()}, p, c),
    "input extra_mask has another size in dimension 0": lambda x, e, p, c: (x, {**e, "mask": e["mask"][1:]}, p, c),
    "input pair has another size in dimension 0": lambda x, e, p, c: (x, e, p[1:], c),
    "input x has a size out of range in dimension 0": lambda x, e, p, c: (x[:0], e, p, c),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_input_is_refused_in_the_same_words_before_anything_is_opened(rich, runner, tmp_path, what):
    args, kwargs = rich_inputs(4)
    wrong = WRONG[what](*args)
    done = run(runner, rich.path, *saved(tmp_path, wrong), "--output-dir", tmp_path, TMPDIR="/nowhere")
    with pytest.raises(ContractError) as caught:
        load(rich.path)(*wrong, **kwargs)
    assert first(done) == what
    assert done.stderr == f"error: {caught.value}\n"


def test_a_missing_an_unknown_and_a_doubled_input_are_refused(rich, runner, tmp_path):
    args, _ = rich_inputs(4)
    words, out = saved(tmp_path, args), ["--output-dir", tmp_path]
    assert first(run(runner, rich.path, *words[2:], *out)) == "argument x is missing"
    assert first(run(runner, rich.path, *words, "--input", f"z={tmp_path}/x.npy", *out)) == "argument z is not taken"
    doubled = run(runner, rich.path, *words, *words[:2], *out)
    assert doubled.returncode == 1 and "argument x is given twice" in doubled.stderr


def test_state_in_another_memory_order_is_refused(rich, runner, tmp_path):
    args, _ = rich_inputs(4)
    words = saved(tmp_path, args)
    np.save(tmp_path / "cache.npy", np.asfortranarray(args[3].numpy()))
    done = run(runner, rich.path, *words, "--output-dir", tmp_path)
    assert first(done) == "state cache has another memory order"


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_forged_file_is_refused_in_the_same_words(rich, runner, tmp_path, name):
    path = tmp_path / "damaged.pt2"
    path.write_bytes(DAMAGES[name][0](rich.data))
    with pytest.raises(ContractError) as caught:
        load(path)
    done = run(runner, path, "--output-dir", tmp_path, TMPDIR="/nowhere")
    assert first(done) == caught.value.what


@pytest.mark.parametrize("name", AT_LOADING)
def test_another_torch_machine_or_cpu_is_refused_in_the_same_words(rich, runner, tmp_path, name):
    path = tmp_path / "elsewhere.pt2"
    path.write_bytes(AT_LOADING[name][0](rich.data))
    with pytest.raises(ContractError) as caught:
        load(path)
    done = run(runner, path, "--output-dir", tmp_path, TMPDIR="/nowhere")
    assert done.stderr == f"error: {caught.value}\n"


def test_expect_sha256_admits_the_one_file(rich, fixed, runner):
    assert run(runner, rich.path, "--info", "--expect-sha256", rich.artifact.sha256.upper()).returncode == 0
    done = run(runner, rich.path, "--info", "--expect-sha256", fixed.artifact.sha256)
    assert first(done) == "the file is not the expected one"


def test_another_device_is_refused(fixed, runner, tmp_path):
    done = run(runner, fixed.path, "--device", "cuda", "--output-dir", tmp_path)
    assert first(done) == "the artifact was built for another device"


WRONG_WORDS = ["", "a.pt2", "a.pt2 --repeat 0 --info", "a.pt2 --input x", "a.pt2 --what", "a b", "a.pt2 --threads"]


@pytest.mark.parametrize("words", WRONG_WORDS)
def test_a_wrong_command_line_says_how_it_is_used(runner, words):
    done = run(runner, *words.split())
    assert done.returncode == 2 and "usage: runner model.pt2" in done.stderr


def _check(runner, paths):
    done = subprocess.run(
        [str(runner.with_name("check")), *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def _python(path):
    try:
        read(path)
    except ContractError as error:
        return error.what
    return "ok"


def same_answer(runner, folder, data, cases=((),)):
    """Python and C++ answer alike on each of the files."""
    paths = []
    for i, case in enumerate(cases):
        paths.append(folder / f"{i}.pt2")
        paths[-1].write_bytes(case if case else data)
    ours = [_python(path) for path in paths]
    assert _check(runner, paths) == ours
    return ours


def _flips(rich, positions):
    for at in positions:
        changed = bytearray(rich.data)
        changed[at] ^= 1 << at % 8
        yield bytes(changed)


def _spread(rich, count):
    """Positions in every member's header and payload, in the directory and in the end record."""
    members, _ = archive.unpack(memoryview(rich.data), "")
    step = max(len(rich.data) // count, 1)
    tail = 22 + 94 + sum(46 + len(n) for n in members)
    return [*range(0, len(rich.data), step), *range(len(rich.data) - tail, len(rich.data), max(tail // count, 1))]


def test_python_and_cpp_agree_on_the_whole_file_and_on_flipped_bytes(rich, runner, tmp_path):
    ours = same_answer(runner, tmp_path, rich.data, [rich.data, *_flips(rich, _spread(rich, 20))])
    assert ours[0] == "ok" and "ok" not in ours[1:]


def test_python_and_cpp_agree_on_truncated_files(rich, runner, tmp_path):
    lengths = [*range(1, len(rich.data), len(rich.data) // 12), *range(len(rich.data) - 120, len(rich.data), 11)]
    assert "ok" not in same_answer(runner, tmp_path, rich.data, [rich.data[:n] for n in lengths])


@pytest.mark.deep
def test_python_and_cpp_agree_on_thousands_of_flipped_bytes(rich, runner, tmp_path):
    positions = _spread(rich, 1500)
    for began in range(0, len(positions), 100):
        cases = list(_flips(rich, positions[began : began + 100]))
        assert "ok" not in same_answer(runner, tmp_path, rich.data, cases)


def _sealed_text(text):
    """An archive that holds nothing but a contract of this text."""
    import hashlib

    return b"".join(archive.pack([(contract.MEMBER, text)], hashlib.sha256(text).hexdigest()))


def _text(rich):
    members, _ = archive.unpack(memoryview(rich.data), "")
    return bytes(members[contract.MEMBER])


WORDS = [b"\\u12", b"\\", b"1", b"-", b"0.5", b"1e5", b"null", b" ", b"\xc3", b"e9", b"/", b"0"]
PIECES = st.sampled_from([b"{", b"}", b"[", b"]", b",", b'"', *WORDS])


def agree_on_mangled_text(rich, runner, folder, edits):
    cases = []
    for at, length, piece in edits:
        text = _text(rich)
        at %= len(text)
        cases.append(_sealed_text(text[:at] + piece + text[at + length :]))
    same_answer(runner, folder, rich.data, cases)


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 9), PIECES), min_size=10, max_size=20))
def test_python_and_cpp_agree_on_mangled_contracts(rich, runner, tmp_path, edits):
    agree_on_mangled_text(rich, runner, tmp_path, edits)


@pytest.mark.deep
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 99), PIECES), min_size=10, max_size=20))
def test_python_and_cpp_agree_on_thousands_of_mangled_contracts(rich, runner, tmp_path, edits):
    agree_on_mangled_text(rich, runner, tmp_path, edits)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """The checker, built so that any read outside its data, overflow or undefined shift ends it."""
    path = tmp_path_factory.mktemp("sanitized") / "check"
    flags = ["-std=c++20", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = ["archive", "check", "contract", "expr", "json", "package", "sha256", "verify"]
    subprocess.run(["c++", *flags, *(str(cpp.SOURCE / f"{s}.cpp") for s in sources), "-o", str(path)], check=True)
    return path


def _mangled(random, data):
    """A few random edits near a random place."""
    changed = bytearray(data)
    at = random.randrange(len(changed) + 1)
    for _ in range(random.randint(1, 4)):
        near = min(max(at + random.randint(-40, 40), 0), len(changed))
        patch = random.choice(
            [b"", b"0", b"-", b"9" * 20, b"{", b"]", b'"', b"\\", b"\0", b"\xff", random.randbytes(3)]
        )
        changed[near : near + random.choice([0, 1, 2, 9])] = patch
    return bytes(changed)


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(6))
def test_the_cpp_reader_survives_mangled_files_under_sanitizers_and_agrees(rich, sanitized, tmp_path, seed):
    random = Random(seed)
    stated, members = parts(rich.data)
    library = next(n for n in members if n.endswith(".so"))
    specs = b"".join(stated["call"][k].encode() for k in ("in_tree", "out_tree"))
    small = {n: specs if n == library else b for n, b in members.items()}
    wrapper = next(n for n in members if b"AOTInductorModelBase(" in members[n])
    metadata = wrapper.removesuffix(".cpp") + "_metadata.json"
    whole = sealed(stated, small)
    cases = []
    for _ in range(60):
        cases.append(_mangled(random, whole))
        cases.append(_sealed_text(_mangled(random, contract.canonical(stated))))
        part = random.choice([wrapper, metadata])
        cases.append(sealed(stated, {**small, part: _mangled(random, small[part])}))
    same_answer(sanitized, tmp_path, whole, [whole, *cases])


def test_python_and_cpp_agree_on_contracts_with_a_field_out_of_form(rich, runner, tmp_path):
    from test_contract import BAD_FIELDS

    cases = []
    for path, values in BAD_FIELDS.items():
        for value in values:
            if path[0] == "call" and path[1:3] == ("inputs", 1):
                path = ("call", "inputs", 5, *path[3:])
            cases.append(forged(set_at(*path, value))(rich.data) if path[0] != "members" else None)
    same_answer(runner, tmp_path, rich.data, [c for c in cases if c])


NUMBERS = [
    0.7,
    1e-5,
    1e-4,
    1e15,
    1e16,
    1e22,
    5e-324,
    1.7976931348623157e308,
    0.1 + 0.2,
    -0.0,
    123456789.125,
    -3,
    10**30,
]


def test_numbers_are_canonical_for_cpp_as_they_are_for_python(rich, runner, tmp_path):
    cases = [forged(set_at("passes", [{"name": "p", "options": {"x": n}}]))(rich.data) for n in NUMBERS]
    assert set(same_answer(runner, tmp_path, rich.data, cases)) == {"the contract contradicts the package"}
    texts = (b"0.70", b"7e-1", b"1E5", b"-0", b"1e999", b"1.0e16", b"100000000000000000.0", b"0.00001")
    mangled = [_sealed_text(_text(rich).replace(b'"positional":4', b'"positional":' + t)) for t in texts]
    assert set(same_answer(runner, tmp_path, rich.data, mangled)) == {"the contract is not well formed"}


def test_npy_files_of_every_dtype_are_told_apart(fixed, runner, tmp_path):
    for dtype in ("bool", "uint8", "int16", "int64", "float16", "complex64"):
        np.save(tmp_path / "x.npy", np.zeros((2, 3, 4, 5), dtype))
        done = run(runner, fixed.path, "--input", f"x={tmp_path}/x.npy", "--output-dir", tmp_path)
        assert first(done) == "input x has another dtype" and f"given is {dtype}\n" in done.stderr


BAD_NPY = {
    "missing": None,
    "empty": b"",
    "a text": b"x" * 200,
    "cut in the header": lambda good: good[:60],
    "cut in the data": lambda good: good[:-1],
    "longer": lambda good: good + b"x",
    "another shape": lambda good: good.replace(b"(2, 3, 4, 5)", b"(2, 3, 4, 6)"),
    "a negative shape": lambda good: good.replace(b"(2, 3, 4, 5)", b"(2,-3,-4, 5)"),
    "a huge shape": lambda good: good.replace(b"(2, 3, 4, 5), }", b"(999999999999999, 999999999999999), }"),
    "an unknown dtype": lambda good: good.replace(b"<f4", b"<U4"),
    "big endian": lambda good: good.replace(b"<f4", b">f4"),
    "no field": lambda good: good.replace(b"'descr'", b"'other'"),
}


@pytest.mark.parametrize("name", BAD_NPY)
def test_a_bad_npy_file_is_a_named_error(fixed, runner, tmp_path, name):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((2, 3, 4, 5), np.float32))
    change = BAD_NPY[name]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    done = run(runner, fixed.path, "--input", f"x={path}", "--output-dir", tmp_path)
    assert first(done) == "the .npy file can not be read"


def test_no_private_copy_is_left_behind(fixed, runner, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 4, 5), np.float32))
    (tmp_path / "private").mkdir()
    words = ["--input", f"x={tmp_path}/x.npy", "--output-dir", tmp_path / "out"]
    assert run(runner, fixed.path, *words, TMPDIR=str(tmp_path / "private")).returncode == 0
    assert list((tmp_path / "private").iterdir()) == []


def test_a_sealed_copy_of_the_same_members_is_the_same_file(rich):
    assert sealed(*parts(rich.data)) == rich.data


def test_building_without_cmake_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LowerError, match="cmake builds the runner, and is not on PATH") as caught:
        cpp.build(tmp_path)
    assert "apt-get install cmake" in caught.value.do


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp, "SOURCE", tmp_path)
    with pytest.raises(LowerError, match="can not be built") as caught:
        cpp.build(tmp_path / "build")
    assert "CMakeLists.txt" in caught.value.facts
