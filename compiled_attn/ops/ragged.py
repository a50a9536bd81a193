"""Ragged batches: sequences of different lengths packed behind one another, and attention within each.

Letters: B sequences, N tokens of a padded one, T packed tokens (queries), S packed tokens (keys), C channels, H heads,
D head width, Dv value width. Offsets [B + 1] say where each sequence begins in the packed rows, the last one is T.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from compiled_attn.ir.errors import OpError
from compiled_attn.ir.op import Cost, by_vjp, define
from compiled_attn.ops.rules import bytes_of, want_equal, want_floating, want_rank, widened

Tensor = torch.Tensor


def want_whole(op: str, name: str, tensor: Tensor) -> None:
    """Raises OpError unless the tensor holds int64."""
    if tensor.dtype != torch.int64:
        raise OpError(
            f"{op}: {name} holds {tensor.dtype}", facts="it takes torch.int64", do=f"convert {name} by .long() first"
        )


def whole_offsets(op: str, name: str, offsets: Tensor, rows: int, longest: int | None) -> list[int]:
    """The offsets as numbers. Raises OpError unless they rise from 0 to the number of rows, by at most `longest`."""
    found: list[int] = offsets.tolist()
    if not found or found[0] != 0 or found[-1] != rows or found != sorted(found):
        raise OpError(
            f"{op}: {name} does not cut all packed rows into sequences",
            facts=f"{name} is {found}, there are {rows} rows",
            do="let it begin with 0, never fall, and end with the number of rows",
        )
    most = max((b - a for a, b in pairwise(found)), default=0)
    if longest is not None and most > longest:
        raise OpError(
            f"{op}: a sequence of {name} is longer than was said",
            facts=f"longest is {longest}, and one has {most} rows",
            do="give the length of the longest sequence, or a bound on it",
        )
    return found


def sequence_of(count: Tensor, offsets: Tensor) -> Tensor:
    """[T] -> which sequence each packed row belongs to; `count` [T, ...] gives T."""
    row = torch.arange(count.shape[0], device=offsets.device)
    return (row.unsqueeze(1) >= offsets[1:].unsqueeze(0)).sum(1)


# pack_tokens: the tokens to keep, packed, with their places b * N + n, and where each sequence begins


def pack_reference(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_pack(x, keep)
    rows, places, begins = [], [], [0]
    for b in range(x.shape[0]):
        kept = keep[b].nonzero().squeeze(1)
        rows.append(x[b, kept])
        places.append(kept + b * x.shape[1])
        begins.append(begins[-1] + kept.shape[0])
    return torch.cat(rows), torch.cat(places), torch.tensor(begins, device=x.device)


def pack_shape(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_pack(x, keep)
    total = torch.library.get_ctx().new_dynamic_size(min=0)
    return (
        x.new_empty((total, x.shape[2])),
        keep.new_empty((total,), dtype=torch.int64),
        keep.new_empty((x.shape[0] + 1,), dtype=torch.int64),
    )


def _check_pack(x: Tensor, keep: Tensor) -> None:
    want_rank("pack_tokens", "x", x, "BNC")
    want_rank("pack_tokens", "keep", keep, "BN")
    want_floating("pack_tokens", "x", x)
    if keep.dtype != torch.bool:
        raise OpError(
            f"pack_tokens: keep holds {keep.dtype}", facts="it takes torch.bool", do="give the comparison itself"
        )
    want_equal("pack_tokens", "the batch size", "x", x.shape[0], "keep", keep.shape[0])
    want_equal("pack_tokens", "the number of tokens", "x", x.shape[1], "keep", keep.shape[1])


def pack_gradient(args: tuple[Any, ...], kwargs: dict[str, Any], grads: tuple[Any, ...]) -> tuple[Tensor | None, None]:
    """A kept token's row of the gradient stands where the count of kept tokens before it says; the others get zero."""
    del kwargs
    x, keep = args
    if grads[0] is None:
        return None, None
    count = keep.flatten().cumsum(0).view_as(keep) * keep  # 1, 2, ... for kept tokens, 0 for the others
    return F.pad(grads[0], (0, 0, 1, 0))[count].to(x.dtype), None


def pack_cost(x: Tensor, keep: Tensor) -> Cost:
    """One addition a token counts them; at most all are moved."""
    batch, count, _ = x.shape
    return Cost(batch * count, bytes_of(x, keep) + bytes_of(x) + batch * count * 8 + (batch + 1) * 8)


