"""What a build for a GPU would hold, told with no GPU: kernels chosen, their machine code, and the roof.

    blocks.3.attn   attention_with_class_row  triton_class_row                        4.1 us at least (memory)
                    attention                 128x64xtf32 w4 s3   168 registers, 0 B spilled, 24.0 KiB shared
    blocks.3        select_tokens             triton_select_tokens                    0.6 us at least (memory)
    whole           9.1 Gflop, 94 MB                                                  46 us at least (memory)

Registers, spills and shared memory are those of the compiled kernels (ops/templates/machine_code.json); the roof is
work over peak, and bytes over bandwidth, of targets.toml. Nothing of this has run on a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch, cost
from compiled_attn.ir.notes import place
from compiled_attn.ir.op import Cost, op_of
from compiled_attn.ir.program import Program
from compiled_attn.ir.targets import Target
from compiled_attn.ops.templates import registry, triton_needs
from compiled_attn.passes.base import Pass
from compiled_attn.passes.choose_attention import SDPA
from compiled_attn.runtime import cross
from compiled_attn.runtime.build import Build, Settings, prepare
from compiled_attn.runtime.cross_attention import foreseen
from compiled_attn.runtime.lower import values_of
from compiled_attn.runtime.report import Explanation, aligned

NOT_RUN = "foreseen from records and shapes; it has not run on a device"


def explain(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | Target,
    dynamic_shapes: Any = None,
    precision: str | None = None,
    passes: Sequence[Pass] = (),
) -> Explanation:
    """What passes do to the model and what a build for `target` would hold; the target need not be here.

    Raises CaptureError, PassError or TargetError, each in four parts.
    """
    settings = Settings.of(target, precision=precision, dynamic_shapes=dynamic_shapes, passes=tuple(passes))
    build = prepare(model, args, kwargs, settings)
    return explanation(f"{type(model).__name__} for {settings.target.name}, {settings.mode}", build)


def explanation(title: str, build: Build) -> Explanation:
    """A build's explanation; for a GPU with what is foreseen."""
    return Explanation(title, (build,), (text(build),) if build.settings.target.kind == "cuda" else ())


def text(build: Build) -> str:
    """What the lowered program would launch, aligned; symbolic sizes count as in the example inputs."""
    program, target = build.program, build.settings.target
    sizes = _sizes(program)
    rows: list[tuple[str, ...]] = []
    with program.fake_mode:
        for node in program.graph.nodes:
            rows += _rows(node, target, sizes)
    whole = cost.at(cost.program_cost(program), sizes)
    work = f"{float(whole.flops) / 1e9:.2f} Gflop, {float(whole.bytes) / 1e6:.1f} MB moved, each node alone"
    rows.append(("whole", "roof", work, _roof(whole, target, _dtype(program))))
    here = "is not here" if cross.wanted(target) else "is here"
    return f"on {target.name} (compute capability {target.sm / 10}), which {here}: {NOT_RUN}\n{aligned(rows)}"


def _rows(node: fx.Node, target: Target, sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    if node.op != "call_function":
        return []
    roof = _roof(cost.at(cost.node_cost(node), sizes), target, _dtype_of(node))
    if node.target is SDPA:
        operator, because = foreseen(node, target)
        found: list[tuple[str, ...]] = [(place(node), "attention", f"{operator}, an operator of torch", roof)]
        return found + ([("", "not fused", f"because {because}")] if because else [])
    op = op_of(node.target)
    if op is None:
        return []
    args, kwargs = values_of(node)
    template, misses = registry.choose(op.name, args, kwargs, target)
    rows: list[tuple[str, ...]] = [(place(node), f"not {name}", f"because {because}") for name, because in misses]
    rows.append((place(node), op.name, template.name if template else "decomposition", roof))
    if template is not None:
        for launch in triton_needs.launches(op.name, args, kwargs, target):
            rows.append((place(node), f"  {launch.kernel}", launch.config.name, str(launch)))
    return rows


def _roof(work: Cost, target: Target, dtype: torch.dtype) -> str:
    flops, moved = (float(x) for x in (work.flops, work.bytes))
    arithmetic, memory = flops / target.flops_per_second(dtype), moved / target.bytes_per_second
    bound = "arithmetic" if arithmetic > memory else "memory"
    return f"{1e6 * max(arithmetic, memory):.3g} us at least ({bound})"


def _sizes(program: Program) -> dict[str, int]:
    """The example inputs' sizes by symbol."""
    found: dict[str, int] = {}
    leaves = pytree.tree_leaves(program.example_inputs, is_leaf=lambda x: x is None)
    for node, leaf in zip(program.inputs, leaves, strict=False):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not isinstance(leaf, torch.Tensor):
            continue
        for symbolic, size in zip(value.shape, leaf.shape, strict=True):
            if _torch.is_symbolic(symbolic):
                found.setdefault(str(_torch.expression(symbolic)), int(size))
    return found


def _dtype_of(node: fx.Node) -> torch.dtype:
    leaves = [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)]
    return leaves[0].dtype if leaves else torch.float32


def _dtype(program: Program) -> torch.dtype:
    """The dtype of most weights, whose peak bounds the whole."""
    held = [t for t in program.tensors().values() if t.is_floating_point()]
    return max(held, key=lambda t: t.numel()).dtype if held else torch.float32
