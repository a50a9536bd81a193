"""The laws of the zoo, asked of every paper: a new paper is tested by standing in `zoo.PAPERS`."""

import importlib
import inspect

import pytest
import torch
from goldens import golden
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compiled_attn import zoo

ROWS = [(name, variant) for name, paper in zoo.PAPERS.items() for variant in paper.published]
CASES = [(name, case) for name in zoo.PAPERS for case in golden.names(name)]


@pytest.fixture(params=zoo.PAPERS)
def paper(request: pytest.FixtureRequest) -> zoo.Paper:
    return zoo.PAPERS[request.param]


def tiny(paper: zoo.Paper) -> nn.Module:
    torch.manual_seed(0)
    return paper.model(paper.tiny).eval()


def pictures(config: object, batch: int, seed: int = 1) -> Tensor:
    shape = (batch, config.in_chans, config.img_size, config.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "case"), CASES, ids=[case for _, case in CASES])
def test_the_reference_s_outputs_are_reproduced_within_the_case_s_tolerance(name: str, case: str) -> None:
    record = golden.load(case)
    with torch.no_grad():
        outputs = importlib.import_module(f"goldens.{name}").run(record.spec, record.weights, record.inputs)
    differences = record.differences(outputs)
    assert max(differences.values()) <= record.spec["tolerance"], differences


@pytest.mark.parametrize(("name", "variant"), ROWS, ids=[f"{name}-{variant}" for name, variant in ROWS])
def test_parameters_and_multiply_accumulates_are_those_that_the_table_gives(name: str, variant: str) -> None:
    """The measured column counts five operations for each element that a LayerNorm reads, FlopCounterMode none."""
    paper, row = zoo.PAPERS[name], zoo.PAPERS[name].published[variant]
    config, normed = paper.variants[variant], []
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = paper.model(config).eval()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(lambda _module, given, _out: normed.append(given[0].numel()))
        model(torch.empty(1, config.in_chans, config.img_size, config.img_size))
    assert sum(parameter.numel() for parameter in model.parameters()) == row.parameters
    counted = counter.get_total_flops() / 2e9 + 5 * sum(normed) / 1e9
    if row.stated_gmacs is not None:
        assert round(counted, 1) == row.stated_gmacs
    if row.gmacs is not None:
        assert counted == pytest.approx(row.gmacs, rel=1e-3)


def test_every_published_row_and_every_weights_file_belongs_to_a_variant(paper: zoo.Paper) -> None:
    assert paper.published.keys() <= paper.variants.keys()
    assert paper.weights.keys() <= paper.variants.keys()


def test_symbolic_trace_gives_a_graph_with_the_same_numbers(paper: zoo.Paper) -> None:
    model, x = tiny(paper), pictures(paper.tiny, 2)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x), rtol=1e-5, atol=1e-6)


def test_an_export_with_dynamic_batch_equals_eager_at_other_batches(paper: zoo.Paper) -> None:
    model = tiny(paper)
    first = next(iter(inspect.signature(model.forward).parameters))
    shapes = {first: {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(model, (pictures(paper.tiny, 3),), dynamic_shapes=shapes, strict=False).module()
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = pictures(paper.tiny, batch, seed=batch)
            torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-6)


def test_every_parameter_gets_a_finite_gradient_that_is_not_all_zero(paper: zoo.Paper) -> None:
    model = tiny(paper)
    model(pictures(paper.tiny, 2)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_answer_for_a_picture_does_not_depend_on_its_batch(paper: zoo.Paper) -> None:
    model, x = tiny(paper), pictures(paper.tiny, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-5, atol=1e-6)


def test_a_state_dict_loads_back_key_for_key(paper: zoo.Paper) -> None:
    model, other = tiny(paper), paper.model(paper.tiny).eval()
    report = zoo.load_checkpoint(other, {"model": model.state_dict()})
    assert report.complete
    assert set(report.loaded) == set(model.state_dict())
    x = pictures(paper.tiny, 2)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))
