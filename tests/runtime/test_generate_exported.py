"""A decoder exported with its eviction: one file, one copy of the weights, explicit state, and the eager tokens."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import decoders
import numpy as np
import pytest
import torch
from decoders import VOCABULARY
from generated import regions

import compiled_attn as ca
from compiled_attn.ir.errors import CompiledAttnError, ContractError
from compiled_attn.passes.evict_policies import HeavyHitters
from compiled_attn.runtime import archive, programs
from compiled_attn.runtime.contract import canonical
from compiled_attn.runtime.decoder_file import Decoder
from compiled_attn.runtime.load import read
from compiled_attn.runtime.programs import DecoderFile

BUDGET, CHUNK, STEPS = 12, 8, 200


@pytest.fixture(scope="module")
def eager() -> Decoder:
    return ca.decoder(decoders.stock("llama"), policy=HeavyHitters(recent=6), budget=BUDGET, chunk=CHUNK)


@pytest.fixture(scope="module")
def file(eager: Decoder, tmp_path_factory: pytest.TempPathFactory) -> DecoderFile:
    return ca.export(eager, path=tmp_path_factory.mktemp("decoder") / "llama.pt2", target="cpu")


@pytest.fixture(scope="module")
def loaded(file: DecoderFile) -> Decoder:
    return ca.load_decoder(file.path, expect_sha256=file.sha256)


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (n,), generator=random).tolist() for n in lengths]


def test_the_loaded_file_says_the_tokens_that_the_eager_programs_say(eager: Decoder, loaded: Decoder) -> None:
    texts = prompts((19, 5))
    found, wanted = (ca.generate(d, texts, max_new_tokens=STEPS) for d in (loaded, eager))
    assert found.tokens == wanted.tokens
    assert found.conversation.kept(1) == wanted.conversation.kept(1)
    assert found.conversation.lengths == [19 + STEPS - 1, 5 + STEPS - 1]


def test_the_runner_without_python_says_the_same_and_its_state_can_be_gone_on_with(
    file: DecoderFile, loaded: Decoder, runner: Path, tmp_path: Path
) -> None:
    texts = prompts((19, 5))
    wanted = ca.generate(loaded, texts, max_new_tokens=STEPS).tokens
    filled = np.full((2, 19), -1)
    for row, text in zip(filled, texts, strict=True):
        row[19 - len(text) :] = text
    first, rest = spoken(runner, file.path, filled, tmp_path / "first", 60), STEPS - 60
    state = [f"{p.stem}={p}" for p in (tmp_path / "first").iterdir() if p.stem != "tokens"]
    then = spoken(runner, file.path, first[:, -1:], tmp_path / "then", rest, state)
    assert np.concatenate([first, then], 1).tolist() == wanted


def test_the_runner_draws_the_same_tokens_under_a_seed(
    file: DecoderFile, loaded: Decoder, runner: Path, tmp_path: Path
) -> None:
    texts = prompts((9, 9))
    given = {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "seed": 2**40 + 7}
    wanted = ca.generate(loaded, texts, max_new_tokens=60, **given).tokens
    assert wanted != ca.generate(loaded, texts, max_new_tokens=60).tokens
    words = [w for name, value in given.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    found = spoken(runner, file.path, np.array(texts), tmp_path / "drawn", 60, options=words)
    assert found.tolist() == wanted
    other = spoken(runner, file.path, np.array(texts), tmp_path / "other", 60, options=[*words[:-1], "3"])
    assert other.tolist() != wanted


def test_the_runner_ends_a_text_behind_a_stop_token_and_lets_the_others_go_on(
    file: DecoderFile, loaded: Decoder, runner: Path, tmp_path: Path
) -> None:
    texts = prompts((9, 9))
    given = {"temperature": 1.3, "seed": 2}
    stop = ca.generate(loaded, texts, max_new_tokens=40, **given).tokens[0][4]
    wanted = ca.generate(loaded, texts, max_new_tokens=40, stop=[stop], **given)
    words = ["--temperature", "1.3", "--seed", "2", "--stop", str(stop)]
    found = spoken(runner, file.path, np.array(texts), tmp_path / "out", 40, options=words)
    assert [[t for t in row if t >= 0] for row in found.tolist()] == wanted.tokens
    assert np.load(tmp_path / "out" / "lengths.npy").tolist() == wanted.conversation.lengths
    assert len(wanted.tokens[0]) <= 5


def test_the_runner_ends_a_text_behind_several_tokens_in_a_row_and_prints_each_as_it_comes(
    file: DecoderFile, loaded: Decoder, runner: Path, tmp_path: Path
) -> None:
    texts, given = prompts((9, 9)), {"temperature": 1.3, "seed": 2}
    free = ca.generate(loaded, texts, max_new_tokens=20, **given).tokens
    stop = [free[0][3:6], [free[1][0], VOCABULARY], free[1][7:9]]
    heard: list[tuple[int, int]] = []
    wanted = ca.generate(
        loaded, texts, max_new_tokens=20, stop=stop, on_token=lambda *said: heard.append(said), **given
    )
    assert wanted.ended == ["stop", "stop"] and [len(t) for t in wanted.tokens] == [6, 9]
    words = ["--temperature", "1.3", "--seed", "2", "--stream"]
    words += [w for tokens in stop for w in ("--stop", ",".join(map(str, tokens)))]
    lines: list[str] = []
    found = spoken(runner, file.path, np.array(texts), tmp_path / "out", 20, options=words, heard=lines)
    assert [[t for t in row if t >= 0] for row in found.tolist()] == wanted.tokens
    assert lines[:-1] == [f"{text} {token}" for text, token in heard] and lines[-1].startswith("tokens ")


def test_the_runner_does_not_hold_tokens_back(file: DecoderFile, runner: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.array(prompts((9,))))
    words = [runner, file.path, "--count", "99999999", "--input", f"tokens={tmp_path / 'tokens.npy'}", "--stream"]
    with subprocess.Popen([*words, "--output-dir", tmp_path], stdout=subprocess.PIPE) as saying:
        assert saying.stdout is not None
        parts = [os.read(saying.stdout.fileno(), 1 << 20) for _ in range(6)]  # a full buffer would cut a line
        assert saying.poll() is None
        saying.kill()
    assert all(part.endswith(b"\n") for part in parts)
    assert all(line.startswith(b"0 ") for part in parts for line in part.splitlines())


def test_the_weights_are_there_once_in_the_file_and_in_memory(file: DecoderFile, loaded: Decoder) -> None:
    members, digest = archive.unpack(memoryview(file.path.read_bytes()), "")
    found = programs.programs_of(members, digest, "")
    assert file.weights == sum(w.nbytes for w in found.weights)
    assert len({bytes(w) for w in found.weights}) == len(found.weights)
    values = {bytes(p.detach().contiguous().numpy().tobytes()) for p in decoders.stock("llama").parameters()}
    assert file.weights < 1.5 * sum(map(len, values))  # some lie in the order that our product reads, padded
    prompt, step = (
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in program.weights.values()}  # type: ignore[attr-defined]
        for program in (loaded.prompt, loaded.step)
    )
    assert len(prompt | step) == len(found.weights)
    slots = 8 * (BUDGET + 1)  # bytes of the numbers up to the step's slots, its budget and the new token's
    assert sum(dict(prompt.items() ^ step.items()).values()) <= slots


def test_a_step_starts_threads_only_where_its_work_pays_for_them(file: DecoderFile) -> None:
    members, _ = archive.unpack(memoryview(file.path.read_bytes()), "")
    found = regions(io.BytesIO(members["model/step.pt2"]))
    assert found and all(re.fullmatch(r"#pragma omp parallel if \(.+ >= \d+\)", line) for line in found)


def test_two_conversations_over_one_file_do_not_mix(loaded: Decoder) -> None:
    texts = prompts((9, 7))
    apart = [ca.generate(loaded, [t], max_new_tokens=12).tokens[0] for t in texts]
    talks = [ca.generate(loaded, [t], max_new_tokens=4) for t in texts]
    rest = [
        ca.generate(loaded, [[t]], max_new_tokens=1, conversation=talk.conversation.copy()).tokens
        for talk, t in zip(talks, (3, 4), strict=True)
    ]
    assert [talk.tokens[0] for talk in talks] == [tokens[:4] for tokens in apart]
    again = [
        ca.generate(loaded, [[t]], max_new_tokens=1, conversation=talk.conversation).tokens
        for talk, t in zip(reversed(talks), (4, 3), strict=True)
    ]
    assert again == rest[::-1]


def test_a_conversation_can_be_saved_restored_and_reset(file: DecoderFile, loaded: Decoder, tmp_path: Path) -> None:
    text = prompts((9,))
    talk = ca.generate(loaded, text, max_new_tokens=4)
    talk.conversation.save(tmp_path / "talk")
    wanted = ca.generate(loaded, [[3]], max_new_tokens=8, conversation=talk.conversation).tokens
    other = ca.load_decoder(file.path)
    fresh = other.fresh()
    fresh.restore(tmp_path / "talk")
    assert ca.generate(other, [[3]], max_new_tokens=8, conversation=fresh).tokens == wanted
    fresh.reset()
    assert ca.generate(other, text, max_new_tokens=4, conversation=fresh).tokens == talk.tokens


def test_the_contract_names_the_state_and_its_memory_stays(loaded: Decoder) -> None:
    layers = decoders.SIZES["num_hidden_layers"]
    names = [f"{kind}_{i}" for kind in ("state_keys", "state_values") for i in range(layers)]
    names += ["state_seen", *(f"slots_{kind}_{i}" for kind in ("positions", "scores") for i in range(layers))]
    assert loaded.call.state == names
    talk = loaded.fresh(1)
    size, places = talk.nbytes, [t.data_ptr() for t in talk.state["keys"]]
    ca.generate(loaded, prompts((30,)), max_new_tokens=40, conversation=talk)
    assert talk.nbytes == size and [t.data_ptr() for t in talk.state["keys"]] == places
    assert all(len(head) == BUDGET for head in talk.kept(0)[0])


def resealed(data: bytes, edit: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with its index edited, by someone who knows our writer."""
    members, _ = archive.unpack(memoryview(data), "")
    index = json.loads(bytes(members.pop(programs.INDEX)))
    edit(index)
    text = canonical(index)
    return b"".join(archive.pack([(programs.INDEX, text), *members.items()], sha256(text).hexdigest()))


