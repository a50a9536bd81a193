"""Where the time of our own code goes, by class of op, from a build whose kernels announce themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.peers import Runner
from compiled_attn.ir import _torch

# The first class one of whose words is in a kernel's name; names are Inductor's, which list the ops fused in a kernel.
CLASSES = (
    ("linear", ("linear_pointwise", "addmm", "mm_out", "_mm", "mkl_linear", "packed_linear")),
    ("convolution", ("convolution_pointwise", "convolution_out")),
    ("attention", ("scaled_dot_product", "flash_attention", "class_row", "cattn", "attention")),
    ("tokens", ("select_tokens",)),
    ("layernorm", ("layer_norm",)),
)


def class_of(kernel: str) -> str:
    name = kernel.lower()
    fused = "cpp_fused" in name  # Inductor's own loops: what they compute, not what they read
    for label, words in CLASSES:
        if fused and label in ("linear", "convolution", "attention", "tokens"):
            continue
        if any(word in name for word in words):
            return label
    return "other"


def by_class(prepare: Callable[[], Runner], calls: int = 20) -> dict[str, float]:
    """Class -> milliseconds of one call, counted in the kernels; "between" is what lies outside of them."""
    with _torch.inductor_options({"cpp.enable_kernel_profile": True}):
        runner = prepare()
    for _ in range(3):
        runner.call()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as seen, torch.profiler.record_function("whole"):
        for _ in range(calls):
            runner.call()
    return totals([(e.key, e.self_cpu_time_total, e.cpu_time_total) for e in seen.key_averages()], calls)


def totals(events: list[tuple[str, float, float]], calls: int) -> dict[str, float]:
    """events: (name, microseconds of its own, microseconds with all inside)."""
    found: dict[str, float] = {}
    whole = next(inside for name, _, inside in events if name == "whole")
    for name, _, inside in events:
        if "cpp_" in name or name.startswith("aoti_torch_"):
            label = class_of(name)
            found[label] = found.get(label, 0.0) + inside / calls / 1e3
    found["between"] = whole / calls / 1e3 - sum(found.values())
    return {label: round(ms, 4) for label, ms in sorted(found.items(), key=lambda item: -item[1])}
