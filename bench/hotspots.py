"""Where the time of our own code goes, by class of op, from a build whose kernels announce themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.peers import Runner
from compiled_attn.ir import _torch

# Names are Inductor's: a template's or a fused loop's lists the ops it came from. Ops of the vocabulary are templates;
# ATen's products and attention are calls of their own, and in a loop's name only say what it reads.
TEMPLATES = (
    ("linear", ("packed_linear", "cpp_gemm")),
    ("tokens", ("select_tokens",)),
    ("attention", ("attention", "class_row", "neighborhood")),
    ("convolution", ("depthwise",)),
    ("layernorm", ("layer_norm",)),
)
CALLS = (
    ("linear", ("linear_pointwise", "mm_out", "mkl_linear")),
    ("convolution", ("convolution",)),
    ("attention", ("scaled_dot_product",)),
    ("layernorm", ("layer_norm",)),
)


def class_of(kernel: str) -> str:
    name = kernel.lower()
    classes = TEMPLATES if "cpp_" in name and not name.startswith("aoti_") else CALLS
    return next((label for label, words in classes if any(word in name for word in words)), "other")


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
