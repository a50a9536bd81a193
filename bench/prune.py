"""DeiT-S whose patches are pruned per picture, against its dense form: does the time fall as the flops promise?

    python -m bench.prune --out prune-report

For each share of token work (0.9, 0.7, 0.5 of the dense form's, on average over pictures of different contrast) the
mass of `PruneTokens` is found by halving, the model is compiled with a dynamic batch and timed in turns with the dense
one. A time is printed only where the outputs equal those of the same program run op by op. Promised: dense flops over
pruned flops, from the tokens that each picture kept. Weights are random: what the pictures show does not matter here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

import compiled_attn as ca
from bench.cases import TOLERANCE, Case, build, difference
from bench.timing import interleave
from compiled_attn.passes.prune_tokens import with_kept_masks
from compiled_attn.runtime.build import Settings, prepare

AT = (3, 6, 9)
SHARES = (0.9, 0.7, 0.5)
DYNAMIC = ({0: "batch"},)
DEPTH, WIDTH, TOKENS = 12, 384, 197


@dataclass(frozen=True)
class Kept:
    """Tokens of each picture at each stage. work: tokens over all blocks, relative to the dense form's."""

    counts: tuple[Tensor, ...]

    def per_block(self) -> list[tuple[Tensor, Tensor]]:
        """(tokens of attention, tokens of the MLP) of each block: the MLP of a stage's block runs on what is left."""
        now, rows = torch.full_like(self.counts[0], TOKENS), []
        for block in range(DEPTH):
            after = self.counts[AT.index(block)] if block in AT else now
            rows.append((now, after))
            now = after
        return rows

    @property
    def work(self) -> float:
        """Of linear maps: a third of a block's in attention, two thirds in the MLP."""
        return sum(float(a.double().mean() + 2 * b.double().mean()) / 3 for a, b in self.per_block()) / DEPTH / TOKENS

    @property
    def promised(self) -> float:
        """Flops of the dense blocks over those of the pruned ones."""

        def flops(a: Tensor, b: Tensor) -> float:
            return float((8 * WIDTH**2 * a + 4 * WIDTH * a**2 + 16 * WIDTH**2 * b).double().sum())

        whole = torch.full_like(self.counts[0], TOKENS)
        return DEPTH * flops(whole, whole) / sum(flops(a, b) for a, b in self.per_block())


def pictures(batch: int) -> Tensor:
    """Random pictures of different contrast, so that they keep different numbers of patches."""
    noise = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    return noise * torch.linspace(0.3, 2, batch).view(-1, 1, 1, 1)


def program_of(model: nn.Module, mass: float) -> Any:
    passes = (ca.passes.PruneTokens(mass=mass, at=AT),)
    return prepare(model, (pictures(2),), None, Settings.of("auto", passes=passes, dynamic_shapes=DYNAMIC)).program


def kept(program: Any, x: Tensor) -> Kept:
    with torch.no_grad():
        _, masks = with_kept_masks(program)(x)
    return Kept(tuple(mask.sum(1) for mask in masks))


def mass_for(model: nn.Module, share: float, x: Tensor, steps: int = 6) -> float:
    """The mass at which that share of token work remains."""
    low, high = 0.1, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(program_of(model, middle), x).work < share else (low, middle)
    return round((low + high) / 2, 3)


def measure(model: nn.Module, shares: Sequence[float], batches: Sequence[int], rounds: int) -> list[str]:
    sample = pictures(8)
    masses = {share: mass_for(model, share, sample) for share in tqdm(shares, desc="finding masses", disable=None)}
    compiled: dict[str, Any] = {}
    passes: dict[str, list[Any]] = {"dense": []} | {
        f"{m:g}": [ca.passes.PruneTokens(mass=m, at=AT)] for m in masses.values()
    }
    for name, named in tqdm(passes.items(), desc="compiling", disable=None):
        given = {"example_inputs": (sample[:2],), "dynamic_shapes": DYNAMIC, "passes": named}
        compiled[name] = ca.compile(model, **given, strict=True)
    lines = [
        f"{'batch':>5} {'mass':>6} {'token work':>10} {'ms':>8} {'cpu ms':>8} {'promised':>9} {'got':>6} {'share':>6}"
    ]
    for batch in batches:
        x = pictures(batch)
        times = interleave({name: partial(fast, x) for name, fast in compiled.items()}, rounds=rounds)
        base = times["dense"]
        lines.append(f"{batch:>5} {'dense':>6} {1.0:>10.2f} {base.median:>8.1f} {base.cpu_median:>8.1f}")
        for mass in masses.values():
            program = compiled[f"{mass:g}"].programs[0]
            with torch.no_grad():
                apart = difference(compiled[f"{mass:g}"](x), program(x))
            if apart > TOLERANCE["float32"]:
                lines.append(f"{batch:>5} {mass:>6.3f} wrong by {apart:.1e}: no time")
                continue
            own, time = kept(program, x), times[f"{mass:g}"]
            got = base.cpu_median / time.cpu_median
            lines.append(
                f"{batch:>5} {mass:>6.3f} {own.work:>10.2f} {time.median:>8.1f} {time.cpu_median:>8.1f} "
                f"{own.promised:>8.2f}x {got:>5.2f}x {got / own.promised:>6.2f}"
            )
    return lines


@click.command()
@click.option("--out", default="prune-report", type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("--batch", "batches", multiple=True, default=(1, 8), show_default=True, help="Pictures in a batch.")
@click.option("--share", "shares", multiple=True, default=SHARES, show_default=True, help="Token work that remains.")
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=15, show_default=True)
def main(out: Path, batches: tuple[int, ...], shares: tuple[float, ...], threads: int, rounds: int) -> None:
    """Times DeiT-S dense and pruned in turns, and compares the speed-up with what the flops promise."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    model, _ = build(Case("deit_small", 1))
    head = f"DeiT-S, float32, threads {threads}; got: by process time, the median of {rounds} rounds in turns"
    text = "\n".join([head, *measure(model, shares, batches, rounds)])
    (out / "prune.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
