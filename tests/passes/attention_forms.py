"""Attention as people write it, by hand: each form once, with what raising it should say, or why it must be refused."""
# ruff: noqa: ARG001  (every form takes the same arguments)

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, N, H, D = 2, 6, 3, 8
C = H * D

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """x [B, N, C] -> projections q, k, v [B, N, C] -> `attend` -> [B, N, C] -> projection, plus x."""

    def __init__(self, attend: Attend, *, fused: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.attend, self.fused = attend, fused
        if fused:
            self.qkv = nn.Linear(C, 3 * C)
        else:
            self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.out = nn.Linear(C, C)
        self.drop = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.randn(H, N, N))
        self.row_bias = nn.Parameter(torch.randn(1, 1, N, N))
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 0.5)
        self.mix = nn.Linear(H, H)
        self.register_buffer("keep", torch.rand(N, N) > 0.3, persistent=False)
        with torch.no_grad():
            self.keep.fill_diagonal_(True)
            for module in self.children():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(std=1.2 / module.in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1) if self.fused else (self.q(x), self.k(x), self.v(x))
        return x + self.out(self.attend(self, q, k, v))


@dataclass(frozen=True)
class Form:
    """attend: the form.  says: what the note of the raised block says, or, if refused, a part of the sentence."""

    attend: Attend
    says: str
    raised: bool = True
    fused: bool = False
    tolerance: float = 1e-5

    def block(self, *, fused: bool | None = None, dropout: float = 0.0) -> Block:
        torch.manual_seed(0)
        return Block(self.attend, fused=self.fused if fused is None else fused, dropout=dropout).eval()


def heads(x: Tensor) -> Tensor:
    """[B, N, C] -> [B, H, N, D]"""
    return x.view(x.shape[0], x.shape[1], H, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, C]"""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def flat_heads(x: Tensor) -> Tensor:
    """[B, N, C] -> [B * H, N, D]"""
    return heads(x).reshape(-1, x.shape[1], D)


def scaled_before(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = heads(q) * D**-0.5, heads(k), heads(v)
    return joined((q @ k.transpose(-2, -1)).softmax(-1) @ v)


def scaled_before_heads(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((heads(q * D**-0.5) @ heads(k).transpose(-2, -1)).softmax(-1) @ heads(v))


def scaled_keys(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((heads(q) @ (heads(k) * 0.3).transpose(-2, -1)).softmax(-1) @ heads(v))


def scaled_by_sqrt_on_both(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = math.sqrt(math.sqrt(D))
    return joined(((heads(q) / root) @ (heads(k) / root).mT).softmax(-1) @ heads(v))


def scaled_after(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(F.softmax(torch.matmul(heads(q), heads(k).transpose(2, 3)) * D**-0.5, dim=-1) @ heads(v))


def divided_by_sqrt(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(F.softmax(heads(q) @ heads(k).transpose(2, 3) / math.sqrt(D), dim=3) @ heads(v))


def divided_by_tensor(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).transpose(2, 3) / torch.sqrt(torch.tensor(float(D)))
    return joined(F.softmax(scores, dim=3) @ heads(v))


def unscaled(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((heads(q) @ heads(k).mT).softmax(-1) @ heads(v))


def negative_scale(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((-(0.25) * (heads(q) @ heads(k).mT)).softmax(-1) @ heads(v))


def key_times_query(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(k) @ heads(q).transpose(-2, -1)
    return joined((0.2 * scores.transpose(-2, -1)).softmax(-1) @ heads(v))


def columns_of_transposed(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (heads(k) @ heads(q).mT * 0.2).softmax(-2)
    return joined((heads(v).mT @ weights).mT)


def batched_flat(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.bmm(flat_heads(q), flat_heads(k).transpose(1, 2)).mul(0.25).softmax(-1)
    return joined(torch.bmm(weights, flat_heads(v)).view(q.shape[0], H, N, D))


def baddbmm_scaled(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    empty = torch.empty(q.shape[0] * H, N, N)
    scores = torch.baddbmm(empty, flat_heads(q), flat_heads(k).transpose(1, 2), beta=0, alpha=0.3)
    return joined(torch.bmm(scores.softmax(-1), flat_heads(v)).view(q.shape[0], H, N, D))


def baddbmm_biased(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = m.row_bias.view(1, N, N)
    scores = torch.baddbmm(bias, flat_heads(q), flat_heads(k).transpose(1, 2), beta=0.5, alpha=0.3)
    return joined(torch.bmm(scores.softmax(-1), flat_heads(v)).view(q.shape[0], H, N, D))


def tokens_first(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nn.MultiheadAttention's way: [N, B * H, D] and back."""
    batch = q.shape[0]
    q, k, v = (t.transpose(0, 1).contiguous().view(N, batch * H, D).transpose(0, 1) for t in (q, k, v))
    out = torch.bmm(torch.bmm(q * 0.35, k.transpose(-2, -1)).softmax(-1), v)
    return out.transpose(0, 1).contiguous().view(N, batch, C).transpose(0, 1)