def _weights(index: dict[str, Any]) -> dict[str, int]:
    return index["programs"][1]["weights"]


def _shortest_for_longest(index: dict[str, Any]) -> None:
    sizes = [w["size"] for w in index["weights"]]
    name = max(_weights(index), key=lambda n: sizes[_weights(index)[n]])
    _weights(index)[name] = sizes.index(min(sizes))


FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another version": (lambda i: i.update(programs_version=2), "the index of programs is not well formed"),
    "another field": (lambda i: i.update(more=1), "the index of programs is not well formed"),
    "a limit below zero": (lambda i: i.update(limit=-1), "the index of programs is not well formed"),
    "one program": (lambda i: i["programs"].pop(), "the index of programs is not well formed"),
    "a weight that is not there": (
        lambda i: _weights(i).update({next(iter(_weights(i))): len(i["weights"])}),
        "the index of programs is not well formed",
    ),
    "a member left out": (
        lambda i: i["weights"][-1].update(member="model/weights/x"),
        "the members are not those that the index of programs names",
    ),
    "another digest": (
        lambda i: i["weights"][0].update(sha256="0" * 64),
        "member model/weights/0 is not the one that the index names",
    ),
    "a name too few": (lambda i: _weights(i).popitem(), "the weights are not those that the code asks for"),
    "a weight cut short": (_shortest_for_longest, "is cut short"),
}


