"""How a program is changed: one pass a file. The order of a target's pipeline stands in `pipelines` only."""

import compiled_attn.ops  # noqa: F401  registers the vocabulary
from compiled_attn.passes.base import Pass, PassRecord, run_passes
from compiled_attn.passes.canonicalize import Canonicalize
from compiled_attn.passes.cast_boundary import CastBoundary
from compiled_attn.passes.drop_open_masks import DropOpenMasks
from compiled_attn.passes.evict_kv import EvictKV
from compiled_attn.passes.fold_batch_norm import FoldBatchNorm
from compiled_attn.passes.fold_constants import FoldConstants
from compiled_attn.passes.prune_tokens import PruneTokens
from compiled_attn.passes.raise_attention import RaiseAttention
from compiled_attn.passes.reorganize_tokens import ReorganizeTokens

__all__ = [
    "Canonicalize",
    "CastBoundary",
    "DropOpenMasks",
    "EvictKV",
    "FoldBatchNorm",
    "FoldConstants",
    "Pass",
    "PassRecord",
    "PruneTokens",
    "RaiseAttention",
    "ReorganizeTokens",
    "run_passes",
]
