"""Plain attention, and attention that also gives one query's row of probabilities (EViT's class row).

Letters: B batch, H heads, N queries, M keys, D head width, Dv value width.
"""

import torch
import torch.nn.functional as F

from compiled_attn.ir.errors import OpError
from compiled_attn.ir.op import Cost, by_vjp, define
from compiled_attn.ops.rules import (
    bytes_of,
    capped,
    differ,
    exceeds,
    want_equal,
    want_floating,
    want_rank,
    want_softcap,
    widened,
)

Tensor = torch.Tensor


def probabilities(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, causal: bool, softcap: float = 0.0
) -> Tensor:
    """softmax over M of scale * q k^T + bias, [B, H, N, M], at least in float32; a row with nothing to see is zeros.

    A `softcap` other than 0 bends the scaled scores s to softcap * tanh(s / softcap) (Gemma 2, section 2).
    """
    wide = widened(q.dtype)
    scores = capped((q.to(wide) @ k.to(wide).transpose(-2, -1)) * scale, softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)


def tokens_first(out: Tensor) -> Tensor:
    """The same [B, H, N, Dv] with [B, N, H, Dv] in memory, so that joining the heads moves nothing."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


# attention: softmax(scale * q k^T + bias) v, the scaled product soft-capped where asked


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    attention_shape(q, k, v, bias, scale=scale, causal=causal, softcap=softcap)
    p = probabilities(q, k, bias, scale, causal, softcap)
    return tokens_first((p @ v.to(p.dtype)).to(q.dtype))


def attention_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    del scale, causal
    _check("attention", q, k, v, bias)
    want_softcap("attention", softcap)
    batch, heads, queries, _ = q.shape
    return q.new_empty((batch, queries, heads, v.shape[-1])).transpose(1, 2)


def attention_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    softcap: float = 0.0,
) -> Cost:
    """Two products; a causal mask halves them."""
    del scale, softcap
    batch, heads, queries, width = q.shape
    flops = 2 * batch * heads * queries * k.shape[2] * (width + v.shape[-1])
    out = batch * heads * queries * v.shape[-1] * q.element_size()
    return Cost(flops // 2 if causal else flops, bytes_of(q, k, v, bias) + out)


def attention_decomposition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """torch's SDPA, which takes a bias or a causal mask, not both; it caps no scores, so that these are written out."""
    if softcap:
        p = probabilities(q, k, bias, scale, causal, softcap)
        return tokens_first((p @ v.to(p.dtype)).to(q.dtype))
    mask = None if bias is None else bias.to(q.dtype)
    if causal and mask is not None:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = mask.masked_fill(~seen, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scale)
    return tokens_first(out)


attention = define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias=None, *, float scale, bool causal=False, float softcap=0.0) -> Tensor",
    reference=attention_reference,
    shape=attention_shape,
    gradient=by_vjp(attention_decomposition),
    cost=attention_cost,
    decomposition=attention_decomposition,
)


# attention_with_class_row: the same, and row[b, m] = mean over h of the probabilities of query `row`


def class_row_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float, row: int = 0
) -> tuple[Tensor, Tensor]:
    class_row_shape(q, k, v, bias, scale=scale, row=row)
    p = probabilities(q, k, bias, scale, causal=False)
    return tokens_first((p @ v.to(p.dtype)).to(q.dtype)), p[:, :, row].mean(1).to(widened(q.dtype))


def class_row_shape(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float, row: int = 0
) -> tuple[Tensor, Tensor]:
    op = "attention_with_class_row"
    _check(op, q, k, v, bias)
    if row < 0 or exceeds(row + 1, q.shape[2]):
        raise OpError(
            f"{op}: there is no query {row}",
            facts=f"row is {row}, q has {q.shape[2]} queries",
            do="give a row from 0 to the number of queries less one",
        )
    out = attention_shape(q, k, v, bias, scale=scale)
    return out, q.new_empty((q.shape[0], k.shape[2]), dtype=widened(q.dtype))


def class_row_cost(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float, row: int = 0) -> Cost:
    """Attention, and one more query's scores."""
    del row
    batch, heads, _, width = q.shape
    keys = k.shape[2]
    flops, moved = 2 * batch * heads * keys * width, batch * keys * widened(q.dtype).itemsize
    return attention_cost(q, k, v, bias, scale=scale) + Cost(flops, moved)


def class_row_decomposition(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float, row: int = 0
) -> tuple[Tensor, Tensor]:
    """SDPA, and the one row by itself: the N x M probabilities are not formed for it."""
    out = attention_decomposition(q, k, v, bias, scale=scale)
    mine = None
    if bias is not None:
        full = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        mine = full[:, :, row : row + 1]
    p = probabilities(q[:, :, row : row + 1], k, mine, scale, causal=False)
    return out, p[:, :, 0].mean(1).to(widened(q.dtype))


attention_with_class_row = define(
    "attention_with_class_row",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias=None, *, float scale, int row=0) -> (Tensor, Tensor)",
    reference=class_row_reference,
    shape=class_row_shape,
    gradient=by_vjp(class_row_decomposition),
    cost=class_row_cost,
    decomposition=class_row_decomposition,
)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    for name, tensor, letters in (("q", q, "BHND"), ("k", k, "BHMD"), ("v", v, "BHMD")):
        want_rank(op, name, tensor, letters)
        want_floating(op, name, tensor)
    for name, tensor in (("k", k), ("v", v)):
        want_equal(op, "the batch size", "q", q.shape[0], name, tensor.shape[0])
        want_equal(op, "the number of heads", "q", q.shape[1], name, tensor.shape[1])
        want_equal(op, "the element type", "q", str(q.dtype), name, str(tensor.dtype))
    want_equal(op, "the head width", "q", q.shape[3], "k", k.shape[3])
    want_equal(op, "the number of keys", "k", k.shape[2], "v", v.shape[2])
    if bias is None:
        return
    want_floating(op, "bias", bias)
    scores = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    pairs = zip(reversed(bias.shape), reversed(scores), strict=False)
    if bias.dim() > 4 or any(differ(size, 1) and differ(size, wanted) for size, wanted in pairs):
        raise OpError(
            f"{op}: bias does not broadcast to the scores",
            facts=f"bias is {tuple(bias.shape)}, the scores are [B, H, N, M] = {scores}",
            do="give each of its dimensions the scores' size, or 1",
        )
