"""One model by every road: compiled, an artifact in Python and in C++, ONNX; all give eager's numbers.

The small network goes in the ordinary run; DeiT-S, in both precisions and both kinds of batch, is deep.
"""

import subprocess

import numpy as np
import pytest
import torch
from gaps import gap
from torch import nn

import compiled_attn as ca
from compiled_attn.ir.errors import PassError
from compiled_attn.runtime.onnx import run_onnx

TOLERANCE = {None: 1e-5, "bf16": 4e-2}  # of the largest logit


def model_of(name) -> tuple[nn.Module, tuple[int, ...]]:
    if name == "deit_s":
        return ca.zoo.create("deit", "deit_s"), (3, 224, 224)
    return ca.zoo.create("deit", "digits_tiny", pretrained=True), (1, 48, 48)


def close(found, want, tolerance):
    assert found.shape == want.shape and found.dtype == want.dtype
    assert ((found - want).abs().max() / want.abs().max()).item() < tolerance


def in_the_runner(runner, artifact, x, folder):
    np.save(folder / "x.npy", x.numpy())
    words = [runner, artifact, "--input", f"x={folder / 'x.npy'}", "--output-dir", folder / "out"]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (written,) = sorted((folder / "out").glob("*.npy"))
    return torch.from_numpy(np.load(written))


CASES = [
    pytest.param("digits", None, True, 4, 0.7),
    *[
        pytest.param("deit_s", precision, dynamic, batch, keep, marks=pytest.mark.deep)
        for precision in (None, "bf16")
        for dynamic, batch in ((True, 8), (False, 1), (False, 8))
        for keep in (1.0, 0.7)
    ],
]


@pytest.mark.parametrize("name, precision, dynamic, batch, keep", CASES)
def test_an_artifact_gives_eagers_numbers_in_python_and_in_cpp(name, precision, dynamic, batch, keep, runner, tmp_path):
    model, shape = model_of(name)
    passes = [ca.passes.ReorganizeTokens(keep_rate=keep)] if keep < 1 else []
    shapes = ({0: "batch"},) if dynamic else None
    path = tmp_path / "model.pt2"
    x = torch.randn(batch, *shape)
    ca.export(model, (x,), path=path, dynamic_shapes=shapes, precision=precision, passes=passes, strict=True)
    run = ca.load(path)
    for size in (1, 3, batch) if dynamic else (batch,):
        x = torch.randn(size, *shape)
        with torch.no_grad():
            want = eager(model, x, precision, passes)
            close(run(x), want, TOLERANCE[precision])
    close(in_the_runner(runner, path, x, tmp_path), want, TOLERANCE[precision])


def eager(model, x, precision, passes):
    """The model in eager mode in the same precision; with passes, the captured program run op by op."""
    if not passes:
        return model(x) if precision is None else _half(model)(x.bfloat16()).float()
    from compiled_attn.runtime.build import Settings, prepare

    return prepare(model, (x,), None, Settings.of("cpu", passes=passes, precision=precision)).program(x)


def _half(model):
    import copy

    return copy.deepcopy(model).bfloat16()


@pytest.mark.parametrize(
    "name, dynamic, keep",
    [
        ("digits", True, 0.7),
        pytest.param("deit_s", True, 1.0, marks=pytest.mark.deep),
        pytest.param("deit_s", False, 1.0, marks=pytest.mark.deep),
        pytest.param("deit_s", True, 0.7, marks=pytest.mark.deep),
    ],
)
def test_an_onnx_file_gives_eagers_numbers_in_onnx_runtime(name, dynamic, keep, tmp_path):
    pytest.importorskip("onnxruntime")
    model, shape = model_of(name)
    passes = [ca.passes.ReorganizeTokens(keep_rate=keep)] if keep < 1 else []
    path = tmp_path / "model.onnx"
    x = torch.randn(2, *shape)
    ca.export(model, (x,), path=path, dynamic_shapes=({0: "batch"},) if dynamic else None, passes=passes)
    for size in (1, 5) if dynamic else (2,):
        x = torch.randn(size, *shape)
        with torch.no_grad():
            (found,) = run_onnx(path, {"x": x}).values()
            close(found, eager(model, x, None, passes), 1e-4)


@gap("onnx-bf16")
def test_bf16_runs_in_onnx_runtime(tmp_path):
    model, shape = model_of("digits")
    ca.export(model, (torch.randn(1, *shape),), path=tmp_path / "m.onnx", precision="bf16")


def test_a_low_precision_for_onnx_is_refused_in_words(tmp_path):
    model, shape = model_of("digits")
    with pytest.raises(PassError, match="ONNX"):
        ca.export(model, (torch.randn(1, *shape),), path=tmp_path / "m.onnx", precision="bf16")
