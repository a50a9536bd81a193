"""Multi-head attention (Vaswani et al., arXiv 1706.03762) under the keys of torch.nn.MultiheadAttention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ops import ragged_attention


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

    def forward(self, x: Tensor, memory: Tensor | None = None, causal: bool = False) -> Tensor:
        """Queries of x [B, N, C], keys and values of memory [B, M, C] (of x itself where None): [B, N, C]."""
        if memory is None:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            width = x.shape[-1]
            q = F.linear(x, self.in_proj_weight[:width], self.in_proj_bias[:width])
            k, v = F.linear(memory, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # [B, H, N, D]
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def packed(self, x: Tensor, begins: Tensor, longest: int) -> Tensor:
        """Self attention of packed rows x [T, C] within each sequence, which begin at begins [B + 1]: [T, C]."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(1, (3, self.heads, -1)).unbind(dim=1)
        out = ragged_attention(q, k, v, begins, begins, scale=q.shape[2] ** -0.5, longest=longest)  # [T, H, D]
        return self.out_proj(out.flatten(1))