def pack_decomposition(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    place = keep.flatten().nonzero().squeeze(1)
    begins = F.pad(keep.sum(1).cumsum(0), (1, 0))
    return x.flatten(0, 1).index_select(0, place), place, begins


pack_tokens = define(
    "pack_tokens",
    "(Tensor x, Tensor keep) -> (Tensor, Tensor, Tensor)",
    reference=pack_reference,
    shape=pack_shape,
    gradient=pack_gradient,
    cost=pack_cost,
    decomposition=pack_decomposition,
)


# unpack_tokens: packed tokens put back to their places, on a canvas


def unpack_reference(tokens: Tensor, place: Tensor, canvas: Tensor) -> Tensor:
    unpack_shape(tokens, place, canvas)
    out = canvas.contiguous().clone()
    out.flatten(0, 1)[place] = tokens
    return out


def unpack_shape(tokens: Tensor, place: Tensor, canvas: Tensor) -> Tensor:
    op = "unpack_tokens"
    want_rank(op, "tokens", tokens, "TC")
    want_rank(op, "place", place, "T")
    want_rank(op, "canvas", canvas, "BNC")
    want_whole(op, "place", place)
    want_equal(op, "the number of packed tokens", "tokens", tokens.shape[0], "place", place.shape[0])
    want_equal(op, "the number of channels", "tokens", tokens.shape[1], "canvas", canvas.shape[2])
    if tokens.dtype != canvas.dtype:
        raise OpError(
            f"{op}: tokens and canvas disagree on the element type",
            facts=f"tokens holds {tokens.dtype}, canvas holds {canvas.dtype}",
            do="convert one to the other's type",
        )
    return canvas.new_empty(canvas.shape)


def unpack_cost(tokens: Tensor, place: Tensor, canvas: Tensor) -> Cost:
    """One multiplication a row finds its place; the canvas is read and written once."""
    return Cost(tokens.shape[0], bytes_of(tokens, place) + 2 * bytes_of(canvas))


def unpack_decomposition(tokens: Tensor, place: Tensor, canvas: Tensor) -> Tensor:
    flat = canvas.contiguous().flatten(0, 1).index_put((place,), tokens)
    return flat.reshape(canvas.shape).contiguous()


unpack_tokens = define(
    "unpack_tokens",
    "(Tensor tokens, Tensor place, Tensor canvas) -> Tensor",
    reference=unpack_reference,
    shape=unpack_shape,
    gradient=by_vjp(unpack_decomposition),
    cost=unpack_cost,
    decomposition=unpack_decomposition,
)


# ragged_attention: softmax(scale * q k^T) v within each sequence; a query that sees no key gets zeros


def ragged_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    scale: float,
    causal: bool = False,
    longest: Any = None,
) -> Tensor:
    """causal: query i of a sequence sees its keys 0 to i.  longest: no sequence has more queries or keys than that."""
    ragged_shape(q, k, v, q_offsets, k_offsets, scale=scale, causal=causal, longest=longest)
    wide, parts = widened(q.dtype), [q.new_empty((0, q.shape[1], v.shape[2]))]
    begin = whole_offsets("ragged_attention", "q_offsets", q_offsets, q.shape[0], longest)
    of = whole_offsets("ragged_attention", "k_offsets", k_offsets, k.shape[0], longest)
    for b in range(len(begin) - 1):
        asked = q[begin[b] : begin[b + 1]].to(wide)
        keys, values = k[of[b] : of[b + 1]].to(wide), v[of[b] : of[b + 1]].to(wide)
        scores = torch.einsum("thd,shd->hts", asked, keys) * scale
        if causal:
            seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~seen, float("-inf"))
        parts.append(torch.einsum("hts,she->the", scores.softmax(2), values).to(q.dtype))
    return torch.cat(parts)


def ragged_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    scale: float,
    causal: bool = False,
    longest: Any = None,
) -> Tensor:
    del scale, causal, longest
    op = "ragged_attention"
    for name, tensor, letters in (("q", q, "THD"), ("k", k, "SHD"), ("v", v, "SHE")):
        want_rank(op, name, tensor, letters)
        want_floating(op, name, tensor)
        want_equal(op, "the number of heads", "q", q.shape[1], name, tensor.shape[1])
        if tensor.dtype != q.dtype:
            raise OpError(
                f"{op}: q and {name} disagree on the element type",
                facts=f"q holds {q.dtype}, {name} holds {tensor.dtype}",
                do="convert one to the other's type",
            )
    want_equal(op, "the head width", "q", q.shape[2], "k", k.shape[2])
    want_equal(op, "the number of keys", "k", k.shape[0], "v", v.shape[0])
    for name, offsets in (("q_offsets", q_offsets), ("k_offsets", k_offsets)):
        want_rank(op, name, offsets, "B")
        want_whole(op, name, offsets)
    want_equal(op, "the number of sequences", "q_offsets", q_offsets.shape[0], "k_offsets", k_offsets.shape[0])
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


