"""Neighborhoods mixed by given weights, by what models ask for, against other forms; one thread, process time.

    python -m bench.neighborhood_ops --out neighborhood-report

decomposed: the op's decomposition, fused by Inductor. unfold: windows cut out by im2col and a product, fused likewise
(zero borders only). Share: multiply-adds of the windows over those of a large matrix product in the same precision. A
peer whose numbers differ from the equation in float64 gets no time; medians of rounds taken in turn.
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
from compiled_attn.ops import neighborhood_apply

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """side: of the values' map. channels_first: weights [B, H, K, Y, X] and values [B, H, D, Y, X] in memory."""

    name: str
    heads: int
    side: int
    width: int
    window: int
    mixes: int = 1
    stride: int = 1
    border: str = "zero"
    channels_first: bool = False

    @property
    def options(self) -> dict[str, Any]:
        pattern = {"stride": [self.stride] * 2, "block": [1, 1]} if self.stride > 1 else {}
        return {"window": [self.window] * 2, "border": self.border, **pattern}

    @property
    def queries(self) -> int:
        return self.side // self.stride

    @property
    def flops(self) -> int:
        """Of whole windows, whether or not a border cuts them."""
        return 2 * self.heads * self.queries**2 * self.mixes * self.window**2 * self.width

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """weights [1, Y, X, H, M, K] and values [1, Y', X', H, D]."""
        random = torch.Generator().manual_seed(0)
        sizes = (self.heads, self.mixes, self.window**2)
        weights = torch.randn(1, self.queries, self.queries, *sizes, generator=random).softmax(-1).to(dtype)
        v = torch.randn(1, self.side, self.side, self.heads, self.width, generator=random).to(dtype)
        if self.channels_first:
            weights = weights.permute(0, 3, 4, 5, 1, 2).contiguous().permute(0, 4, 5, 1, 2, 3)
            v = v.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        return weights, v


CASES = (
    Case("VOLO-D1", 6, 28, 32, 3, 9, 2),
    Case("VOLO-D5 at 512", 12, 64, 32, 3, 9, 2),
    Case("involution 7x7", 16, 56, 16, 7),
    Case("OverLoCK-T 5x5", 8, 14, 16, 5, border="clamp", channels_first=True),
    Case("OverLoCK-T 13x13", 8, 14, 16, 13, border="clamp", channels_first=True),
    Case("dynamic 3x3", 4, 56, 64, 3),
)


class Ours(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.options = case.options

    def forward(self, weights: Tensor, v: Tensor) -> Tensor:
        return neighborhood_apply(weights, v, **self.options)


class Decomposed(Ours):
    def forward(self, weights: Tensor, v: Tensor) -> Tensor:
        return neighborhood_apply.decomposition(weights, v, **self.options)


class Unfold(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.cut = {"kernel_size": case.window, "padding": case.window // 2, "stride": case.stride}

    def forward(self, weights: Tensor, v: Tensor) -> Tensor:
        batch, rows, columns, heads, _, slots = weights.shape
        cut = F.unfold(v.flatten(3).permute(0, 3, 1, 2), **self.cut).view(batch, heads, -1, slots, rows, columns)
        return weights @ cut.permute(0, 4, 5, 1, 3, 2)


PEERS = ("ours", "decomposed", "unfold")


def calls(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Peer -> one call; the first is the equation in float64."""
    weights, v = case.tensors(dtype)
    torch._dynamo.reset()
    made: dict[str, Callable[[], Tensor]] = {
        "reference": lambda: neighborhood_apply.reference(weights.double(), v.double(), **case.options),
        "ours": partial(ca.compile(Ours(case), example_inputs=(weights, v), strict=True), weights, v),
        "decomposed": partial(torch.compile(Decomposed(case), dynamic=False), weights, v),
    }
    if case.border == "zero":
        made["unfold"] = partial(torch.compile(Unfold(case), dynamic=False), weights, v)
    return made


def line(case: Case, precision: str, rate: float, rounds: int) -> str:
    """The case's row, microseconds of process time. rate: GFLOP/s of a matrix product."""
    with torch.no_grad():
        made = calls(case, DTYPES[precision])
        wanted = made.pop("reference")()
        good = {name: call for name, call in made.items() if difference(call(), wanted) <= TOLERANCE[precision]}
        times = {n: t.cpu_median for n, t in interleave(good, rounds=rounds, round_seconds=0.05).items()}
    cells = {name: f"{1e3 * times[name]:.0f}" if name in times else "wrong" for name in made}
    share = case.flops / (times["ours"] * 1e-3) / (rate * 1e9) if "ours" in times else float("nan")
    ratios = [f"{times[n] / times['ours']:10.2f}x" if n in times else f"{'-':>11}" for n in PEERS[1:]]
    what = f"{case.name:<17} {case.heads:>2} x {case.side}x{case.side}x{case.width:<3} {precision:<8}"
    return f"{what} " + " ".join(f"{cells.get(n, '-'):>10}" for n in PEERS) + f" {share:>6.2f} " + " ".join(ratios)


@click.command()
@click.option("--out", default="neighborhood-report", type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("--precision", "precisions", multiple=True, default=("float32", "bf16"), show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--case", "pattern", default="", help="Only cases whose name holds this.")
def main(out: Path, precisions: tuple[str, ...], rounds: int, pattern: str) -> None:
    """Times mixed neighborhoods beside their other forms, in turns."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    rates = {p: roof.measure(p).gflops_cpu for p in precisions}
    said = ", ".join(f"{rate:.0f} GFLOP/s in {p}" for p, rate in rates.items())
    heads = " ".join(f"{n:>10}" for n in PEERS) + f" {'share':>6} " + " ".join(f"{n:>11}" for n in PEERS[1:])
    lines = [
        f"threads 1; a matrix product does {said}",
        f"{'':<17} {'heads x map':<14} {'':<8} {heads}   (microseconds; share of the product's rate; times as slow)",
    ]
    print("\n".join(lines))
    for precision in precisions:
        for case in (c for c in CASES if pattern in c.name):
            lines.append(line(case, precision, rates[precision], rounds))
            print(lines[-1], flush=True)
    (out / "neighborhood_ops.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
