"""The bench refuses to time wrong numbers, takes turns, and says where time goes; no model is compiled here."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
cases, peers, hotspots, report, roof, run, timing = (
    importlib.import_module(f"bench.{name}")
    for name in ("cases", "peers", "hotspots", "report", "roof", "run", "timing")
)

JOB = {"rounds": 2, "round_seconds": 0.001, "where": False, "costs": False}
SMALL = cases.Case("digits", 1)


@pytest.fixture
def tiny(monkeypatch):
    """A linear layer in place of the models, and three peers: a right one, a wrong one, and one that is not here."""
    model, x = nn.Linear(8, 4).eval(), torch.randn(2, 8)
    monkeypatch.setattr(run, "build", lambda _case: (model, x))

    def absent(*_):
        raise peers.NotHere("it is not installed")

    def right(_case, model, x, _folder):
        return peers.Runner(lambda: model(x), facts={"hint": "none"})

    def wrong(_case, model, x, _folder):
        return peers.Runner(lambda: model(x) + 1)

    def broken(*_):
        return peers.Runner(lambda: 1 / 0)

    found = {"eager": right, "wrong": wrong, "absent": absent, "broken": broken}
    monkeypatch.setattr(run, "PEERS", found)
    monkeypatch.setattr(run.roof, "measure", lambda precision: roof.Roof(precision, 1, 100.0, 100.0, 10.0))
    with torch.no_grad():
        return {r["peer"]: r for r in run.compare(SMALL, {**JOB, "peers": list(found)})}


def test_a_peer_with_wrong_numbers_gets_its_difference_and_no_time(tiny) -> None:
    assert "ms" in tiny["eager"] and tiny["eager"]["error"] == 0
    assert "ms" not in tiny["wrong"]
    assert tiny["wrong"]["because"] == "its numbers are wrong"
    line = next(x for x in report.table(list(tiny.values())).splitlines() if x.strip().startswith("wrong"))
    assert line.split()[1] == "-" and f"{tiny['wrong']['error']:.1e} > 1e-04" in line


def test_a_peer_that_can_not_run_says_why(tiny) -> None:
    assert tiny["absent"]["because"] == "it is not installed"
    assert tiny["broken"]["because"].startswith("ZeroDivisionError")
    assert "because it is not installed" in report.table(list(tiny.values()))


SLEEPER = """
import json, sys, time
job = json.loads(sys.argv[-1])
for peer in job["peers"]:
    print(json.dumps({"prepares": peer}), flush=True)
    time.sleep(60 if peer == "slow" else 0)
print(json.dumps({"prepares": None}), flush=True)
print(json.dumps([{**job["case"], "peer": peer, "ms": 1.0} for peer in job["peers"]]))
"""


def test_a_peer_that_is_not_ready_in_time_is_left_and_the_others_begin_again(monkeypatch) -> None:
    watched = run.watched
    monkeypatch.setattr(run, "watched", lambda command, *rest: watched(["-c", SLEEPER, command[-1]], *rest))
    options = run.parser().parse_args(["--limit", "1.5"])
    options.peers = ["eager", "slow", "ours"]
    records = {r["peer"]: r for r in run.in_process(SMALL, options)}
    assert records["slow"]["because"] == "it was not ready after 1.5 s" and "ms" not in records["slow"]
    assert records["eager"]["ms"] == records["ours"]["ms"] == 1.0
    assert list(records) == ["eager", "ours", "slow"]  # the first says what the table needs


def test_a_process_that_fails_says_how() -> None:
    assert "ZeroDivisionError" in run.watched(["-c", "1 / 0"], 1, 5.0)


def test_results_are_written_as_json_lines_table_and_plot(tiny, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = report.write(list(tiny.values()), tmp_path)
    assert [p.name for p in paths] == ["results.jsonl", "results.txt", "results.png"]
    records = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert [r["peer"] for r in records] == ["eager", "wrong", "absent", "broken"]
    assert records[0]["machine"]["torch"] == torch.__version__
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_peers_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timing.interleave(calls, rounds=3, round_seconds=0.0)
    turns = "".join(order[4:])  # the first calls count the repeats
    assert turns == "aabb" * 3


def test_a_slower_call_has_the_greater_median() -> None:
    small, large = torch.randn(8, 8), torch.randn(700, 700)
    times = timing.interleave({"small": lambda: small @ small, "large": lambda: large @ large}, rounds=3)
    assert times["large"].median > 10 * times["small"].median
    assert times["large"].low <= times["large"].median <= times["large"].high


@pytest.mark.parametrize(
    ("found", "wanted", "error"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 0.0),
        (torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), 0.25),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), float("inf")),
        (torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, 2.0]), float("inf")),
    ],
)
def test_difference_is_relative_and_infinite_for_what_is_no_answer(found, wanted, error) -> None:
    assert cases.difference(found, wanted) == error


@pytest.mark.parametrize(
    ("kernel", "label"),
    [
        ("aoti_torch_cpu__linear_pointwise_binary", "linear"),
        ("aoti_torch_cpu_bmm_out", "linear"),
        ("aoti_torch_cpu_addmm_out", "linear"),
        ("aoti_torch_cpu_mkldnn__convolution_pointwise", "convolution"),
        ("aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("graph_0_cpp_fused_add_native_layer_norm_transpose_view_2", "layernorm"),
        ("graph_0_cpp_fused_add_bmm_gelu_native_layer_norm_select_view_4", "layernorm"),
        ("graph_0_cpp_fused_add_attention_native_layer_norm_view_3", "attention"),
        ("graph_0_cpp_fused_native_layer_norm_packed_linear_view_6", "linear"),
        ("cpp_cpp_depthwise", "convolution"),
        ("cpp_cpp_neighborhood", "attention"),
        ("graph_0_cpp_fused_convolution_0", "other"),
    ],
)
def test_kernels_are_told_apart_by_what_they_compute(kernel: str, label: str) -> None:
    assert hotspots.class_of(kernel) == label


def test_time_outside_of_kernels_is_what_is_left() -> None:
    events = [
        ("whole", 5.0, 20000.0),
        ("aoti_torch_cpu__linear_pointwise", 1.0, 12000.0),
        ("graph_0_cpp_fused_native_layer_norm_1", 1.0, 4000.0),
        ("aten::empty", 1.0, 3000.0),
    ]
    assert hotspots.totals(events, 2) == {"linear": 6.0, "layernorm": 2.0, "between": 2.0}


def test_the_roof_is_positive_and_gives_times() -> None:
    found = roof.measure("float32", size=128, mebibytes=4, rounds=2)
    assert found.gflops > 0 and found.copy_gb_per_s > 0
    assert found.seconds(2e9) == pytest.approx(2 / found.gflops)


def test_flops_are_counted_and_models_are_the_same_each_time() -> None:
    one, x = cases.build(SMALL)
    two, y = cases.build(SMALL)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(x, y)
    assert cases.flops(nn.Linear(8, 4), torch.randn(3, 8)) == 2 * 3 * 8 * 4


def test_an_unknown_model_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match="unknown model 'nothing'"):
        cases.build(cases.Case("nothing", 1))