def refused(runner: Path, path: Path) -> str:
    """The one sentence with which Python's loader, its reader, the runner and the checker refuse a file."""
    with pytest.raises(ContractError) as caught:
        ca.load_decoder(path)
    with pytest.raises(ContractError) as checked:
        read(path)
    out = path.parent / "out"
    done = subprocess.run([runner, path, "--output-dir", out], capture_output=True, text=True, check=False)
    looked = subprocess.run([runner.with_name("check"), path], capture_output=True, text=True, check=False)
    said = {caught.value.what, checked.value.what, done.stderr.splitlines()[0][7:], looked.stdout.strip()}
    assert done.returncode == looked.returncode == 1 and len(said) == 1, said
    return said.pop()


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_index_is_refused_in_the_same_words(
    name: str, file: DecoderFile, runner: Path, tmp_path: Path
) -> None:
    edit, sentence = FORGED[name]
    path = tmp_path / "forged.pt2"
    path.write_bytes(resealed(file.path.read_bytes(), edit))
    assert sentence in refused(runner, path)


def test_flipped_and_missing_bytes_are_refused_in_the_same_words(
    file: DecoderFile, runner: Path, tmp_path: Path
) -> None:
    data, random = file.path.read_bytes(), Random(0)
    for at in [0, 31, 60, len(data) - 1, *(random.randrange(len(data)) for _ in range(4))]:
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        (tmp_path / "flipped.pt2").write_bytes(changed)
        with pytest.raises(ContractError):
            ca.load_decoder(tmp_path / "flipped.pt2")
        done = subprocess.run([runner.with_name("check"), tmp_path / "flipped.pt2"], capture_output=True, check=False)
        assert done.returncode == 1, at
    (tmp_path / "short.pt2").write_bytes(data[: len(data) // 2])
    assert refused(runner, tmp_path / "short.pt2") == "the artifact is cut short, or bytes follow its end"


def test_a_limit_is_kept_and_held_to(file: DecoderFile, runner: Path, tmp_path: Path) -> None:
    path = tmp_path / "limited.pt2"
    path.write_bytes(resealed(file.path.read_bytes(), lambda i: i.update(limit=10)))
    with pytest.raises(ContractError, match="would outgrow the cache"):
        ca.generate(ca.load_decoder(path), prompts((9,)), max_new_tokens=3)
    np.save(tmp_path / "tokens.npy", np.full((1, 9), 5))
    words = [runner, path, "--count", "3", "--input", f"tokens={tmp_path / 'tokens.npy'}", "--output-dir", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "would outgrow the cache\n  facts: 11 tokens" in done.stderr


def test_what_does_not_fit_is_refused_in_words(
    file: DecoderFile, eager: Decoder, loaded: Decoder, runner: Path, tmp_path: Path
) -> None:
    def refuses(sentence: str, call: Callable[[], Any]) -> None:
        with pytest.raises(CompiledAttnError, match=sentence):
            call()

    members, _ = archive.unpack(memoryview(file.path.read_bytes()), "")
    part = tmp_path / "step.pt2"
    part.write_bytes(members["model/step.pt2"])
    refuses("the file holds a decoder", lambda: ca.load(file.path))
    refuses("the file holds no decoder", lambda: ca.load_decoder(part))
    refuses("the artifact's weights are not in it", lambda: ca.load(part))
    refuses("loaded can not be exported again", lambda: ca.export(loaded, path=tmp_path / "x.pt2"))
    refuses("exported as it was made", lambda: ca.export(eager, (torch.zeros(1),), path=tmp_path / "x.pt2"))
    refuses("not built for a100 here", lambda: ca.export(eager, path=tmp_path / "x.pt2", target="a100"))
    done = subprocess.run([runner, part, "--output-dir", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "the artifact's weights are not in it" in done.stderr


def spoken(
    runner: Path,
    file: Path,
    tokens: np.ndarray,
    out: Path,
    count: int,
    state: Sequence[str] = (),
    options: Sequence[str] = (),
    heard: list[str] | None = None,
) -> np.ndarray:
    """What the C++ runner says behind the tokens [B, T], going on with a state if one is given.

    heard: takes the lines that it prints.
    """
    path = out.with_suffix(".npy")
    np.save(path, tokens)
    words = [str(runner), str(file), "--count", str(count), "--output-dir", str(out), *options]
    for given in (f"tokens={path}", *state):
        words += ["--input", given]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if heard is not None:
        heard += done.stdout.splitlines()
    return np.load(out / "tokens.npy")