def ragged_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    scale: float,
    causal: bool = False,
    longest: Any = None,
) -> Cost:
    """Two products within each sequence, as if all were equally long; a causal mask halves them."""
    del scale, longest
    tokens, heads, width = q.shape
    pairs = tokens * k.shape[0] // (q_offsets.shape[0] - 1)
    flops = 2 * heads * pairs * (width + v.shape[2])
    out = tokens * heads * v.shape[2] * q.element_size()
    return Cost(flops // 2 if causal else flops, bytes_of(q, k, v, q_offsets, k_offsets) + out)


def ragged_decomposition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    scale: float,
    causal: bool = False,
    longest: Any = None,
) -> Tensor:
    """Padded to `longest` where that is said, B * longest^2 pairs; else one attention over all packed rows, T * S."""
    if longest is not None:
        return _padded(q, k, v, q_offsets, k_offsets, scale, causal, longest)
    return _masked(q, k, v, q_offsets, k_offsets, scale, causal)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float, causal: bool, longest: Any
) -> Tensor:
    """One row more stands behind the packed ones: what fills a sequence up reads it, and is hidden from the queries."""
    place = torch.arange(longest, device=q.device)
    wide = widened(q.dtype)

    def padded(packed: Tensor, offsets: Tensor, real: Tensor) -> Tensor:  # [T, H, D] -> [B, H, L, D]
        row = torch.where(real, offsets[:-1].unsqueeze(1) + place, offsets[-1:])
        rows = F.pad(packed, (0, 0, 0, 0, 0, 1)).index_select(0, row.flatten())
        return rows.reshape(*row.shape, packed.shape[1], packed.shape[2]).to(wide).transpose(1, 2)

    asked, given = (place < (offsets[1:] - offsets[:-1]).unsqueeze(1) for offsets in (q_offsets, k_offsets))
    mine, theirs, values = padded(q, q_offsets, asked), padded(k, k_offsets, given), padded(v, k_offsets, given)
    seen = given.unsqueeze(1)  # [B, 1, L]
    if causal:
        seen = seen & (place.unsqueeze(1) >= place)
    blind = ~seen.any(dim=2, keepdim=True).unsqueeze(1)  # [B, 1, 1 or L, 1]
    scores = (mine @ theirs.transpose(2, 3)) * scale
    weights = scores.masked_fill(~(seen.unsqueeze(1) | blind), float("-inf")).softmax(3).masked_fill(blind, 0.0)
    out = (weights @ values).transpose(1, 2).flatten(0, 1)  # [B * L, H, Dv]
    sequence = sequence_of(q, q_offsets)
    at = sequence * longest - q_offsets[sequence] + torch.arange(q.shape[0], device=q.device)
    return out.index_select(0, at).to(q.dtype)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float, causal: bool
) -> Tensor:
    """Two rows more, which see one another alone, stand behind: no compiler has to ask whether T is 0 or 1."""
    total = q.shape[0]
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, 2)) for t in (q, k, v))
    mine, theirs = sequence_of(q, q_offsets), sequence_of(k, k_offsets)
    seen = mine.unsqueeze(1) == theirs.unsqueeze(0)
    if causal:
        row = torch.arange(q.shape[0], device=q.device) - q_offsets[mine]
        column = torch.arange(k.shape[0], device=q.device) - k_offsets[theirs]
        seen = seen & (row.unsqueeze(1) >= column.unsqueeze(0))
    blind = ~seen.any(dim=1).unsqueeze(1)  # [T, 1]
    wide = widened(q.dtype)
    mine, theirs, values = (t.to(wide).transpose(0, 1) for t in (q, k, v))  # [H, T, D]
    scores = (mine @ theirs.transpose(1, 2)) * scale
    weights = scores.masked_fill(~(seen | blind), float("-inf")).softmax(2).masked_fill(blind, 0.0)
    return (weights @ values).narrow(1, 0, total).transpose(0, 1).contiguous().to(q.dtype)


ragged_attention = define(
    "ragged_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor k_offsets, *, float scale, bool causal=False, "
    "SymInt? longest=None) -> Tensor",
    reference=ragged_reference,
    shape=ragged_shape,
    gradient=by_vjp(ragged_decomposition),
    cost=ragged_cost,
    decomposition=ragged_decomposition,
)
