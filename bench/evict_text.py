"""Perplexity against budget for every eviction policy, on held-out text: python -m bench.evict_text

The model is that of bench/train_text.py. Texts of 512 bytes are read in chunks of 8; behind each the cache forgets what
is beyond the budget. What is scored are the bytes from 256 on, each by the logits of the byte before it.
Writes a table and a plot into bench/results/eviction, and beside them where the model's attention goes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.train_text import WEIGHTS, corpus, trained
from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.evict_kv import EvictKV
from compiled_attn.passes.evict_policies import (
    HeavyHitters,
    KeyNorm,
    Policy,
    Protect,
    SinkAndRecent,
    SlidingWindow,
    SnapKV,
    Tova,
)
from compiled_attn.passes.pipelines import portable
from compiled_attn.runtime import conversation
from compiled_attn.runtime.decoder import captured
from compiled_attn.runtime.describe import call_of
from compiled_attn.runtime.generate import runner

RESULTS = Path(__file__).parent / "results" / "eviction"
LENGTH, CHUNK, SCORED = 512, 8, 256
SINKS, RECENT = 4, 16
BUDGETS = (16, 32, 64, 128)
POLICIES: dict[str, Callable[[int], Policy]] = {
    "recent only": lambda _: SlidingWindow(),
    "sinks and recent": lambda _: SinkAndRecent(sinks=4),
    "sinks, rolling positions": lambda _: SinkAndRecent(sinks=4, rolling=True),
    "H2O": lambda budget: HeavyHitters(recent=budget // 2),
    "TOVA": lambda _: Tova(),
    "SnapKV": lambda budget: SnapKV(window=budget // 2),
    "key norm, half recent": lambda budget: Protect(KeyNorm(), sinks=4, recent=budget // 2),
}


def texts(count: int, seed: int = 0) -> torch.Tensor:
    """[count, LENGTH] bytes of the held-out files."""
    held = corpus()[1]
    at = torch.randint(0, held.numel() - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([held[i : i + LENGTH] for i in at.tolist()])


def nats(program: Program, tokens: torch.Tensor) -> torch.Tensor:
    """Mean of -log p a text, [count], over the scored bytes."""
    read = runner(program)
    made = conversation.fresh(call_of(program), tokens.shape[0], torch.device("cpu"))
    places = torch.arange(LENGTH).expand(tokens.shape)
    logits = [
        read(chunk.contiguous(), at.contiguous(), made.state, slots=made.slots)
        for chunk, at in zip(tokens.split(CHUNK, 1), places.split(CHUNK, 1), strict=True)
    ]
    known = torch.cat(logits, 1)[:, SCORED - 1 : -1].log_softmax(2)
    return -known.gather(2, tokens[:, SCORED:, None]).squeeze(2).mean(1)


def shares(model: Any, tokens: torch.Tensor) -> list[tuple[float, float]]:
    """What the first SINKS and the last RECENT tokens get of the attention of the scored bytes' queries, a layer; mean
    over heads and texts.
    """
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(input_ids=tokens, output_attentions=True).attentions
    model.set_attn_implementation(kind)
    places = torch.arange(LENGTH)
    near = places[None] > places[:, None] - RECENT  # later ones get nothing
    asked = [weights[:, :, SCORED:] for weights in layers]
    return [(w[..., :SINKS].sum(3).mean().item(), (w * near[SCORED:]).sum(3).mean().item()) for w in asked]


def reason(found: list[tuple[float, float]]) -> str:
    """The shares as text behind the table, and what they say about sinks."""
    seen = torch.arange(SCORED + 1, LENGTH + 1, dtype=torch.float64)
    even = [(count / seen).mean().item() for count in (SINKS, RECENT)]
    leaning = [str(layer) for layer, (first, _) in enumerate(found) if first > even[0]]
    lines = [
        "",
        f"Where the attention of the queries from {SCORED} on goes, over the same texts:",
        "",
        f"| layer | first {SINKS} tokens | last {RECENT} tokens |",
        "|---|---|---|",
        *(f"| {layer} | {100 * first:.2f} % | {100 * last:.1f} % |" for layer, (first, last) in enumerate(found)),
        f"| were it even | {100 * even[0]:.2f} % | {100 * even[1]:.1f} % |",
        "",
        f"Layers that lean on the first {SINKS} tokens: {', '.join(leaning)}."
        if leaning
        else f"No layer leans on the first {SINKS} tokens: a slot that keeps a sink is lost to the last tokens, which "
        "get most of the attention. That is why plain recent beats sinks and recent here, and H2O, whose sums favour "
        "what early queries saw; SnapKV keeps what the last queries ask for.",
    ]
    return "\n".join(lines) + "\n"


def table(rows: dict[str, dict[int, float]], budgets: list[int], full: float, count: int) -> str:
    lines = [
        f"Perplexity a byte over {count} held-out texts (Python's standard library), bytes {SCORED} to {LENGTH}; the "
        f"full cache of {LENGTH} gives {full:.3f}. `python -m bench.evict_text`",
        "",
        "| policy | " + " | ".join(f"{b} slots" for b in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    lines += [f"| {name} | " + " | ".join(f"{row[b]:.3f}" for b in budgets) + " |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, dict[int, float]], budgets: list[int], full: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    for name, row in rows.items():
        axes.plot(budgets, [row[b] for b in budgets], marker="o", label=name)
    axes.axhline(full, color="black", linestyle="--", linewidth=1, label=f"full cache of {LENGTH}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(b) for b in budgets])
    axes.set_xlabel("tokens kept a key head")
    axes.set_ylabel("perplexity a byte")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    model, tokens = trained(options.weights), texts(options.texts)
    here = targets.detect()
    program, _ = run_passes(captured(model, CHUNK, prompt=True), portable(), here, Notes())

    def perplexity(policy: Policy, budget: int) -> float:
        item = EvictKV(policy, budget, positions="positions")
        return math.exp(nats(item.run(program, here, Notes()), tokens).mean().item())

    full = perplexity(SlidingWindow(), LENGTH)
    print(f"full cache {full:.3f}", flush=True)
    rows: dict[str, dict[int, float]] = {name: {} for name in POLICIES}
    for budget in options.budgets:
        for name, policy in POLICIES.items():
            rows[name][budget] = perplexity(policy(budget), budget)
            print(f"{name:<26} {budget:4d} slots  {rows[name][budget]:.3f}", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = table(rows, options.budgets, full, options.texts) + reason(shares(model, tokens))
    (RESULTS / "perplexity.md").write_text(text)
    plot(rows, options.budgets, full, RESULTS / "perplexity.png")


if __name__ == "__main__":
    main()
