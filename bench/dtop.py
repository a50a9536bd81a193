"""SegViT-Base at 512 pixels with early exit of tokens (DToP) against its dense form: is saved work saved time?

    python -m bench.dtop --out dtop-report

Weights are random, so the thresholds are set where the given shares of live tokens leave behind each auxiliary head,
in the widest gap there between two tokens' confidences. The dense form is SegViT: the same weights, no auxiliary heads.
Both are compiled with a dynamic batch and timed in turns. Work is counted from what each picture kept, the heads
included. A time is printed only where the outputs equal those of the same network in eager mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

import compiled_attn as ca
from bench.cases import TOLERANCE, Case, build, difference, flops
from bench.timing import interleave
from compiled_attn.zoo.dtop import DToP

DYNAMIC = ({0: "batch"},)
LEAVING = (0.43, 0.33)  # of the live tokens, behind each auxiliary head


def pictures(batch: int, side: int) -> Tensor:
    """Random pictures of different contrast around 1, so that different numbers of their tokens leave."""
    noise = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(2))
    contrasts = torch.linspace(-1, 1, batch + 2)[1:-1].exp2()
    return noise * contrasts.view(-1, 1, 1, 1)


def with_thresholds(model: DToP, thresholds: Sequence[float]) -> DToP:
    """The network with the same weights and other thresholds, and with as many auxiliary heads."""
    stages = (*model.config.stages[: len(thresholds)], model.config.stages[-1])
    other = DToP(replace(model.config, stages=stages, thresholds=tuple(thresholds))).eval().requires_grad_(False)
    given = model.state_dict()
    other.load_state_dict({name: given[name] for name in other.state_dict()})
    return other


def thresholds_for(model: DToP, shares: Sequence[float], x: Tensor) -> tuple[float, ...]:
    """Thresholds above which those shares of the tokens that are live at each head lie."""
    found: tuple[float, ...] = ()
    for index, share in enumerate(shares):
        now = with_thresholds(model, (*found, 1.0))
        with torch.no_grad():
            stage = now.stages(now.backbone.embed(x)[0])[index]
            best = now.heads[index].predict(stage.canvas, stage.weight).amax(1)
        found += (between(best.flatten() if stage.live is None else best[stage.live.here], share),)
    return found


def between(values: Tensor, share: float) -> float:
    """A number that about that share of values lies above, in the widest gap near by."""
    ordered = values.sort().values
    middle, reach = round((1 - share) * len(ordered)), max(1, len(ordered) // 50)
    near = ordered[middle - reach : middle + reach + 1]
    widest = int(near.diff().argmax())
    return near[widest : widest + 2].mean().item()


def measure(model: DToP, batches: Sequence[int], side: int, rounds: int) -> list[str]:
    thresholds = thresholds_for(model, LEAVING, pictures(max(batches), side))
    models = {"dense": with_thresholds(model, ()), "pruned": with_thresholds(model, thresholds)}
    given = {"example_inputs": (pictures(2, side),), "dynamic_shapes": DYNAMIC}
    fast: dict[str, Any] = {}
    for name, net in tqdm(models.items(), desc="compiling", disable=None):
        fast[name] = ca.compile(net, **given, strict=True)
    lines = [
        f"thresholds {', '.join(f'{t:.4f}' for t in thresholds)}",
        f"{'batch':>5} {'':>6} {'GFLOPs':>8} {'ms':>9} {'cpu ms':>9} {'work saved':>10} {'time saved':>10}",
    ]
    for batch in batches:
        x = pictures(batch, side)
        with torch.no_grad():
            apart = {name: difference(fast[name](x), net(x)) for name, net in models.items()}
        work = {name: flops(net, x) / batch for name, net in models.items()}
        times = interleave({name: partial(call, x) for name, call in fast.items()}, rounds=rounds)
        for name, time in times.items():
            if apart[name] > TOLERANCE["float32"]:
                lines.append(f"{batch:>5} {name:>6} wrong by {apart[name]:.1e}: no time")
                continue
            saved = [1 - work[name] / work["dense"], 1 - time.cpu_median / times["dense"].cpu_median]
            lines.append(
                f"{batch:>5} {name:>6} {work[name] / 1e9:>8.1f} {time.median:>9.1f} {time.cpu_median:>9.1f} "
                + " ".join(f"{100 * s:>9.1f}%" for s in saved)
            )
    return lines


@click.command()
@click.option("--out", default="dtop-report", type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("--batch", "batches", multiple=True, default=(1, 4), show_default=True, help="Pictures in a batch.")
@click.option("--side", default=512, show_default=True, help="Pixels.")
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=7, show_default=True)
def main(out: Path, batches: tuple[int, ...], side: int, threads: int, rounds: int) -> None:
    """Times SegViT-Base dense and with tokens that leave early, in turns, and compares work and time saved."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    model, _ = build(Case("segvit_base", 1))
    head = f"SegViT-Base, {side} pixels, float32, threads {threads}; by process time, medians of {rounds} rounds"
    text = "\n".join([head, *measure(model, batches, side, rounds)])
    (out / "dtop.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
