"""The vocabulary: ops that say what attention models do. Each is `torch.ops.compiled_attn.<name>` and a record here."""

from compiled_attn.ir.op import OPS, Op
from compiled_attn.ops.attention import attention, attention_with_class_row
from compiled_attn.ops.cache import cache_append, cache_evict, cached_attention
from compiled_attn.ops.decay import decay_attention
from compiled_attn.ops.depthwise import depthwise_block
from compiled_attn.ops.depthwise_gradient import depthwise_weight_gradient
from compiled_attn.ops.depthwise_input_gradient import depthwise_input_gradient
from compiled_attn.ops.linear import packed_linear
from compiled_attn.ops.local import local_attention
from compiled_attn.ops.neighborhood import neighborhood_apply
from compiled_attn.ops.ragged import pack_tokens, ragged_attention, unpack_tokens
from compiled_attn.ops.tokens import select_tokens

__all__ = [
    "OPS",
    "Op",
    "attention",
    "attention_with_class_row",
    "cache_append",
    "cache_evict",
    "cached_attention",
    "decay_attention",
    "depthwise_block",
    "depthwise_input_gradient",
    "depthwise_weight_gradient",
    "local_attention",
    "neighborhood_apply",
    "pack_tokens",
    "packed_linear",
    "ragged_attention",
    "select_tokens",
    "unpack_tokens",
]
