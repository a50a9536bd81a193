"""The small ViT that the package carries: its file, and its accuracy on pictures that it was not trained on."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from compiled_attn import zoo

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "compiled_attn" / "zoo" / "weights" / "digits_tiny.safetensors"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "bench" / "train_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_weights_are_half_precision_and_at_most_five_megabytes() -> None:
    assert WEIGHTS.stat().st_size <= 5_000_000
    assert {value.dtype for value in load_file(WEIGHTS).values()} == {torch.float16}


def test_no_held_out_picture_is_among_those_trained_on(recipe: ModuleType) -> None:
    x, y, held_x, held_y = recipe.pictures()
    assert (len(y), len(held_y)) == (1297, 500)
    assert x.shape[1:] == held_x.shape[1:] == (1, 48, 48)
    seen = {picture.numpy().tobytes() for picture in x}
    assert not any(picture.numpy().tobytes() in seen for picture in held_x)


@pytest.mark.parametrize(("keep_rate", "least"), [(1.0, 98.0), (0.7, 97.0), (0.5, 96.0)])
def test_held_out_accuracy_holds_as_patches_are_left_out(recipe: ModuleType, keep_rate: float, least: float) -> None:
    _, _, x, y = recipe.pictures()
    model = zoo.create("evit", "digits_tiny", pretrained=True)
    assert recipe.accuracy(model, x, y, keep_rate) >= least


def test_plain_deit_and_evit_carry_the_same_weights(recipe: ModuleType) -> None:
    _, _, x, _ = recipe.pictures()
    plain = zoo.create("deit", "digits_tiny", pretrained=True)
    shrinking = zoo.create("evit", "digits_tiny", pretrained=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(x[:4]), shrinking(x[:4], keep_rate=1.0), rtol=1e-4, atol=1e-4)
