"""Sparsemax (Martins and Astudillo, arXiv 1602.02068)."""

import torch
from torch import Tensor


def sparsemax(scores: Tensor) -> Tensor:
    """The point of the simplex nearest to scores [..., N], over the last dimension: weights, many of them zero.

    With scores z in decreasing order, k is the largest j for which 1 + j z(j) > z(1) + ... + z(j), the threshold tau is
    (z(1) + ... + z(k) - 1) / k, and the weights are max(0, z - tau).
    """
    scores = scores - scores.amax(dim=-1, keepdim=True)
    ordered = scores.sort(dim=-1, descending=True).values
    total = ordered.cumsum(dim=-1)
    rank = torch.ones_like(ordered).cumsum(dim=-1)
    support = (1 + rank * ordered > total).sum(dim=-1, keepdim=True)
    threshold = (total.gather(-1, support - 1) - 1) / support
    return (scores - threshold).clamp(min=0)
