"""Targets: every row holds together, this machine is read, and a wrong or absent target says so in four parts."""

from dataclasses import replace

import pytest
import torch

from compiled_attn.ir import machine, targets
from compiled_attn.ir.errors import TargetError
from compiled_attn.ir.machine import Gpu

HERE = machine.here()


@pytest.mark.parametrize("name", targets.names())
def test_each_row_states_its_figures_and_their_source(name):
    target = targets.load(name)
    assert target.name == name
    assert len(target.source) > 20
    low, high = targets.RIDGE_FLOP_PER_BYTE
    assert low <= target.ridge_flop_per_byte <= high or target.ridge_because
    assert target.flops_per_second(torch.bfloat16) >= target.flops_per_second() * 0.99


def test_the_ridge_points_of_known_devices():
    ridges = {name: round(targets.load(name).ridge_flop_per_byte) for name in ("a100", "h100", "h200", "t4", "zen5")}
    assert ridges == {"a100": 153, "h100": 295, "h200": 206, "t4": 203, "zen5": 55}


def test_a_figure_off_by_a_thousand_is_refused():
    with pytest.raises(TargetError) as error:
        replace(targets.load("a100"), memory_gb_per_s=2.039)
    assert "153016.2 flop/byte" in error.value.facts
    assert error.value.where == "targets.toml, table [a100]"


def test_a_low_ridge_point_passes_where_the_row_says_why():
    row = targets.load("aarch64")
    assert row.ridge_flop_per_byte < 20
    with pytest.raises(TargetError, match="does not describe a device"):
        replace(row, ridge_because="")


def test_a_missing_figure_is_named():
    with pytest.raises(TargetError) as error:
        replace(targets.load("h100"), shared_bytes_per_block=0)
    assert "shared_bytes_per_block" in error.value.facts


def test_an_unknown_target_is_answered_with_the_names():
    with pytest.raises(TargetError) as error:
        targets.load("b52")
    assert "'b52'" in error.value.what
    assert all(name in error.value.facts for name in targets.names())
    assert error.value.do


def test_auto_reads_this_machine():
    target = targets.load("auto")
    if HERE.gpus:
        assert target.sm == HERE.gpus[0].sm
    else:
        assert (target.kind, target.arch, target.cores) == ("cpu", HERE.arch, HERE.cores)
        assert HERE.model in target.source
    targets.require_here(target)
    targets.require_here(targets.load("cpu"))


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "row"),
    [
        ("GenuineIntel", 6, "sse4_2 ssse3 popcnt", "x86-64-v2"),
        ("GenuineIntel", 6, "avx2 fma f16c bmi2", "x86-64-v3"),
        ("GenuineIntel", 6, "avx2 fma f16c bmi2 avx512f avx512bw avx512cd avx512dq avx512vl", "x86-64-v4"),
        ("GenuineIntel", 6, "avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16 amx_tile amx_bf16", "spr"),
        ("AuthenticAMD", 25, "avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16", "zen4"),
        ("AuthenticAMD", 26, "avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16", "zen5"),
    ],
)
def test_a_processor_is_known_by_its_flags(vendor, family, flags, row):
    found = replace(HERE, system="Linux", arch="x86_64", vendor=vendor, family=family, flags=frozenset(flags.split()))
    assert targets.cpu_of(found).name == row


@pytest.mark.parametrize(
    ("system", "flags", "row"),
    [("Linux", "asimd sve bf16", "graviton3"), ("Linux", "asimd", "aarch64"), ("Darwin", "asimd", "apple-m1")],
)
def test_an_arm_processor_is_known_by_its_system_and_flags(system, flags, row):
    assert targets.cpu_of(replace(HERE, system=system, arch="aarch64", flags=frozenset(flags.split()))).name == row


@pytest.mark.parametrize(
    ("name", "sm", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", 80, "a100"),
        ("NVIDIA A10", 86, "a10"),
        ("NVIDIA H200", 90, "h200"),
        ("NVIDIA GeForce RTX 4090", 89, "rtx4090"),
        ("NVIDIA GeForce RTX 3090", 86, "a10"),
    ],
)
def test_a_gpu_is_known_by_its_name_or_its_compute_capability(name, sm, row):
    target = targets.gpu_of(Gpu(name, sm, 82, 23.5))
    assert (target.name, target.multiprocessors, target.memory_gib) == (row, 82, 23.5)
    assert target.source.startswith("this GPU is") == (name == "NVIDIA GeForce RTX 3090")


def test_a_gpu_of_an_unknown_compute_capability_is_refused():
    with pytest.raises(TargetError, match=r"no row of targets\.toml describes Voodoo 2"):
        targets.gpu_of(Gpu("Voodoo 2", 10, 1, 0.01))


@pytest.mark.parametrize("name", ["a100", "h100"])
def test_a_target_that_is_not_at_hand_names_what_is_and_offers_export(name, monkeypatch):
    monkeypatch.setattr(machine, "here", lambda: replace(HERE, gpus=()))
    with pytest.raises(TargetError) as error:
        targets.require_here(targets.load(name))
    assert "no GPU" in error.value.facts
    assert HERE.model in error.value.facts
    assert f"export(..., target='{name}')" in error.value.do
    assert "explain" in error.value.do


def test_a_cpu_target_whose_instructions_are_missing_names_them(monkeypatch):
    monkeypatch.setattr(machine, "here", lambda: replace(HERE, arch="x86_64", flags=frozenset(("avx2", "fma"))))
    with pytest.raises(TargetError, match="x86-64-v3 needs f16c, bmi2"):
        targets.require_here(targets.load("x86-64-v3"))


def test_a_gpu_target_runs_on_a_gpu_of_its_compute_capability(monkeypatch):
    monkeypatch.setattr(machine, "here", lambda: replace(HERE, gpus=(Gpu("NVIDIA A100", 80, 108, 80.0),)))
    targets.require_here(targets.load("a100"))
    assert targets.load("auto").name == "a100"
    with pytest.raises(TargetError, match=r"compute capability 9\.0; here are NVIDIA A100"):
        targets.require_here(targets.load("h100"))
