"""EViT: "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations".

Liang et al., ICLR 2022, https://arxiv.org/abs/2202.07800. In a few blocks, the patches that the class token attends to
least are dropped between attention and MLP, or fused into one token by their attention; nothing is learned for it, so
DeiT's checkpoints fit key for key.

Reference: youweiliang/evit at 5ca95a7cf4a8637193284895c5bc0dd9dc365982 (evit.py).
Known differences: those of deit.py; no distilled form (the reference's does not run); where the picture's size is
symbolic, the count of kept tokens is the ceiling of the exact product, which Python's float product can exceed
(ceil(0.55 * 100) is 56).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.ops import attention_with_class_row, select_tokens
from compiled_attn.zoo import deit
from compiled_attn.zoo.layers import vit
from compiled_attn.zoo.paper import Paper, Published

LOCATIONS = (3, 6, 9)  # the blocks that reorganise in all of the paper's networks, 0-based


def rates(keep_rate: float, at: tuple[int, ...] = LOCATIONS, depth: int = 12) -> tuple[float, ...]:
    """One keep rate a block: `keep_rate` in the blocks `at`, 1 elsewhere."""
    return tuple(keep_rate if i in at else 1.0 for i in range(depth))


@dataclass(frozen=True)
class Config(deit.Config):
    """keep_rate: the share of tokens after the class token that each block keeps; fuse: the others become one."""

    keep_rate: tuple[float, ...] = rates(0.7)
    fuse: bool = True

    def __post_init__(self) -> None:
        if len(self.keep_rate) != self.depth or not all(0 < rate <= 1 for rate in self.keep_rate):
            raise CompiledAttnError(
                "the keep rates do not fit the network",
                where="zoo.evit.Config",
                facts=f"keep_rate is {self.keep_rate}, depth is {self.depth}",
                do=f"give {self.depth} rates above 0 and at most 1, as evit.rates(0.7, at=(3, 6, 9), depth=12) does",
            )


class Block(vit.Block):
    """A block that keeps ceil(keep_rate * (N - 1)) of its tokens between attention and MLP (section 3.2, figure 2)."""

    def __init__(self, width: int, heads: int, hidden: int, keep_rate: float, fuse: bool) -> None:
        super().__init__(width, heads, hidden)
        self.keep_rate = keep_rate
        self.fuse = fuse

    def forward(
        self, x: Tensor, keep_rate: float | None = None, tokens: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, N, C] to the remaining tokens, and the positions [B, K] kept (None where all are).

        keep_rate replaces this block's own where that is below 1; tokens is K itself, whatever the rates.
        """
        if self.keep_rate >= 1 and tokens is None:
            return super().forward(x), None
        out, row = attention_with_class_row(*self.attn.heads_of(self.norm1(x)), scale=self.attn.scale)
        x = x + self.attn.proj(out.transpose(1, 2).flatten(2))
        x, index = reorganise(x, row, self.keep_rate, keep_rate, tokens, self.fuse)
        return x + self.mlp(self.norm2(x)), index


