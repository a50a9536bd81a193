"""ONNX files: names and dimensions kept, vocabulary ops decomposed, ONNX Runtime equal to eager."""

import importlib.util

import pytest
import torch
from small_nets import Net, pictures, worst
from torch import nn

from compiled_attn.ir.errors import LowerError
from compiled_attn.runtime import onnx as ours
from compiled_attn.runtime.capture import capture
from compiled_attn.runtime.onnx import OnnxFile, export_onnx, run_onnx

TOLERANCE = 1e-5  # float32, of the largest value
BATCH = {"x": {0: "batch"}}


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> tuple[Net, OnnxFile]:
    torch.manual_seed(0)
    model = Net().eval()
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    return model, export_onnx(model, (pictures(2),), path=path, dynamic_shapes=BATCH, check=True)


def test_inputs_outputs_and_dimensions_keep_their_names(net):
    _, file = net
    assert file.inputs == {"x": ("batch", 3, 16, 16)}
    assert file.outputs == {"logits": ("batch", 5), "tokens": ("batch", 16, 16)}
    assert file.error is not None
    assert file.error < TOLERANCE


@pytest.mark.parametrize("batch", [1, 5])
def test_onnx_runtime_equals_eager_at_another_batch(net, batch):
    model, file = net
    x = pictures(batch)
    found = run_onnx(file.path, {"x": x})
    with torch.no_grad():
        expected = model(x)
    assert worst(found["logits"], expected["logits"]) < TOLERANCE
    assert worst(found["tokens"], expected["tokens"]) < TOLERANCE


def test_the_file_says_what_it_holds(net):
    _, file = net
    text = str(file)
    assert "input    x" in text
    assert "'batch', 5" in text
    assert "ONNX Runtime" in text


def test_opset_23_holds_attention_as_one_op(tmp_path):
    import onnx

    model = Net().eval()
    file = export_onnx(model, (pictures(2),), path=tmp_path / "net.onnx", opset=23)
    kinds = [node.op_type for node in onnx.load(file.path).graph.node]
    assert kinds.count("Attention") == 1
    assert "Softmax" not in kinds


def test_a_program_is_exported_as_it_stands(tmp_path):
    program = capture(nn.Linear(4, 2).eval(), (torch.randn(3, 4),))
    file = export_onnx(program, path=tmp_path / "linear.onnx", check=True)
    assert file.inputs == {"input": (3, 4)}


class Spectrum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(x)


def test_an_op_with_no_onnx_form_is_named(tmp_path):
    with pytest.raises(LowerError, match="svd"):
        export_onnx(Spectrum(), (torch.randn(3, 3),), path=tmp_path / "no.onnx")


def test_a_missing_package_says_how_to_get_it(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda n, *a: None if n == "onnxscript" else real(n, *a))
    with pytest.raises(LowerError, match=r"onnxscript[\s\S]*pip install 'compiled-attn\[onnx\]'"):
        export_onnx(nn.Linear(2, 2), (torch.randn(1, 2),), path=tmp_path / "no.onnx")


@pytest.mark.deep
@pytest.mark.parametrize(("paper", "variant"), [("deit", "deit_s"), ("evit", "evit_s_k07_fuse")])
def test_a_published_model_with_dynamic_batch_equals_eager(paper, variant, tmp_path):
    from compiled_attn import zoo

    model = zoo.create(paper, variant)
    x = torch.randn(2, 3, 224, 224)
    file = export_onnx(model, (x,), path=tmp_path / "m.onnx", dynamic_shapes=BATCH, check=True, tolerance=1e-4)
    x = torch.randn(3, 3, 224, 224)
    with torch.no_grad():
        assert worst(run_onnx(file.path, {"x": x})["output"], model(x)) < 1e-4
