"""The measurement service: timed once, kept by machine and circumstances, damaged files reported and replaced."""

import json
from pathlib import Path

import torch

from compiled_attn.runtime import measure
from compiled_attn.runtime.measure import Measurements, time_in_turn


def maker(log: list[str], name: str):
    def make():
        log.append(name)
        return lambda: None

    return make


def test_a_case_is_timed_once_and_then_read_from_disk_by_another_process(tmp_path: Path) -> None:
    log: list[str] = []
    candidates = {"a": maker(log, "a"), "b": maker(log, "b")}
    first = Measurements(tmp_path)
    taken = first({"n": 1}, candidates)
    assert log == ["a", "b"]
    assert Measurements(tmp_path)({"n": 1}, candidates) == taken
    assert log == ["a", "b"]
    assert first({"n": 2}, candidates).keys() == {"a", "b"}
    assert (first.hits, first.misses) == (0, 2)


def test_a_new_candidate_is_measured_with_the_old_ones(tmp_path: Path) -> None:
    service = Measurements(tmp_path)
    service({"n": 1}, {"a": maker([], "a")})
    log: list[str] = []
    assert service({"n": 1}, {"a": maker(log, "a"), "b": maker(log, "b")}).keys() == {"a", "b"}
    assert log == ["a", "b"]


def test_two_services_that_write_in_turn_lose_nothing(tmp_path: Path) -> None:
    one, two = Measurements(tmp_path), Measurements(tmp_path)
    one({"n": 1}, {"a": maker([], "a")})
    two({"n": 2}, {"a": maker([], "a")})
    one({"n": 3}, {"a": maker([], "a")})
    kept = json.loads(one.path.read_text())["seconds"]
    assert sorted(kept) == ['{"n": 1}', '{"n": 2}', '{"n": 3}']
    assert [p.name for p in tmp_path.iterdir()] == [one.path.name]


def test_another_thread_count_or_torch_is_another_file(tmp_path: Path, monkeypatch) -> None:
    service = Measurements(tmp_path)
    before = service.path
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert service.path != before
    monkeypatch.setattr(measure.torch, "__version__", "9.9")
    assert len({before, service.path}) == 2


def test_a_damaged_file_is_reported_and_written_anew(tmp_path: Path) -> None:
    service = Measurements(tmp_path)
    service.path.write_text('{"circumstances": 1, "sec')
    service({"n": 1}, {"a": maker([], "a")})
    assert "is not used and will be written anew" in service.problems[0]
    assert list(json.loads(service.path.read_text())["seconds"]) == ['{"n": 1}']


def test_a_folder_that_can_not_be_written_is_reported_and_the_answer_is_given(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    service = Measurements(blocked / "folder")
    assert service({"n": 1}, {"a": maker([], "a")}).keys() == {"a"}
    assert any("not kept" in p for p in service.problems)


def test_the_slower_call_is_seen_as_slower() -> None:
    small, large = torch.randn(16, 16), torch.randn(512, 512)
    times = time_in_turn({"small": lambda: small @ small, "large": lambda: large @ large}, rounds=3)
    assert times["large"] > 5 * times["small"] > 0


def test_the_folder_follows_the_xdg_variable(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measure.cache_folder() == tmp_path / "compiled_attn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert measure.cache_folder() == Path.home() / ".cache" / "compiled_attn"
