"""Keeping some tokens and leaving out the others, by score (EViT's reorganisation, arXiv 2202.07800, section 3).

Letters: B batch, N tokens, C channels, K tokens kept.
"""

from typing import Any

import torch

from compiled_attn.ir.errors import OpError
from compiled_attn.ir.op import Cost, by_vjp, define
from compiled_attn.ops.rules import bytes_of, exceeds, want_equal, want_floating, want_rank, widened

Tensor = torch.Tensor


def places(score: Tensor) -> Tensor:
    """[B, n] -> how many go before each token: a greater score, or an equal one at a lower index; NaN come last."""
    mine, other = score.unsqueeze(2), score.unsqueeze(1)  # [B, n, 1], [B, 1, n]
    position = torch.arange(score.shape[1], device=score.device)
    earlier = position.unsqueeze(0) < position.unsqueeze(1)
    lost, other_lost = mine.isnan(), other.isnan()
    tie = (other == mine) | (lost & other_lost)
    before = (other > mine) | (lost & ~other_lost) | (tie & earlier)
    return before.sum(2)


# select_tokens: prefix, the K best by decreasing score, and, if fused, the score-weighted sum of the rest


def select_reference(
    x: Tensor, score: Tensor, keep: int, *, prefix: int = 1, fuse: bool = False
) -> tuple[Tensor, Tensor]:
    select_shape(x, score, keep, prefix=prefix, fuse=fuse)
    place = places(score)
    index = torch.argsort(place, dim=1)[:, :keep].contiguous()
    rest = x[:, prefix:]
    parts = [x[:, :prefix], rest.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))]
    if fuse:
        parts.append(_fused(rest, score, place >= keep))
    return torch.cat(parts, dim=1).contiguous(), index


def select_shape(x: Tensor, score: Tensor, keep: Any, *, prefix: int = 1, fuse: bool = False) -> tuple[Tensor, Tensor]:
    op = "select_tokens"
    want_rank(op, "x", x, "BNC")
    want_rank(op, "score", score, "BN")
    want_floating(op, "x", x)
    want_floating(op, "score", score)
    want_equal(op, "the batch size", "x", x.shape[0], "score", score.shape[0])
    want_equal(op, "the number of tokens after the prefix", "x", x.shape[1] - prefix, "score", score.shape[1])
    if exceeds(0, keep) or exceeds(keep, score.shape[1]) or prefix < 0:
        raise OpError(
            f"{op}: cannot keep {keep} tokens after a prefix of {prefix}",
            facts=f"keep is {keep}, there are {score.shape[1]} scored tokens",
            do="keep from 0 to the number of scored tokens",
        )
    tokens = x.new_empty((x.shape[0], prefix + keep + int(fuse), x.shape[2]))
    return tokens, score.new_empty((score.shape[0], keep), dtype=torch.int64)


def select_cost(x: Tensor, score: Tensor, keep: Any, *, prefix: int = 1, fuse: bool = False) -> Cost:
    """Two comparisons a pair of tokens, and the fused sum; every token is read once."""
    batch, scored = score.shape
    out = batch * (prefix + keep + int(fuse)) * x.shape[2] * x.element_size() + batch * keep * 8
    summed = 2 * batch * (scored - keep) * x.shape[2] if fuse else 0
    return Cost(2 * batch * scored * scored + summed, bytes_of(x, score) + out)


def select_decomposition(
    x: Tensor, score: Tensor, keep: Any, *, prefix: int = 1, fuse: bool = False
) -> tuple[Tensor, Tensor]:
    """Comparisons and sums only, no sort: Inductor fuses it, and ties and NaN keep their order in ONNX too."""
    place = places(score)  # [B, n]
    slots = torch.arange(keep, device=x.device)
    position = torch.arange(score.shape[1], device=x.device)
    index = torch.where(place.unsqueeze(1) == slots.unsqueeze(1), position, 0).sum(2)  # [B, K, n] -> [B, K]
    rest = x[:, prefix:]
    parts = [x[:, :prefix], rest.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))]
    if fuse:
        parts.append(_fused(rest, score, place >= keep))
    return torch.cat(parts, dim=1), index


def _fused(rest: Tensor, score: Tensor, left_out: Tensor) -> Tensor:
    """[B, 1, C]: sum over the tokens left out of score * token, at least in float32."""
    wide = widened(rest.dtype)
    weight = torch.where(left_out, score.to(wide), 0.0)
    token = torch.where(left_out.unsqueeze(2), rest.to(wide), 0.0)
    return (weight.unsqueeze(1) @ token).to(rest.dtype)


select_tokens = define(
    "select_tokens",
    "(Tensor x, Tensor score, SymInt keep, *, int prefix=1, bool fuse=False) -> (Tensor, Tensor)",
    reference=select_reference,
    shape=select_shape,
    gradient=by_vjp(select_decomposition),
    cost=select_cost,
    decomposition=select_decomposition,
)
