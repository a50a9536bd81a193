"""A decoder exported with its eviction: two artifacts over one explicit state say what the eager programs say."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import decoders
import numpy as np
import pytest
import torch
from decoders import VOCABULARY

import compiled_attn as ca
from compiled_attn.passes.evict_kv import EvictKV
from compiled_attn.passes.evict_policies import HeavyHitters
from compiled_attn.runtime.generate import Decoder, export_decoder, load_decoder

BUDGET, CHUNK, STEPS = 12, 8, 200
ITEM = EvictKV(HeavyHitters(recent=6), BUDGET, positions="positions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("decoder")
    export_decoder(decoders.stock("llama"), found, item=ITEM, chunk=CHUNK)
    return found


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Decoder:
    return load_decoder(folder)


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (n,), generator=random).tolist() for n in lengths]


def test_the_artifacts_say_the_tokens_that_the_eager_programs_say(loaded: Decoder) -> None:
    eager = ca.decoder(decoders.stock("llama"), policy=ITEM.policy, budget=BUDGET, chunk=CHUNK)
    texts = prompts((19, 5))
    found, wanted = (ca.generate(d, texts, max_new_tokens=STEPS) for d in (loaded, eager))
    assert found.tokens == wanted.tokens
    assert found.conversation.kept(1) == wanted.conversation.kept(1)
    assert found.conversation.lengths == [19 + STEPS - 1, 5 + STEPS - 1]


def test_two_conversations_over_one_artifact_do_not_mix(loaded: Decoder) -> None:
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


def test_the_runner_without_python_says_the_same_and_its_state_can_be_gone_on_with(
    folder: Path, loaded: Decoder, runner: Path, tmp_path: Path
) -> None:
    texts = prompts((19, 5))
    wanted = ca.generate(loaded, texts, max_new_tokens=STEPS).tokens
    filled = np.full((2, 19), -1)
    for row, text in zip(filled, texts, strict=True):
        row[19 - len(text) :] = text
    first, rest = spoken(runner, folder, filled, tmp_path / "first", 60), STEPS - 60
    state = [f"{p.stem}={p}" for p in (tmp_path / "first").iterdir() if p.stem != "tokens"]
    then = spoken(runner, folder, first[:, -1:], tmp_path / "then", rest, state)
    assert np.concatenate([first, then], 1).tolist() == wanted


def spoken(
    runner: Path, folder: Path, tokens: np.ndarray, out: Path, count: int, state: Sequence[str] = ()
) -> np.ndarray:
    """What the C++ runner says behind the tokens [B, T], going on with a state if one is given."""
    path = out.with_suffix(".npy")
    np.save(path, tokens)
    words = [str(runner), str(folder / "prompt.pt2"), "--step", str(folder / "step.pt2"), "--count", str(count)]
    words += ["--output-dir", str(out)]
    for given in (f"tokens={path}", *state):
        words += ["--input", given]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(out / "tokens.npy")
