"""What the Triton kernels of one call need on a target, from the record of machine_code.json; no GPU is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compiled_attn.ops.decay import along_of
from compiled_attn.ops.templates import (
    triton_attention,
    triton_cached_attention,
    triton_class_row,
    triton_decay_attention,
    triton_depthwise,
    triton_depthwise_gradient,
    triton_depthwise_input_gradient,
    triton_local_attention,
    triton_neighborhood,
    triton_ragged_attention,
    triton_select_tokens,
)
from compiled_attn.ops.templates.triton_config import Config, MachineCode, block_of, recorded


@dataclass(frozen=True)
class Launch:
    """One kernel of a template, the configuration chosen for it, and its recorded machine code."""

    kernel: str
    config: Config
    needs: MachineCode

    def __str__(self) -> str:
        code = self.needs
        return f"{code.registers} registers, {code.spills} B spilled, {code.shared / 1024:.1f} KiB shared"


def launches(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[Launch]:
    """The kernels that serve a call which the op's Triton template accepts; empty for an op that has no record."""
    found = []
    for kernel, case, config in _CHOSEN[op](args, kwargs, target) if op in _CHOSEN else ():
        needs = recorded()[kernel][case][config.name][f"sm_{target.sm}"]
        found.append(Launch(kernel, config, MachineCode(*needs)))
    return found


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[tuple[str, str, Config]]:
    q, _, v, bias = (*args, None)[:4]
    block = max(block_of(q.shape[-1]), block_of(v.shape[-1]))
    case = triton_attention.case(q.dtype, block, bias=bias is not None, causal=kwargs.get("causal", False))
    return [(triton_attention.KERNEL, case, triton_attention.chosen(args, kwargs, target)[0])]


def _class_row(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[tuple[str, str, Config]]:
    q, _, _, bias = (*args, None)[:4]
    logits, mean = (found[0] for found in triton_class_row.chosen(args, kwargs, target))
    case = triton_class_row.logits_case(q.dtype, block_of(q.shape[-1]), bias=bias is not None)
    return [
        *_attention(args, {}, target),
        (triton_class_row.LOGITS_KERNEL, case, logits),
        (triton_class_row.MEAN_KERNEL, triton_class_row.MEAN_CASE, mean),
    ]


def _select(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[tuple[str, str, Config]]:
    case = triton_select_tokens.case(args[0].dtype, fuse=kwargs.get("fuse", False))
    return [(triton_select_tokens.KERNEL, case, triton_select_tokens.chosen(args, kwargs, target)[0])]


def _ragged(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[tuple[str, str, Config]]:
    q, _, v = args[:3]
    block = max(block_of(q.shape[-1]), block_of(v.shape[-1]))
    case = triton_ragged_attention.case(q.dtype, block, causal=kwargs.get("causal", False))
    return [(triton_ragged_attention.KERNEL, case, triton_ragged_attention.chosen(args, kwargs, target)[0])]


def _cached(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[tuple[str, str, Config]]:
    q, _, v = args[:3]
    case = triton_cached_attention.case(q.dtype, max(block_of(q.shape[-1]), block_of(v.shape[-1])))
    split, combine = (found[0] for found in triton_cached_attention.chosen(args, kwargs, target))
    return [
        (triton_cached_attention.SPLIT_KERNEL, case, split),
        (triton_cached_attention.COMBINE_KERNEL, case, combine),
    ]


def _decay(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[tuple[str, str, Config]]:
    q, _, v, _ = args
    block, along = max(block_of(q.shape[-1]), block_of(v.shape[-1])), len(along_of(q, kwargs.get("along")))
    case = triton_decay_attention.case(q.dtype, block, along=along, softmax=kwargs.get("softmax", True))
    return [(triton_decay_attention.KERNEL, case, triton_decay_attention.chosen(args, kwargs, target)[0])]


def _depthwise(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[tuple[str, str, Config]]:
    case = triton_depthwise.case(args[0].dtype, triton_depthwise.norm_block(args, kwargs))
    return [(triton_depthwise.KERNEL, case, triton_depthwise.chosen(args, kwargs, target)[0])]


def _depthwise_gradient(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[tuple[str, str, Config]]:
    case = triton_depthwise_gradient.case(args[0].dtype)
    return [(triton_depthwise_gradient.KERNEL, case, triton_depthwise_gradient.chosen(args, kwargs, target)[0])]


def _depthwise_input_gradient(
    args: tuple[Any, ...], kwargs: dict[str, Any], target: Any
) -> list[tuple[str, str, Config]]:
    case = triton_depthwise_input_gradient.case(args[0].dtype)
    found = triton_depthwise_input_gradient.chosen(args, kwargs, target)
    return [(triton_depthwise_input_gradient.KERNEL, case, found[0])]


def _local(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[tuple[str, str, Config]]:
    q, _, v, _, relative = (*args, None, None)[:5]
    block = max(block_of(q.shape[-1]), block_of(v.shape[-1]))
    case = triton_local_attention.case(q.dtype, block, rank=q.dim() - 3, relative=relative is not None)
    return [(triton_local_attention.KERNEL, case, triton_local_attention.chosen(args, kwargs, target)[0])]


def _neighborhood(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[tuple[str, str, Config]]:
    weights, v = args
    case = triton_neighborhood.case(v.dtype, *triton_neighborhood.blocks(weights.shape[-2], v.shape[-1]))
    return [(triton_neighborhood.KERNEL, case, triton_neighborhood.chosen(args, kwargs, target)[0])]


_CHOSEN: dict[str, Callable[..., list[tuple[str, str, Config]]]] = {
    "attention": _attention,
    "attention_with_class_row": _class_row,
    "cached_attention": _cached,
    "decay_attention": _decay,
    "depthwise_block": _depthwise,
    "depthwise_input_gradient": _depthwise_input_gradient,
    "depthwise_weight_gradient": _depthwise_gradient,
    "local_attention": _local,
    "neighborhood_apply": _neighborhood,
    "ragged_attention": _ragged,
    "select_tokens": _select,
}
