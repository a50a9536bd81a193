"""The laws of the zoo, asked of every paper: a new paper is tested by standing in `zoo.PAPERS`."""

import importlib
from pathlib import Path

import pytest
import torch
from goldens import golden
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from zoo_cases import dynamic, inputs, same, tiny

from compiled_attn import zoo

ROWS = [(name, variant) for name, paper in zoo.PAPERS.items() for variant in paper.published]
CASES = [(name, case) for name in zoo.PAPERS for case in golden.names(name)]

PER_ELEMENT = {nn.LayerNorm: 5, nn.GroupNorm: 5, nn.BatchNorm2d: 2}  # as fvcore counts


@pytest.fixture(params=zoo.PAPERS)
def paper(request: pytest.FixtureRequest) -> zoo.Paper:
    return zoo.PAPERS[request.param]


@pytest.mark.parametrize(("name", "case"), CASES, ids=[case for _, case in CASES])
def test_the_reference_s_outputs_are_reproduced_within_the_case_s_tolerance(name: str, case: str) -> None:
    record = golden.load(case)
    with torch.no_grad():
        outputs = importlib.import_module(f"goldens.{name}").run(record.spec, record.weights, record.inputs)
    differences = record.differences(outputs)
    assert max(differences.values()) <= record.spec["tolerance"], differences


@pytest.mark.parametrize(("name", "variant"), ROWS, ids=[f"{name}-{variant}" for name, variant in ROWS])
def test_parameters_and_multiply_accumulates_are_those_that_the_table_gives(name: str, variant: str) -> None:
    """The measured column counts operations for each element that a norm reads, FlopCounterMode none."""
    paper, row = zoo.PAPERS[name], zoo.PAPERS[name].published[variant]
    config, normed = paper.variants[variant], []
    with torch.device("meta"):
        model = paper.model(config).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == row.parameters
    if row.gmacs is None and row.stated_gmacs is None:
        return
    for module in model.modules():
        for kind, operations in PER_ELEMENT.items():
            if isinstance(module, kind):
                module.register_forward_hook(
                    lambda _module, given, _out, operations=operations: normed.append(operations * given[0].numel())
                )
    args = [x.to("meta") for x in paper.inputs(config, 1, torch.Generator())]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    counted = counter.get_total_flops() / 2e9 + sum(normed) / 1e9
    if row.stated_gmacs is not None:
        assert round(counted, 1) == row.stated_gmacs
    if row.gmacs is not None:
        assert counted == pytest.approx(row.gmacs, rel=1e-3)


def test_every_published_row_and_every_weights_file_belongs_to_a_variant(paper: zoo.Paper) -> None:
    assert paper.published.keys() <= paper.variants.keys()
    assert paper.weights.keys() <= paper.variants.keys()


def test_symbolic_trace_gives_a_graph_with_the_same_numbers(paper: zoo.Paper) -> None:
    model, args = tiny(paper), inputs(paper, 2)
    with torch.no_grad():
        same(torch.fx.symbolic_trace(model)(*args), model(*args), 1e-5)


def test_an_export_with_dynamic_batch_equals_eager_at_other_batches(paper: zoo.Paper) -> None:
    model, args = tiny(paper), inputs(paper, 3)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {name: {0: batch} for name in dynamic(model, args)}
    exported = torch.export.export(model, args, dynamic_shapes=shapes, strict=False).module()
    with torch.no_grad():
        for size in (1, 2, 5):
            args = inputs(paper, size, seed=size)
            same(exported(*args), model(*args), 1e-5)


def test_every_parameter_gets_a_finite_gradient_that_is_not_all_zero(paper: zoo.Paper) -> None:
    model = tiny(paper)
    outputs = [x for x in pytree.tree_leaves(model(*inputs(paper, 2))) if x.requires_grad]
    sum(x.square().sum() for x in outputs).backward()
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(paper.idle)):  # nothing but rounding may reach it
            assert parameter.grad is None or parameter.grad.abs().max() < 1e-4, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_answer_for_a_picture_does_not_depend_on_its_batch(paper: zoo.Paper) -> None:
    model, args = tiny(paper), inputs(paper, 4)
    with torch.no_grad():
        wanted = pytree.tree_map(lambda x: x[2:3], model(*args))
        same(model(*(x[2:3] for x in args)), wanted, 1e-5)


def test_a_state_dict_loads_back_key_for_key(paper: zoo.Paper) -> None:
    model, other = tiny(paper), paper.model(paper.tiny).eval()
    report = zoo.load_checkpoint(other, {"model": model.state_dict()})
    assert report.complete
    assert set(report.loaded) == set(model.state_dict())
    args = inputs(paper, 2)
    with torch.no_grad():
        same(model(*args), other(*args), 0.0)


def test_onnx_runtime_equals_eager_with_dynamic_batch(paper: zoo.Paper, tmp_path: Path) -> None:
    onnx = pytest.importorskip("compiled_attn.runtime.onnx")
    pytest.importorskip("onnxruntime")
    model, args = tiny(paper), inputs(paper, 2)
    file = onnx.export_onnx(model, args, path=tmp_path / "model.onnx", dynamic_shapes=dynamic(model, args))
    assert {node.domain for node in importlib.import_module("onnx").load(file.path).graph.node} <= {"", "ai.onnx"}
    args = inputs(paper, 3, seed=3)
    with torch.no_grad():
        wanted = model(*args)
    found = onnx.run_onnx(file.path, dict(zip(file.inputs, args, strict=True)))
    same(list(found.values()), pytree.tree_leaves(wanted), 2e-5)
