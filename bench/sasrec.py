"""SASRec over histories of power-law lengths: real items packed, against the same network on padded rows.

    python -m bench.sasrec --out sasrec-report

Both have the official layout and the same weights (MovieLens-1M's size: 3416 items, at most 200 steps), are compiled
for one batch and timed in turns. Padded: attention under a causal mask that also hides pads, linear maps on every row.
A time is printed only where both give the scores of the packed network in eager mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import compiled_attn as ca
from bench.cases import TOLERANCE, difference
from bench.timing import interleave
from compiled_attn.zoo.sasrec import Block, Config, OfficialSASRec

HIDDEN = -3e4  # the score of what is not seen: its softmax is zero
SHORTEST = 5  # the data sets' filter leaves out users with fewer items


class Padded(OfficialSASRec):
    """The official layout on all rows [B, L, C], as its own code computes it."""

    def features(self, sequence: Tensor) -> Tensor:
        real = (sequence != 0).unsqueeze(-1)
        length = sequence.shape[1]
        x = self.table()[sequence] * self.config.width**0.5 + self.SASRec.dec_pos.lookup_table[:length]
        step = torch.arange(length, device=x.device)
        causal, own = step[:, None] >= step, step[:, None] == step  # own: lest a pad's row sees nothing at all
        hidden = ~(causal & real.mT | own).unsqueeze(1)  # [B, 1, L, L]
        bias = torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, HIDDEN)
        x = x * real
        for index in range(self.config.depth):
            x = padded_block(self.SASRec.get_submodule(f"num_blocks_{index}"), x, bias) * real
        return self.SASRec.ln(x)


def padded_block(block: Block, x: Tensor, bias: Tensor) -> Tensor:
    """A block on rows [B, L, C]; bias [B, 1, L, L]."""
    part, query = block.self_attention, block.ln(x)
    q, k, v = (
        t.unflatten(2, (part.heads, -1)).transpose(1, 2) for t in (part.dense(query), part.dense_1(x), part.dense_2(x))
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    x = block.ln_1(query + out)
    return x + block.multihead_attention(x)


def histories(config: Config, batch: int, power: float) -> Tensor:
    """Random ids [B, length], padded on the left; a history of n items is n ** -power times as frequent as one of 1."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, config.items + 1, (batch, config.length), generator=generator)
    lengths = torch.arange(SHORTEST, config.length + 1)
    drawn = lengths[torch.multinomial(lengths.double() ** -power, batch, replacement=True, generator=generator)]
    return ids * (torch.arange(config.length) >= config.length - drawn.unsqueeze(1))


def measure(config: Config, batches: Sequence[int], powers: Sequence[float], rounds: int) -> list[str]:
    torch.manual_seed(0)
    models = {"packed": OfficialSASRec(config).eval(), "padded": Padded(config).eval()}
    models["padded"].load_state_dict(models["packed"].state_dict())
    lines = [
        f"{'batch':>5} {'power':>5} {'steps':>6} {'real rows':>9} {'packed ms':>9} {'padded ms':>9} {'faster':>7}",
    ]
    for batch in tqdm(batches, desc="batches", disable=None):
        given = {"example_inputs": (histories(config, batch, powers[0]),), "strict": True}
        fast: dict[str, Any] = {name: ca.compile(model, **given) for name, model in models.items()}
        for power in powers:
            x = histories(config, batch, power)
            steps = (x != 0).sum(1).double().mean().item()
            row = f"{batch:>5} {power:>5g} {steps:>6.1f} {100 * steps / config.length:>8.1f}%"
            with torch.no_grad():
                want = models["packed"](x)
                apart = {name: difference(call(x), want) for name, call in fast.items()}
            if max(apart.values()) > TOLERANCE["float32"]:
                lines.append(f"{row} wrong by {apart}: no time")
                continue
            times = interleave({name: partial(call, x) for name, call in fast.items()}, rounds=rounds)
            packed, padded = (times[name].cpu_median for name in ("packed", "padded"))
            lines.append(f"{row} {packed:>9.2f} {padded:>9.2f} {padded / packed:>6.2f}x")
    return lines


@click.command()
@click.option("--out", default="sasrec-report", type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("--batch", "batches", multiple=True, default=(1, 128), show_default=True, help="Histories in a batch.")
@click.option("--power", "powers", multiple=True, default=(1.0, 1.5, 2.0), show_default=True, help="Of their lengths.")
@click.option("--items", default=3416, show_default=True)
@click.option("--length", default=200, show_default=True, help="Steps of the longest history.")
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=15, show_default=True)
def main(
    out: Path, batches: tuple[int, ...], powers: tuple[float, ...], items: int, length: int, threads: int, rounds: int
) -> None:
    """Times SASRec's official layout, packed and padded, in turns, over histories of power-law lengths."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    config = Config(items, length=length, layout="official")
    head = f"SASRec, {items} items, {length} steps, float32, threads {threads}; process time, {rounds} rounds in turns"
    text = "\n".join([head, *measure(config, batches, powers, rounds)])
    (out / "sasrec.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
