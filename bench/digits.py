"""The main job on real pictures: a small ViT, its tokens reorganized by a pass, compiled, exported and run again.

    python -m bench.digits --out digits-report

Uses scikit-learn's digits, 500 pictures that the network was not trained on (bench/train_digits.py). Writes into the
folder: kept.png (which patches stay at each stage), rates.png (accuracy against speed), table.txt, model.pt2.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

import compiled_attn as ca
from bench.train_digits import pictures
from compiled_attn.passes.reorganize_tokens import with_kept_patches
from compiled_attn.runtime.build import Settings, prepare

AT = (3, 6, 9)
RATES = (1.0, 0.9, 0.7, 0.5)
BATCH = 50
ROUNDS = 15


def accuracy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Share of pictures whose largest logit is their label."""
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x.split(BATCH)])
    return (found == y).double().mean().item()


def milliseconds(models: dict[str, Callable[[Tensor], Tensor]], x: Tensor) -> dict[str, float]:
    """Median wall time of one call of each, taken in turns so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(ROUNDS + 2):
            for name, model in models.items():
                began = time.perf_counter()
                model(x)
                if turn >= 2:
                    times[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def draw_kept(model: nn.Module, x: Tensor, rate: float, path: Path) -> None:
    """A strip of pictures: the whole picture, then what each stage of the reorganization kept of it."""
    passes = [ca.passes.ReorganizeTokens(keep_rate=rate, at=AT)]
    build = prepare(model, (x,), None, Settings.of(passes=passes))
    _, stages = with_kept_patches(build.program)(x)
    figure, axes = plt.subplots(len(x), len(stages) + 1, figsize=(1.5 * (len(stages) + 1), 1.5 * len(x)))
    side = x.shape[-1] // 12
    for row, picture in enumerate(x[:, 0]):
        for column in range(len(stages) + 1):
            shown = picture.clone()
            if column:
                keep = torch.zeros(145, dtype=torch.bool)
                keep[stages[column - 1][row].clamp(max=144)] = True
                mask = keep[:144].reshape(12, 12).repeat_interleave(side, 0).repeat_interleave(side, 1)
                shown[~mask] = float("nan")
            axes[row, column].imshow(shown, cmap="gray", vmin=-1, vmax=2)
            axes[row, column].set_facecolor("#c05020")
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
            if row == 0:
                axes[row, column].set_title("picture" if column == 0 else f"block {AT[column - 1]}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_rates(rows: list[tuple[float, float, float]], path: Path) -> None:
    """Accuracy against pictures per second, one point a keep rate."""
    figure, axis = plt.subplots(figsize=(5, 3.5))
    axis.plot([r[2] for r in rows], [100 * r[1] for r in rows], "o-")
    for rate, hits, speed in rows:
        axis.annotate(f"keep {rate:g}", (speed, 100 * hits), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axis.set_xlabel(f"pictures per second, batch {BATCH}")
    axis.set_ylabel("accuracy on held-out pictures, %")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@click.command()
@click.option("--out", default="digits-report", type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("--pictures", "count", default=500, show_default=True, help="How many held-out pictures to classify.")
def main(out: Path, count: int) -> None:
    """Classifies held-out digits at several keep rates, compiled, beside eager mode and torch.compile."""
    out.mkdir(parents=True, exist_ok=True)
    _, _, x, y = pictures()
    x, y = x[:count], y[:count]
    model = ca.zoo.create("deit", "digits_tiny", pretrained=True)
    batch = x[:BATCH]
    compiled: dict[float, Callable[[Tensor], Tensor]] = {}
    for rate in tqdm(RATES, desc="compiling", disable=None):
        passes = [ca.passes.ReorganizeTokens(keep_rate=rate, at=AT)] if rate < 1 else []
        compiled[rate] = ca.compile(
            model, target="auto", example_inputs=(batch,), dynamic_shapes=({0: "batch"},), passes=passes
        )
    print(compiled[0.7].explain())
    peers = {"eager": model, "torch.compile": torch.compile(model)}
    times = milliseconds({**peers, **{f"keep {r:g}": f for r, f in compiled.items()}}, batch)
    lines = [f"{count} held-out pictures, batch {BATCH}"]
    lines.append(f"{'':<16} {'accuracy':>9} {'ms / batch':>11} {'to eager':>9}")
    rows = []
    for name, time_ms in times.items():
        runner = peers[name] if name in peers else compiled[float(name.split()[1])]
        hits = accuracy(runner, x, y)
        lines.append(f"{name:<16} {100 * hits:8.1f}% {time_ms:11.1f} {times['eager'] / time_ms:8.2f}x")
        if name.startswith("keep"):
            rows.append((float(name.split()[1]), hits, 1e3 * BATCH / time_ms))
    artifact = ca.export(
        model,
        (batch,),
        path=out / "model.pt2",
        dynamic_shapes=({0: "batch"},),
        passes=[ca.passes.ReorganizeTokens(keep_rate=0.7, at=AT)],
    )
    again = ca.load(out / "model.pt2")
    with torch.no_grad():
        apart = max((again(part) - compiled[0.7](part)).abs().max().item() for part in x.split(37))
    size = artifact.size / 1e6
    lines.append(f"exported {artifact.path.name}, {size:.1f} MB; loaded, its logits differ by {apart:.1e}")
    shown = x[:6]
    with torch.no_grad():
        predicted = compiled[0.7](shown).argmax(1).tolist()
    lines.append(f"first pictures: labels {y[:6].tolist()}, predicted at keep 0.7 {predicted}")
    draw_kept(model, shown, 0.7, out / "kept.png")
    draw_rates(rows, out / "rates.png")
    text = "\n".join(lines)
    (out / "table.txt").write_text(text + "\n")
    print(text)
    print(f"wrote {', '.join(sorted(p.name for p in out.iterdir()))} into {out}")


if __name__ == "__main__":
    main()
