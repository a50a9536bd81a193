"""The small model whose cross builds the tests of this folder share."""

import torch
from torch import nn

from compiled_attn.ops.attention import attention_with_class_row
from compiled_attn.ops.tokens import select_tokens


class Tiny(nn.Module):
    """A linear layer, plain attention, attention with its class row, and the tokens that the row likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("shift", torch.linspace(-1, 1, 64))

    def forward(self, x):
        """x [batch, 10, 64] -> {"tokens": [batch, 7, 64]}."""
        q = self.linear(x).unflatten(-1, (2, -1)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q)
        out, row = attention_with_class_row(y, q, q, None, scale=0.25)
        tokens, _ = select_tokens(out.transpose(1, 2).flatten(2), row[:, 1:], 5, fuse=True)
        return {"tokens": tokens + self.shift}