def einsum_four(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", heads(q) * 0.3, heads(k)).softmax(-1)
    return joined(torch.einsum("bhij,bhjd->bhid", weights, heads(v)))


def einsum_tokens_first(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.view(t.shape[0], N, H, D) for t in (q, k, v))
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * 0.3).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)


def einsum_dots(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("...id,...jd->...ij", heads(q), heads(k)) * 0.3).softmax(-1)
    return joined(torch.einsum("...ij,...jd->...id", weights, heads(v)))


def one_head(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(1, 2) * C**-0.5).softmax(-1) @ v


def windows(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Five dimensions: [B, windows, H, N / windows, D]."""
    q, k, v = (t.view(t.shape[0], 2, N // 2, H, D).transpose(2, 3) for t in (q, k, v))
    out = (q @ k.mT * 0.25).softmax(-1) @ v
    return out.transpose(2, 3).reshape(-1, N, C)


def window_bias(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Windows in the batch, a bias by head and a mask by window put in by a view, as in Swin."""
    q, k, v = (t.reshape(-1, N // 2, H, D).transpose(1, 2) for t in (q, k, v))
    scores = q * 0.25 @ k.transpose(-2, -1) + m.bias[:, : N // 2, : N // 2].unsqueeze(0)
    mask = m.row_bias[0, 0, : N // 2].view(N // 2, 2, N // 2).transpose(0, 1)
    scores = scores.view(-1, 2, H, N // 2, N // 2) + mask.unsqueeze(1).unsqueeze(0)
    out = scores.view(-1, H, N // 2, N // 2).softmax(-1) @ v
    return out.transpose(1, 2).reshape(-1, N, C)


def head_bias(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((heads(q) @ heads(k).mT * 0.25 + m.bias).softmax(-1) @ heads(v))


def bias_left(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((m.bias.unsqueeze(0) + 0.25 * (heads(q) @ heads(k).mT)).softmax(-1) @ heads(v))


def biases_in_turn(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (heads(q) @ heads(k).mT + m.bias) * 0.25 - 0.5 * m.row_bias
    return joined((scores + 3.0).softmax(-1) @ heads(v))


def score_from_queries(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A relative bias that depends on the query, as in BoTNet and DeBERTa: a second product is added."""
    positions = m.bias.view(1, H, N, N)[..., :D].mT
    positions = F.pad(positions, (0, 0, 0, D - positions.shape[-2]))
    return joined((heads(q) @ positions + heads(q) @ heads(k).mT * 0.25).softmax(-1) @ heads(v))


def temperature_per_head(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.normalize(heads(q), dim=-1), F.normalize(heads(k), dim=-1)
    return joined(((q @ k.mT) * m.temperature + m.bias).softmax(-1) @ heads(v))


def channel_attention(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (heads(t).transpose(-2, -1) for t in (q, k, v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    out = (q @ k.transpose(-2, -1) * m.temperature).softmax(-1) @ v
    return out.permute(0, 3, 1, 2).reshape(-1, N, C)


def masked_with_infinity(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (heads(q) @ heads(k).mT * 0.25).masked_fill(~m.keep, float("-inf"))
    return joined(scores.softmax(-1) @ heads(v))


def masked_with_minimum(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).mT * 0.25
    scores = torch.where(m.keep, scores, torch.finfo(scores.dtype).min)
    return joined(scores.softmax(-1) @ heads(v))


def masked_with_billion(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    empty = m.keep & (torch.arange(N)[:, None] != 2)
    scores = (heads(q) @ heads(k).mT).masked_fill(empty.logical_not(), -1e9)
    return joined((scores * 0.25).softmax(-1) @ heads(v))


def masked_then_biased(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (heads(q) @ heads(k).mT).masked_fill(~m.keep, float("-inf"))
    return joined((scores * 0.25 + m.bias).softmax(-1) @ heads(v))


def biased_then_masked(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).mT * 0.25 + m.bias
    return joined(torch.where(~m.keep, torch.tensor(float("-inf")), scores).softmax(-1) @ heads(v))


def causal(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    later = torch.triu(torch.full((N, N), float("-inf")), diagonal=1)
    return joined((heads(q) @ heads(k).mT * 0.25 + later).softmax(-1) @ heads(v))


def softmax_in_float32(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).mT * 0.25
    return joined(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ heads(v))


def written_by_hand(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).mT * 0.25
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return joined((weights / weights.sum(-1, keepdim=True)) @ heads(v))


def written_by_hand_with_max(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).mT * 0.25 + m.bias
    weights = (scores - torch.max(scores, dim=-1, keepdim=True)[0]).exp()
    return joined((weights / weights.sum(dim=-1, keepdim=True)) @ heads(v))


def shifted_before_softmax(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).mT * 0.25
    scores = scores - scores.max(dim=-1, keepdim=True)[0]
    return joined(scores.softmax(-1) @ heads(v))


def dropped(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(m.drop((heads(q) @ heads(k).mT * 0.25).softmax(-1)) @ heads(v))


def scaled_probabilities(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((2 * (heads(q) @ heads(k).mT * 0.25).softmax(-1)) @ heads(v))


def one_query(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = heads(q)[:, :, :1]
    out = (first * 0.25 @ heads(k).transpose(-2, -1)).softmax(-1) @ heads(v)
    return joined(out).expand(-1, N, -1)


def learned_query(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query = m.bias[:, :N, :].mean(-1, keepdim=True).expand(H, N, D).unsqueeze(0)
    return joined((query @ heads(k).mT * 0.25).softmax(-1) @ heads(v))


def one_key_head(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-query attention: k and v have one head."""
    k, v = k[..., :D].unsqueeze(1), v[..., :D].unsqueeze(1)
    return joined((heads(q) @ k.mT * 0.25).softmax(-1) @ v)


def grouped_keys(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped-query attention: heads of k and v repeated by expand."""
    k, v = (t[..., :D].view(-1, N, 1, 1, D).expand(-1, N, 1, H, D).reshape(-1, N, H, D).transpose(1, 2) for t in (k, v))
    return joined((heads(q) @ k.mT * 0.25).softmax(-1) @ v)


# Refused.


def wrong_axis(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((heads(q) @ heads(k).mT * 0.25).softmax(-2) @ heads(v))


def wrong_axis_heads(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((heads(q) @ heads(k).mT * 0.25).softmax(1) @ heads(v))


def probabilities_read(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (heads(q) @ heads(k).mT * 0.25).softmax(-1)
    return joined(weights @ heads(v)) * weights.mean()


def scores_read(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).mT * 0.25
    return joined(scores.softmax(-1) @ heads(v)) + scores.mean()


def talking_heads(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).mT * 0.25
    scores = m.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return joined(scores.softmax(-1) @ heads(v))


def talking_probabilities(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (heads(q) @ heads(k).mT * 0.25).softmax(-1)
    weights = m.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return joined(weights @ heads(v))


def gated(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (heads(q) @ heads(k).mT * 0.25).softmax(-1)
    return joined((weights * torch.sigmoid(m.bias)) @ heads(v))


def capped(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((torch.tanh(heads(q) @ heads(k).mT) * 5).softmax(-1) @ heads(v))


def capped_and_masked(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q * 0.5) @ heads(k).mT
    scores = torch.tanh(scores / 3) * -3
    return joined(scores.masked_fill(~m.keep, -torch.inf).softmax(-1) @ heads(v))


def capped_behind_bias(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((torch.tanh(heads(q) @ heads(k).mT + m.bias) * 5).softmax(-1) @ heads(v))


def capped_twice(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((torch.tanh(torch.tanh(heads(q) @ heads(k).mT)) * 5).softmax(-1) @ heads(v))


def weighted_scores(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((heads(q) @ heads(k).mT * m.bias).softmax(-1) @ heads(v))


def shallow_mask(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((heads(q) @ heads(k).mT).masked_fill(~m.keep, -10.0).softmax(-1) @ heads(v))


def no_product(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((m.bias.unsqueeze(0) + q.mean()).softmax(-1) @ heads(v))


FORMS: dict[str, Form] = {
    "scaled before": Form(scaled_before, "softmax(q k^T * 0.353553) v"),
    "scaled before the heads": Form(scaled_before_heads, "softmax(q k^T * 0.353553) v"),
    "scaled keys": Form(scaled_keys, "softmax(q k^T * 0.3) v"),
    "scaled by a root on both": Form(scaled_by_sqrt_on_both, "softmax(q k^T * 0.353553) v"),
    "scaled after": Form(scaled_after, "softmax(q k^T * 0.353553) v"),
    "divided by a root": Form(divided_by_sqrt, "softmax(q k^T * 0.353553) v"),
    "divided by a tensor": Form(divided_by_tensor, "softmax(q k^T * 0.353553) v"),
    "fused projections": Form(scaled_after, "softmax(q k^T * 0.353553) v", fused=True),
    "unscaled": Form(unscaled, "softmax(q k^T) v"),
    "negative scale": Form(negative_scale, "softmax(q k^T * -0.25) v"),
    "key times query": Form(key_times_query, "softmax(q k^T * 0.2) v"),
    "columns of the transposed": Form(columns_of_transposed, "softmax(q k^T * 0.2) v"),
    "flat bmm": Form(batched_flat, "softmax(q k^T * 0.25) v"),
    "baddbmm with alpha": Form(baddbmm_scaled, "softmax(q k^T * 0.3) v"),
    "baddbmm with a bias": Form(baddbmm_biased, "softmax(q k^T * 0.3 + bias) v"),
    "tokens first": Form(tokens_first, "softmax(q k^T * 0.35) v"),
    "einsum": Form(einsum_four, "softmax(q k^T * 0.3) v"),
    "einsum, tokens first": Form(einsum_tokens_first, "softmax(q k^T * 0.3) v"),
    "einsum with dots": Form(einsum_dots, "softmax(q k^T * 0.3) v"),
    "one head": Form(one_head, "softmax(q k^T * 0.204124) v"),
    "windows in five dimensions": Form(windows, "softmax(q k^T * 0.25) v"),
    "bias by head, mask by window": Form(window_bias, "softmax(q k^T * 0.25 + bias) v"),
    "bias by head": Form(head_bias, "softmax(q k^T * 0.25 + bias) v"),
    "bias on the left": Form(bias_left, "softmax(q k^T * 0.25 + bias) v"),
    "several biases": Form(biases_in_turn, "softmax(q k^T * 0.25 + bias) v"),
    "bias made from queries": Form(score_from_queries, "softmax(q k^T * 0.25 + bias) v"),
    "temperature by head": Form(temperature_per_head, "softmax(q k^T * factor + bias) v"),
    "over channels": Form(channel_attention, "softmax(q k^T * factor) v"),
    "masked with -inf": Form(masked_with_infinity, "softmax(q k^T * 0.25, masked) v"),
    "masked with finfo.min": Form(masked_with_minimum, "softmax(q k^T * 0.25, masked) v"),
    "masked with -1e9, one row whole": Form(masked_with_billion, "softmax(q k^T * 0.25, masked) v"),
    "masked, then biased": Form(masked_then_biased, "softmax(q k^T * 0.25 + bias, masked) v"),
    "biased, then masked": Form(biased_then_masked, "softmax(q k^T * 0.25 + bias, masked) v"),
    "causal by a triangle of -inf": Form(causal, "softmax(q k^T * 0.25 + bias) v"),
    "softmax in float32": Form(softmax_in_float32, "softmax(q k^T * 0.25) v"),
    "softmax by hand": Form(written_by_hand, "softmax(q k^T * 0.25) v"),
    "softmax by hand, torch.max": Form(written_by_hand_with_max, "softmax(q k^T * 0.25 + bias) v"),
    "shifted by its largest": Form(shifted_before_softmax, "softmax(q k^T * 0.25) v"),
    "dropout in inference": Form(dropped, "softmax(q k^T * 0.25) v"),
    "probabilities times a number": Form(scaled_probabilities, "softmax(q k^T * 0.25) v * 2"),
    "one query": Form(one_query, "softmax(q k^T * 0.25) v"),
    "learned query": Form(learned_query, "softmax(q k^T * 0.25) v"),
    "keys with one head": Form(one_key_head, "softmax(q k^T * 0.25) v"),
    "grouped keys": Form(grouped_keys, "softmax(q k^T * 0.25) v"),
}

CAPPED: dict[str, Form] = {
    "capped": Form(capped, "softmax(q k^T * 5 capped at 5) v"),
    "scaled, capped, masked": Form(capped_and_masked, "softmax(q k^T * -0.5 capped at 3, masked) v"),
}

REFUSED: dict[str, Form] = {
    "softmax over queries": Form(wrong_axis, "normalises over dimension 2", raised=False),
    "softmax over heads": Form(wrong_axis_heads, "normalises over dimension 1", raised=False),
    "probabilities read elsewhere": Form(probabilities_read, "are read 2 times", raised=False),
    "scores read elsewhere": Form(scores_read, "are also read by mean", raised=False),
    "talking heads before": Form(talking_heads, "stands between the scores", raised=False),
    "talking heads behind": Form(talking_probabilities, "and the product with v and mixes heads", raised=False),
    "gated probabilities": Form(gated, "and the product with v", raised=False),
    "capped behind a bias": Form(capped_behind_bias, "bends more than the scaled scores", raised=False),
    "capped twice": Form(capped_twice, "bends more than the scaled scores", raised=False),
    "each score its own factor": Form(weighted_scores, "multiplies each score by a factor of its own", raised=False),
    "a mask that hides little": Form(shallow_mask, "replaces scores by -10", raised=False),
    "no product above": Form(no_product, "no product of queries and keys lies above", raised=False),
}
