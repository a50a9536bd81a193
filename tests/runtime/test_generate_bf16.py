"""Decoders in bfloat16, exported: logits within the type's rounding of float32, and the tokens of the runner."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import laws
import numpy as np
import pytest
import torch
import torchvision_shim  # noqa: F401  (before transformers)
from passes import evict_reference as plain
from passes.test_evict_bf16 import NARROW, decoder, stock
from runtime.test_generate_exported import prompts, spoken

import compiled_attn as ca
from compiled_attn.passes.evict_policies import HeavyHitters

BUDGET, STEPS = 12, 30


@pytest.mark.deep
@pytest.mark.parametrize("name", ["llama", "sinklora"])
def test_an_exported_decoder_in_bfloat16_answers_as_float32_does_over_what_it_kept(
    name: str, runner: Path, tmp_path: Path
) -> None:
    made = ca.decoder(decoder(name, torch.bfloat16), policy=HeavyHitters(recent=6), budget=BUDGET, chunk=19)
    file = ca.export(made, path=tmp_path / f"{name}.pt2", target="cpu")
    loaded = ca.load_decoder(file.path)
    (text,) = prompts((19,))
    said = ca.generate(loaded, [text], max_new_tokens=STEPS).tokens[0]
    assert spoken(runner, file.path, np.array([text]), tmp_path / "out", STEPS).tolist() == [said]

    talk = loaded.fresh(1)
    whole = copy.deepcopy(stock()).float()
    wide = plain.Reference(whole, [plain.told(partial(talk.kept, i)) for i in range(2)])
    tokens = torch.tensor([text + said])
    for chunk in tokens.split([19, *[1] * STEPS], 1):
        begin = talk.lengths[0]
        positions = torch.arange(begin, begin + chunk.shape[1])[None]
        run = loaded.prompt if chunk.shape[1] > 1 else loaded.step
        logits = run(chunk.contiguous(), positions, talk.state, slots=talk.slots)
        talk.lengths = [begin + chunk.shape[1]]
        laws.near(logits, wide.logits(chunk)[:, -1:], NARROW)
    newest = range(19 + STEPS - 6, 19 + STEPS)
    assert all(len(set(head)) == BUDGET and set(newest) <= set(head) for i in range(2) for head in talk.kept(i)[0])
