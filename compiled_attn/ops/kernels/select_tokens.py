"""Keep the tokens of largest score and, if asked, fold the others into one: ranking, gather and sum in one kernel.

A token's rank is the number of tokens that come before it: those with a larger score, those of equal score and lower
index, and, for a NaN, every number. The rank is the output position, so nothing is sorted and nothing is exchanged
between programs: each recounts what it needs (M comparisons a token), which makes the result deterministic.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (an annotation on a kernel argument is read by Triton as its type in the launch signature)

import triton
import triton.language as tl


@triton.jit
def select_tokens(
    x_ptr,
    score_ptr,
    tokens_ptr,
    index_ptr,
    stride_xb,
    stride_xn,
    stride_xc,
    stride_sb,
    stride_sm,
    M,
    C,
    keep,
    prefix,
    FUSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x [B,prefix+M,C], score [B,M] -> tokens [B,prefix+keep(+1),C], index [B,keep] int64, both contiguous.

    The first cdiv(M, BLOCK_M) programs of a batch entry rank and copy BLOCK_M tokens each (the first of them copies the
    prefix as well); with FUSE, cdiv(C, BLOCK_C) more each sum score_j x_j over the dropped tokens for BLOCK_C channels,
    in float32 and in order of j.
    """
    row_blocks = tl.cdiv(M, BLOCK_M)
    programs = row_blocks
    if FUSE:
        programs = row_blocks + tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) % programs
    b = (tl.program_id(0) // programs).to(tl.int64)
    x_ptr += b * stride_xb
    score_ptr += b * stride_sb
    tokens_ptr += b * (prefix + keep + (1 if FUSE else 0)) * C
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)

    if part < row_blocks:
        at = part * BLOCK_M + offs_m
        rank, _ = _rank(score_ptr, stride_sm, at, M, BLOCK_J)  # [BLOCK_M]
        kept = (at < M) & (rank < keep)
        tl.store(index_ptr + b * keep + rank, at.to(tl.int64), mask=kept)
        source = x_ptr + (prefix + at).to(tl.int64)[:, None] * stride_xn
        goal = tokens_ptr + (prefix + rank).to(tl.int64)[:, None] * C
        for start_c in range(0, C, BLOCK_C):
            channel = (start_c + offs_c).to(tl.int64)[None, :]
            mask = kept[:, None] & (channel < C)
            tl.store(goal + channel, tl.load(source + channel * stride_xc, mask=mask), mask=mask)
        if part == 0:
            for n in range(0, prefix):
                row = x_ptr + tl.cast(n, tl.int64) * stride_xn
                for start_c in range(0, C, BLOCK_C):
                    channel = (start_c + offs_c).to(tl.int64)
                    value = tl.load(row + channel * stride_xc, mask=channel < C)
                    tl.store(tokens_ptr + tl.cast(n, tl.int64) * C + channel, value, mask=channel < C)
    elif FUSE:
        channel = ((part - row_blocks) * BLOCK_C + offs_c).to(tl.int64)
        acc = tl.zeros([BLOCK_C], tl.float32)
        for start_m in range(0, M, BLOCK_M):
            at = start_m + offs_m
            rank, score = _rank(score_ptr, stride_sm, at, M, BLOCK_J)  # [BLOCK_M]
            dropped = (at < M) & (rank >= keep)
            source = x_ptr + (prefix + at).to(tl.int64)[:, None] * stride_xn + channel[None, :] * stride_xc
            x = tl.load(source, mask=dropped[:, None] & (channel[None, :] < C), other=0.0)  # [BLOCK_M, BLOCK_C]
            acc += tl.sum(tl.where(dropped, score, 0.0)[:, None] * x.to(tl.float32), 0)
        row = tokens_ptr + tl.cast(prefix + keep, tl.int64) * C
        tl.store(row + channel, acc.to(tokens_ptr.dtype.element_ty), mask=channel < C)


@triton.jit
def _rank(score_ptr, stride_sm, at, M, BLOCK_J: tl.constexpr):
    """The ranks and float32 scores of the tokens `at` [BLOCK_M]; where at >= M the rank means nothing."""
    mine = tl.load(score_ptr + at.to(tl.int64) * stride_sm, mask=at < M, other=0.0).to(tl.float32)
    mine_key = _order(mine)
    rank = tl.zeros_like(at)
    for start_j in range(0, M, BLOCK_J):
        other = start_j + tl.arange(0, BLOCK_J)
        score = tl.load(score_ptr + other.to(tl.int64) * stride_sm, mask=other < M, other=0.0)  # [BLOCK_J]
        key = _order(score.to(tl.float32))
        earlier = (key[None, :] == mine_key[:, None]) & (other[None, :] < at[:, None])
        before = ((key[None, :] > mine_key[:, None]) | earlier) & (other[None, :] < M)
        rank += tl.sum(before.to(tl.int32), 1)
    return rank, mine


@triton.jit
def _order(score):
    """Integers that compare as float32 `score` does: -0 equals 0, and a NaN comes below -inf."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score == score, key, -0x80000000)
