"""Multi-head attention (Vaswani et al., arXiv 1706.03762) under the keys of torch.nn.MultiheadAttention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v in heads, batch first; keys in_proj_weight [3C, C], in_proj_bias, out_proj."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, causal: bool = False, seen: Tensor | None = None
    ) -> Tensor:
        """Queries of x [B, N, C], keys and values of memory [B, M, C] (of x itself where None): [B, N, C].

        seen: which keys there are, bool broadcastable to [B, H, N, M]; every query needs one.
        """
        if memory is None:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            width = x.shape[-1]
            q = F.linear(x, self.in_proj_weight[:width], self.in_proj_bias[:width])
            k, v = F.linear(memory, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal)  # [B, H, N, D]
        return self.out_proj(out.transpose(1, 2).flatten(2))
