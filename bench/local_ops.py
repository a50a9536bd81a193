"""Neighborhood attention by size, dilation and precision, against others and a matrix product's rate; one thread.

    python -m bench.local_ops --out local-report

7x7 neighborhoods with relative-position bias: 8 heads of 32 on a 56x56 map, and the four stages of DiNAT-mini, dilated
and not. gather: our op's gather form, fused by Inductor. dense: every pair of positions, scaled_dot_product_attention
with a mask that holds the bias. flex: FlexAttention, compiled, mask and bias as its functions. Share of the product's
rate: multiply-adds inside the windows over those of a large matrix product in the same precision. A peer whose numbers
differ from the equation in float64 gets no time; process time is given, medians of rounds taken in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compiled_attn as ca
from bench import roof
from bench.cases import TOLERANCE, difference
from bench.timing import interleave
from compiled_attn.ops import local_attention
from compiled_attn.ops.local_geometry import axes_of, slots

WINDOW = 7
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One picture's map of side x side positions."""

    name: str
    heads: int
    side: int
    dilation: int = 1
    width: int = 32

    @property
    def options(self) -> dict[str, Any]:
        return {"window": [WINDOW] * 2, "dilation": [self.dilation] * 2, "scale": self.width**-0.5}

    @property
    def flops(self) -> int:
        """Of both products; every query has a whole window, since a border moves it."""
        return 4 * self.heads * self.side**2 * WINDOW**2 * self.width


CASES = (
    Case("map of 56", 8, 56),
    Case("DiNAT stage 1", 2, 56),
    Case("DiNAT stage 1", 2, 56, 8),
    Case("DiNAT stage 2", 4, 28),
    Case("DiNAT stage 2", 4, 28, 4),
    Case("DiNAT stage 3", 8, 14),
    Case("DiNAT stage 3", 8, 14, 2),
    Case("DiNAT stage 4", 16, 7),
)


class Local(nn.Module):
    """The op on slices of a joint projection [1, Y, X, 3, H, D]."""

    def __init__(self, options: dict[str, Any], bias: Tensor) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("bias", bias)

    def forward(self, qkv: Tensor) -> Tensor:
        return local_attention(*qkv.unbind(3), self.bias, **self.options)


class Gather(Local):
    def forward(self, qkv: Tensor) -> Tensor:
        return local_attention.decomposition(*qkv.unbind(3), self.bias, **self.options)


def dense_bias(case: Case, bias: Tensor) -> Tensor:
    """[H, N, N]: the bias of each pair of positions, minus infinity outside of the window."""
    side = case.side
    axis = axes_of(2, [WINDOW] * 2, None, [case.dilation] * 2, None, None, "clamp", None, 0)[0]
    along = slots(axis, side, side, bias.device, single=True)
    keys, offsets = along.index, along.offset.squeeze(1)  # [side, window] each
    found = bias.new_full((case.heads, side, side, side, side), float("-inf"))
    y, x = torch.arange(side).view(-1, 1, 1, 1), torch.arange(side).view(-1, 1, 1)
    found[:, y, x, keys[:, None, :, None], keys[:, None, :]] = bias[:, offsets[:, None, :, None], offsets[:, None, :]]
    return found.view(case.heads, side**2, side**2)


def calls(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Peer -> one call with the output [1, Y, X, H, D]; the first is the equation in float64."""
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, case.side, case.side, 3, case.heads, case.width, generator=random).to(dtype)
    bias = torch.randn(case.heads, *[2 * WINDOW - 1] * 2, generator=random).to(dtype)
    torch._dynamo.reset()
    ours = ca.compile(Local(case.options, bias), example_inputs=(qkv,), strict=True)
    gather = torch.compile(Gather(case.options, bias), dynamic=False)
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in qkv.unbind(3))  # [1, H, N, D]
    mask = dense_bias(case, bias)

    def dense() -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=case.options["scale"])
        return out.transpose(1, 2).view(1, case.side, case.side, case.heads, case.width)

    made: dict[str, Callable[[], Tensor]] = {
        "reference": lambda: local_attention.reference(*qkv.double().unbind(3), bias.double(), **case.options),
        "ours": partial(ours, qkv),
        "gather": partial(gather, qkv),
        "dense": dense,
    }
    return {**made, "flex": flex(case, (q, k, v), mask)}


def flex(case: Case, given: tuple[Tensor, Tensor, Tensor], added: Tensor) -> Callable[[], Tensor]:
    """FlexAttention with the bias from a table of pairs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    places = case.side**2
    seen, table = added[0].isfinite(), added.nan_to_num(neginf=0.0).float()
    mask = create_block_mask(lambda _b, _h, i, j: seen[i, j], None, None, places, places, device="cpu")
    fast = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        out = fast(
            *given,
            score_mod=lambda score, _b, h, i, j: score + table[h, i, j],
            block_mask=mask,
            scale=case.options["scale"],
        )
        return out.transpose(1, 2).reshape(1, case.side, case.side, case.heads, case.width)

    return call


PEERS = ("ours", "gather", "dense", "flex")


def line(case: Case, precision: str, rate: float, rounds: int) -> str:
    """The case's row, microseconds of process time. rate: GFLOP/s of a matrix product."""
    with torch.no_grad():
        made = calls(case, DTYPES[precision])
        wanted = made.pop("reference")()
        good, cells = {}, {}
        for name, call in made.items():
            try:
                apart = difference(call(), wanted)
            except Exception as error:
                cells[name] = type(error).__name__
                continue
            if apart <= TOLERANCE[precision]:
                good[name] = call
            else:
                cells[name] = "wrong"
        times = {n: t.cpu_median for n, t in interleave(good, rounds=rounds, round_seconds=0.05).items()}
    cells |= {name: f"{1e3 * time:.0f}" for name, time in times.items()}
    share = case.flops / (times["ours"] * 1e-3) / (rate * 1e9) if "ours" in times else float("nan")
    ratios = [f"{times[n] / times['ours']:8.2f}x" if n in times else f"{'-':>9}" for n in PEERS[1:]]
    what = f"{case.name:<14} {case.heads:>2} x {case.side}x{case.side:<3} d{case.dilation} {precision:<8}"
    return f"{what} " + " ".join(f"{cells[n]:>9}" for n in PEERS) + f" {share:>7.2f}  " + " ".join(ratios)


@click.command()
@click.option("--out", default="local-report", type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("--precision", "precisions", multiple=True, default=("float32", "bf16"), show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=9, show_default=True)
def main(out: Path, precisions: tuple[str, ...], threads: int, rounds: int) -> None:
    """Times neighborhood attention beside its other forms, in turns."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    rates = {p: roof.measure(p).gflops_cpu for p in precisions}
    said = ", ".join(f"{rate:.0f} GFLOP/s in {p}" for p, rate in rates.items())
    heads = " ".join(f"{n:>9}" for n in PEERS) + f" {'share':>7}  " + " ".join(f"{n:>9}" for n in PEERS[1:])
    lines = [
        f"7x7 neighborhoods, heads of 32, with bias; threads {threads}; a matrix product does {said}",
        f"{'':<14} {'heads x map':<12} {'':<8} {heads}   (microseconds; share of the product's rate; times as slow)",
    ]
    print("\n".join(lines))
    for precision in precisions:
        for case in CASES:
            lines.append(line(case, precision, rates[precision], rounds))
            print(lines[-1], flush=True)
    (out / "local_ops.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
