"""Pruned models by every road, with batches whose counts differ from those at capture: all equal the rule in PyTorch.

Small networks go in the ordinary run; stock models in their published size, bfloat16 and the rest are deep.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))

from prune_reference import pruned
from test_reorganize_tokens import stock, tensors, worst

import compiled_attn as ca
from compiled_attn.runtime.onnx import run_onnx

SMALL = {"mass": (0.9, 0.8), "at": (0, 1), "keep_at_most": 11}
WHOLE = {"mass": 0.9, "at": (3, 6, 9)}
MODELS = ("deit_small_patch16_224", "vit_base_patch16_224", "ViTModel", "Dinov2Model")
TABLES = ("eva02_tiny_patch14_224", "beit_base_patch16_224", "DINOv3ViTModel")
DYNAMIC = ({0: "batch"},)


def cases(*ordinary):
    small = [pytest.param(n, False, id=n, marks=[] if n in ordinary else pytest.mark.deep) for n in MODELS]
    return [*small, *(pytest.param(n, True, id=f"{n} in full", marks=pytest.mark.deep) for n in MODELS)]


def pictures(batch, side):
    """Pictures of different difficulty: some nearly empty."""
    return torch.randn(batch, 3, side, side) * torch.linspace(0.05, 2, batch).view(-1, 1, 1, 1)


def in_the_runner(runner, artifact, name, x, folder):
    np.save(folder / "x.npy", x.numpy())
    words = [runner, artifact, "--input", f"{name}={folder / 'x.npy'}", "--output-dir", folder / "out"]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.from_numpy(np.load(p)) for p in sorted((folder / "out").glob("*.npy"))]


@pytest.mark.parametrize(("name", "full"), cases("deit_small_patch16_224"))
def test_an_artifact_runs_batches_whose_counts_differ_in_python_and_in_cpp(name, full, runner, tmp_path):
    model, side = stock(name, full=full)
    options, path = WHOLE if full else SMALL, tmp_path / "model.pt2"
    passes = [ca.passes.PruneTokens(**options)]
    ca.export(model, (pictures(2, side),), path=path, dynamic_shapes=DYNAMIC, passes=passes, strict=True)
    run = ca.load(path)
    for batch in (1, 2, 5):
        x = pictures(batch, side)
        with torch.no_grad():
            want, masks = pruned(model, x, **options)
        assert batch == 1 or len({*masks[-1].sum(1).tolist()}) > 1
        assert worst(tensors(run(x)), want) < 2e-5
    name = "pixel_values" if name.endswith("Model") else "x"
    found = in_the_runner(runner, path, name, x, tmp_path)
    for wanted in want:
        assert min(worst([f], [wanted]) for f in found if f.shape == wanted.shape) < 2e-5


@pytest.mark.parametrize(("name", "full"), cases("Dinov2Model"))
def test_an_onnx_file_runs_batches_whose_counts_differ(name, full, tmp_path):
    pytest.importorskip("onnxruntime")
    model, side = stock(name, full=full)
    options, path = WHOLE if full else SMALL, tmp_path / "model.onnx"
    passes = [ca.passes.PruneTokens(**options)]
    ca.export(model, (pictures(2, side),), path=path, dynamic_shapes=DYNAMIC, passes=passes)
    for batch in (1, 5):
        x = pictures(batch, side)
        with torch.no_grad():
            want, _ = pruned(model, x, **options)
        assert worst(list(run_onnx(path, {"x": x, "pixel_values": x}).values()), want) < 1e-4


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.deep) for n in TABLES[1:]] + [TABLES[0]])
def test_biases_by_pairs_and_rotary_tables_are_compiled_for_the_tokens_that_are_left(name):
    model, side = stock(name)
    passes = [ca.passes.PruneTokens(**SMALL)]
    given = {"example_inputs": (pictures(2, side),), "dynamic_shapes": DYNAMIC, "passes": passes}
    fast = ca.compile(model, **given, strict=True)
    for batch in (1, 5):
        x = pictures(batch, side)
        with torch.no_grad():
            assert worst(tensors(fast(x)), pruned(model, x, **SMALL)[0]) < 2e-5


@pytest.mark.parametrize("name", ["deit_small_patch16_224", pytest.param(TABLES[0], marks=pytest.mark.deep)])
def test_a_pruned_model_is_built_for_a_gpu_that_is_not_here(name, tmp_path):
    pytest.importorskip("triton")
    model, side = stock(name)
    given = {"dynamic_shapes": DYNAMIC, "passes": [ca.passes.PruneTokens(**SMALL)], "target": "a100"}
    ca.export(model, (pictures(2, side),), path=tmp_path / "model.pt2", strict=True, **given)
    with zipfile.ZipFile(tmp_path / "model.pt2") as parts:
        assert any(b"ragged_attention" in parts.read(name) for name in parts.namelist() if name.endswith(".cpp"))


@pytest.mark.deep
def test_bfloat16_prunes_as_the_same_program_does_in_eager_mode():
    model, side = stock("deit_small_patch16_224")
    passes = [ca.passes.PruneTokens(**SMALL)]
    given = {"example_inputs": (pictures(2, side),), "dynamic_shapes": DYNAMIC, "passes": passes, "precision": "bf16"}
    fast = ca.compile(model, **given, strict=True)
    x = pictures(4, side)
    with torch.no_grad():
        assert worst([fast(x)], [fast.programs[0](x)]) < 4e-2
