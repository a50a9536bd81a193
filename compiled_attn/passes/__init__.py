"""How a program is changed: one pass a file. The order of a target's pipeline stands in `pipelines` only."""

from compiled_attn.passes.base import Pass, PassRecord, run_passes
from compiled_attn.passes.canonicalize import Canonicalize
from compiled_attn.passes.cast_boundary import CastBoundary
from compiled_attn.passes.fold_batch_norm import FoldBatchNorm
from compiled_attn.passes.fold_constants import FoldConstants

__all__ = ["Canonicalize", "CastBoundary", "FoldBatchNorm", "FoldConstants", "Pass", "PassRecord", "run_passes"]
