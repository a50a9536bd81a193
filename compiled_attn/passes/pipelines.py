"""The only place that states an order of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compiled_attn.passes.base import Pass
from compiled_attn.passes.canonicalize import Canonicalize
from compiled_attn.passes.drop_open_masks import DropOpenMasks
from compiled_attn.passes.flatten_attention import FlattenAttention
from compiled_attn.passes.fold_batch_norm import FoldBatchNorm
from compiled_attn.passes.fold_constants import FoldConstants
from compiled_attn.passes.fold_padding import FoldPadding
from compiled_attn.passes.raise_attention import RaiseAttention
from compiled_attn.passes.raise_flex_attention import RaiseFlexAttention

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target


def default(
    target: Target, mode: str, named: Sequence[Pass] = (), *, tune: str = "heuristic", measure: Any = None
) -> list[Pass]:
    """The target's pipeline, with the passes that the user named after raising and before kernels are chosen.

    measure: the runtime's measurement service, which tune="measure" needs.
    """
    from compiled_attn.passes.channels_last import ChannelsLast
    from compiled_attn.passes.choose_attention import ChooseAttention
    from compiled_attn.passes.choose_local_attention import ChooseLocalAttention
    from compiled_attn.passes.fold_scale import FoldScale
    from compiled_attn.passes.fuse_depthwise import FuseDepthwise
    from compiled_attn.passes.gate_weights import GateWeights
    from compiled_attn.passes.lower_decay import LowerDecay
    from compiled_attn.passes.pack_linear import PackLinear
    from compiled_attn.passes.pool_products import PoolProducts
    from compiled_attn.passes.raise_local_attention import RaiseLocalAttention
    from compiled_attn.passes.raise_neighborhood import RaiseNeighborhood
    from compiled_attn.passes.split_mixed_attention import SplitMixedAttention
    from compiled_attn.passes.train_depthwise import TrainDepthwise

    if mode == "train":
        return [RaiseAttention(), TrainDepthwise(), *named]
    passes: list[Pass] = [SplitMixedAttention(), RaiseNeighborhood(), *portable(named), LowerDecay()]
    if target.kind == "cpu":
        passes += [
            RaiseLocalAttention(),
            PoolProducts(),
            FuseDepthwise(),
            ChannelsLast(),
            FoldScale(),
            GateWeights(),
            FoldConstants(),
            ChooseAttention(),
            PackLinear(tune, measure),
        ]
    else:
        passes += [RaiseLocalAttention(), FuseDepthwise(), ChooseLocalAttention(), FoldConstants()]
    return passes


def portable(named: Sequence[Pass] = ()) -> list[Pass]:
    """For programs that another runtime or the user reads (ONNX, taps): no kernel of ours is chosen."""
    cleaned: list[Pass] = [RaiseFlexAttention(), Canonicalize(), FoldBatchNorm(), FoldPadding(), FoldConstants()]
    return [*cleaned, DropOpenMasks(), FlattenAttention(), RaiseAttention(), *named, Canonicalize()]
