"""The CUDA code of every op and paper, stock models and two passes gives eager's numbers on an emulated device.

A new op or paper is a case by standing in `ops.OPS` or `zoo.PAPERS`; one that can not be has an entry in gaps.GAPS, as
`emulated <case>` or `emulated <case> <static or dynamic>`; a case may be one call of an op: `op <op>: <name of its
inputs>`. float32; bfloat16 and every candidate of an autotuned kernel are deep.
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import laws
import pytest
from cross import emulate_cases, emulation
from gaps import GAPS, gap

pytest.importorskip("triton")

DYNAMIC, STATIC = ("a100", "dynamic"), ("h100", "static")
PAIRS = (DYNAMIC, STATIC, ("a100", "static"), ("h100", "dynamic"))
GAP = emulate_cases.GAP
TRAIN = "train "  # of a batch of fixed size, on one target
TRAINED = ("train outlook attention", "train local_attention", "train attention_with_class_row")  # the others are deep
HEAVY = ("paper spartan", "paper volo", "paper vsa")  # a minute or more each
SLOW = ("op local_attention", "op neighborhood_apply")  # one to three minutes of the interpreter each


def ordinary(name: str, pair: tuple[str, str]) -> bool:
    """Ops are asked on both targets, slow ones and half of the models on one, a part of training; the rest is deep."""
    if name.startswith(TRAIN):
        return name in TRAINED
    if name.startswith("op "):
        return pair == DYNAMIC or (pair == STATIC and not name.startswith(SLOW))
    return name not in HEAVY and pair == {0: DYNAMIC, 1: STATIC}.get(zlib.crc32(name.encode()) % 4)


def cases() -> list[object]:
    found = []
    for pair in PAIRS:
        for name in emulate_cases.NAMES:
            if name.startswith(TRAIN) and pair != STATIC:
                continue
            keys = [key for key in (f"{GAP}{name}", f"{GAP}{name} {pair[1]}") if key in GAPS]
            marks = [gap(key) for key in keys] + ([] if ordinary(name, pair) else [pytest.mark.deep])
            found.append(pytest.param(name, pair, marks=marks, id=f"{name}-{'-'.join(pair)}"))
    return found


@pytest.fixture(scope="module")
def outcome(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, tuple[str, str]], emulation.Emulated]:
    """The outcome of a case for a target and a kind of batch; those that this run asks for share their processes."""
    folders: dict[tuple[str, str], Path] = {}

    def of(name: str, pair: tuple[str, str]) -> emulation.Emulated:
        if pair not in folders:
            asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            names = {p["name"] for p in asked if p.get("pair") == pair}
            folders[pair] = tmp_path_factory.mktemp("-".join(pair))
            target, batch = pair
            emulation.generate(folders[pair], sorted(names), target, dynamic=batch == "dynamic")
            emulation.interpret(folders[pair])
        return emulation.read(folders[pair], name)

    return of


@pytest.mark.parametrize(("name", "pair"), cases())
def test_the_code_for_a_gpu_gives_eagers_numbers_and_holds_the_chosen_templates(name, pair, outcome):
    found = outcome(name, pair)
    laws.emulated_code_equals_eager(found)
    laws.emulated_code_holds_its_templates(found)


def test_every_gap_names_a_case():
    for key in GAPS:
        if key.startswith(GAP):
            assert re.sub(" (static|dynamic)$", "", key.removeprefix(GAP)) in emulate_cases.NAMES


@pytest.mark.deep
@pytest.mark.parametrize("target", ["a100", "h100"])
def test_every_candidate_of_every_kernel_gives_the_same_numbers(target, tmp_path):
    names = [n for n in emulate_cases.NAMES if not n.startswith("timm") and f"{GAP}{n}" not in GAPS]
    emulation.generate(tmp_path, names, target)
    emulation.interpret(tmp_path, every=True)
    for name in names:
        laws.emulated_code_equals_eager(emulation.read(tmp_path, name))


@pytest.mark.deep
@pytest.mark.parametrize("target", ["a100", "h100"])
def test_bfloat16_stays_within_its_rounding(target, tmp_path):
    names = ["paper deit", "paper evit"]
    emulation.generate(tmp_path, names, target, dynamic=True, precision="bf16")
    emulation.interpret(tmp_path)
    for name in names:
        laws.emulated_code_equals_eager(emulation.read(tmp_path, name), tolerance=4e-2)


# what is done to the generated code of attention_with_class_row -> the text and what takes its place
FAULTS: dict[str, tuple[str, str]] = {
    "a wrong scale in the template": (r"\* scale2\b", "* (scale2 * 1.001)"),
    "an epilogue that does nothing": (r"\((tmp\d+) / tmp\d+\)", r"\1"),
    "an epilogue that is left out": (r"\n *triton_poi_fused_silu_\w+\.run\(.*", "\n            pass"),
    "a kernel that is left out": (r"\n *class_row_mean_\d+\.run\(.*", "\n            pass"),
    "a store without its mask": (r"(tl\.store\(out_ptrs, .*), mask=.*\)", r"\1)"),
    "a load without its mask": (r"(k = tl\.load\(k_ptrs), mask=.*?, other=0\.0\)", r"\1)"),
    "one program too few": (r"(\n *attention_\d+\.run\(.*), (\d+), 1, 1, stream", r"\1, \2 - 1, 1, 1, stream"),
    "a grid of one program": (r"(\n *class_row_logits_\d+\.run\(.*), (\d+), 1, 1, stream", r"\1, 1, 1, 1, stream"),
    "a size that the kernel was not compiled for": (r"('constants': \{[^}]*)'stride_kd': 1", r"\1'stride_kd': 2"),
}


def holds(case: emulation.Emulated) -> bool:
    try:
        laws.emulated_code_equals_eager(case)
    except AssertionError:
        return False
    return True


def test_a_fault_in_the_generated_code_is_caught(tmp_path):
    name = "op attention_with_class_row"
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    emulation.generate(right, [name], "h100")
    code = (right / name / "code.py").read_text()
    for fault, (text, instead) in FAULTS.items():
        shutil.copytree(right / name, wrong / fault)
        broken, count = re.subn(text, instead, code)
        assert count, fault
        (wrong / fault / "code.py").write_text(broken)
    shutil.copytree(right / name, wrong / "none")
    emulation.interpret(wrong)
    sound = emulation.read(wrong, "none")
    laws.emulated_code_equals_eager(sound)
    slipped = [fault for fault in FAULTS if holds(emulation.read(wrong, fault))]
    assert not slipped
    with pytest.raises(AssertionError, match="class_row_mean"):
        kernels = {k: v for k, v in sound.kernels.items() if k != "class_row_mean"}
        laws.emulated_code_holds_its_templates(replace(sound, kernels=kernels))