class EViT(deit.DeiT):
    """Pictures [B, in_chans, Y, X] to logits [B, classes]; `config.keep_rate` has one rate for each block."""

    config: Config

    def block(self, index: int) -> Block:
        config = self.config
        hidden = config.mlp_ratio * config.width
        return Block(config.width, config.heads, hidden, config.keep_rate[index], config.fuse)

    def forward(
        self,
        x: Tensor,
        keep_rate: float | Sequence[float] | None = None,
        tokens: int | Sequence[int | None] | None = None,
    ) -> Tensor:
        """keep_rate and tokens, each for all blocks or one a block, as in `Block.forward`."""
        return self.forward_with_kept(x, keep_rate, tokens)[0]

    def forward_with_kept(
        self,
        x: Tensor,
        keep_rate: float | Sequence[float] | None = None,
        tokens: int | Sequence[int | None] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits, and for each block that dropped something the positions [B, K] that it kept, best first.

        Positions count behind the class token in that block's own sequence; `patch_numbers` finds them in the picture.
        """
        depth, kept = len(self.blocks), []
        block_rates = keep_rate if isinstance(keep_rate, (tuple, list)) else (keep_rate,) * depth
        block_tokens = tokens if isinstance(tokens, (tuple, list)) else (tokens,) * depth
        x = self.embed(x)
        for block, rate, count in zip(self.blocks, block_rates, block_tokens, strict=True):
            x, index = block(x, rate, count)
            kept += [] if index is None else [index]
        return self.classify(x), kept

    def patch_numbers(self, kept: list[Tensor], patches: int) -> list[Tensor]:
        """What `forward_with_kept` kept as row-major patch numbers [B, K] of the picture, ascending.

        patches: how many the picture has; a fused token that was itself kept counts as number `patches`.
        """
        found: list[Tensor] = []
        if not kept:
            return found
        numbers = torch.arange(patches, device=kept[0].device).expand(kept[0].shape[0], -1)
        for index in kept:
            numbers = numbers.gather(1, index)
            found.append(numbers.sort(dim=1).values)
            if self.config.fuse:
                numbers = torch.cat([numbers, numbers.new_full((numbers.shape[0], 1), patches)], dim=1)
        return found


@torch.fx.wrap
def reorganise(
    x: Tensor, row: Tensor, own_rate: float, keep_rate: float | None, tokens: int | None, fuse: bool
) -> tuple[Tensor, Tensor | None]:
    """Tokens x [B, N, C] without those that the class row [B, N] ranks lowest, and the positions [B, K] that stay."""
    count = x.shape[1] - 1
    rate = own_rate if keep_rate is None or own_rate >= 1 else keep_rate
    keep = kept_count(count, rate) if tokens is None else tokens
    if keep == count:
        return x, None
    return select_tokens(x, row[:, 1:], keep, fuse=fuse)


def kept_count(count: int, keep_rate: float) -> int:
    """Ceil(keep_rate * count): by floats as the reference for a number, by integers for a symbolic count."""
    if keep_rate >= 1:
        return count
    if isinstance(count, int):
        return math.ceil(keep_rate * count)
    share = Fraction(str(keep_rate))
    return -(-count * share.numerator // share.denominator)


def _variants() -> dict[str, Config]:
    rows: dict[str, Config] = {}
    for size, base in (("s", deit.S), ("b", deit.B)):
        for percent in (90, 80, 70, 60, 50):
            for suffix, fuse in (("_fuse", True), ("", False)):
                row = Config(base.width, base.heads, keep_rate=rates(percent / 100), fuse=fuse)
                rows[f"evit_{size}_k{percent // 10:02d}{suffix}"] = row
    for img_size, percent in ((272, 70), (288, 60), (304, 50)):
        rows[f"evit_s_k{percent // 10:02d}_fuse_{img_size}"] = replace(
            rows[f"evit_s_k{percent // 10:02d}_fuse"], img_size=img_size
        )
    rows["digits_tiny"] = Config(**vars(deit.DIGITS))
    return rows


def _row(gmacs: float | None, stated: float, top1: float, images_per_second: int) -> Published:
    return Published(22_050_664, gmacs, stated, top1, images_per_second)


# The reference's README (images per second on one A100); measured GMACs, and all of EViT-B: card of EViT.
PAPER = Paper(
    title="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
    year=2022,
    link="https://arxiv.org/abs/2202.07800",
    reference="youweiliang/evit@5ca95a7cf4a8637193284895c5bc0dd9dc365982",
    model=EViT,
    variants=_variants(),
    tiny=Config(width=32, heads=2, depth=2, img_size=32, patch_size=8, classes=10, keep_rate=(1.0, 0.7)),
    published={
        "evit_s_k09_fuse": _row(4.030, 4.0, 79.8, 3197),
        "evit_s_k09": _row(3.996, 4.0, 79.9, 3201),
        "evit_s_k08_fuse": _row(3.484, 3.5, 79.8, 3619),
        "evit_s_k08": _row(3.451, 3.5, 79.7, 3772),
        "evit_s_k07_fuse": _row(3.036, 3.0, 79.5, 4385),
        "evit_s_k07": _row(3.003, 3.0, 79.4, 4249),
        "evit_s_k06_fuse": _row(2.641, 2.6, 78.9, 4722),
        "evit_s_k06": _row(2.614, 2.6, 79.1, 4967),
        "evit_s_k05_fuse": _row(2.314, 2.3, 78.5, 5408),
        "evit_s_k05": _row(2.287, 2.3, 78.4, 5325),
        "evit_b_k07_fuse": Published(parameters=86_567_656, gmacs=11.62, top1=81.3),
    },
    keys="DeiT's, unchanged; the reference's files hold them under `model`",
    weights={"digits_tiny": "digits_tiny.safetensors"},
)
