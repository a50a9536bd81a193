"""The only place that states an order of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compiled_attn.passes.base import Pass
from compiled_attn.passes.canonicalize import Canonicalize
from compiled_attn.passes.fold_batch_norm import FoldBatchNorm
from compiled_attn.passes.fold_constants import FoldConstants
from compiled_attn.passes.raise_attention import RaiseAttention

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target


def default(target: Target, mode: str, named: Sequence[Pass] = (), *, tune: str = "heuristic") -> list[Pass]:
    """The target's pipeline, with the passes that the user named after raising and before kernels are chosen."""
    from compiled_attn.passes.choose_attention import ChooseAttention
    from compiled_attn.passes.pack_linear import PackLinear

    if mode == "train":
        return [RaiseAttention(), *named]
    passes: list[Pass] = [Canonicalize(), FoldBatchNorm(), FoldConstants(), RaiseAttention(), *named, Canonicalize()]
    if target.kind == "cpu":
        passes += [ChooseAttention(), PackLinear(tune=tune)]
    return passes
