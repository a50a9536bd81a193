"""Accuracy against average tokens on real pictures: tokens reorganized by a fixed share, and pruned per picture.

    python -m bench.digits_tokens --out digits-report

The trained small ViT on scikit-learn's held-out digits (bench/train_digits.py), each program run op by op. Writes
tokens.png (accuracy against the average number of tokens a block), strip.png (which patches each pass kept of a few
pictures), tokens.txt, which also says how many tokens easy and hard pictures kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

import compiled_attn as ca
from bench.train_digits import pictures
from compiled_attn.passes.prune_tokens import with_kept_masks
from compiled_attn.passes.reorganize_tokens import with_kept_patches
from compiled_attn.runtime.build import Settings, prepare

AT = (3, 6, 9)
DEPTH, SIDE, BATCH = 12, 12, 100
NAMED: dict[str, list[Any]] = {
    "reorganize, keep_rate": [ca.passes.ReorganizeTokens(keep_rate=r, at=AT) for r in (0.9, 0.7, 0.5, 0.3)],
    "prune, mass": [ca.passes.PruneTokens(mass=m, at=AT) for m in (0.95, 0.9, 0.8, 0.6)],
    "prune, threshold": [ca.passes.PruneTokens(threshold=t, at=AT) for t in (0.002, 0.004, 0.008, 0.02)],
}
SHOWN = (1, 1, 1)  # of each kind above, which setting the strip shows


def setting(item: Any) -> float:
    values = (getattr(item, name, None) for name in ("keep_rate", "mass", "threshold"))
    return float(next(v for v in values if v is not None))


def run(model: nn.Module, item: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(logits, which patches each stage kept: bool [B, 144]) of the model under a pass."""
    settings = Settings.of("auto", passes=(item,), dynamic_shapes=({0: "batch"},))
    program = prepare(model, (x[:2],), None, settings).program
    prunes = isinstance(item, ca.passes.PruneTokens)
    asked = (with_kept_masks if prunes else with_kept_patches)(program)
    logits, stages = [], []
    with torch.no_grad():
        for part in x.split(BATCH):
            out, found = asked(part)
            logits.append(out)
            stages.append([mask[:, 1:] if prunes else marks(mask) for mask in found])
    return torch.cat(logits), [torch.cat(each) for each in zip(*stages, strict=True)]


def marks(kept: Tensor) -> Tensor:
    """Numbers of kept patches [B, K] (144: a fused token) as bool [B, 144]."""
    return torch.zeros(len(kept), SIDE**2 + 1, dtype=torch.bool).scatter(1, kept, True)[:, : SIDE**2]


def tokens_per_block(stages: Sequence[Tensor], fused: bool) -> Tensor:
    """[B]: tokens that a picture has in the MLP of a block, on average over the blocks."""
    counts = [mask.sum(1) + 1 + int(fused) for mask in stages]
    rows = [torch.full_like(counts[0], SIDE**2 + 1)] * AT[0]
    for stage, count in enumerate(counts):
        rows += [count] * ((*AT, DEPTH)[stage + 1] - AT[stage])
    return torch.stack(rows).double().mean(0)


def draw_tokens(curves: dict[str, list[tuple[float, float, float]]], dense: float, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 4))
    axis.axhline(100 * dense, color="grey", lw=0.8, ls=":", label=f"dense, {SIDE**2 + 1} tokens")
    for row, (name, points) in enumerate(curves.items()):
        color = f"C{row}"
        axis.plot([p[1] for p in points], [100 * p[2] for p in points], "o-", label=name, color=color)
        for value, tokens, hits in points:
            beside = {"textcoords": "offset points", "xytext": (0, -10 - 8 * row), "ha": "center"}
            axis.annotate(f"{value:g}", (tokens, 100 * hits), **beside, fontsize=6, color=color)
    axis.margins(y=0.15)
    axis.set_xlabel("tokens a block, on average over blocks and pictures")
    axis.set_ylabel("accuracy on held-out pictures, %")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_strip(x: Tensor, kept: dict[str, list[Tensor]], path: Path) -> None:
    """A row a picture: the picture, then what is left of it after the last stage of each pass."""
    figure, axes = plt.subplots(len(x), len(kept) + 1, figsize=(1.6 * (len(kept) + 1), 1.5 * len(x)))
    scale = x.shape[-1] // SIDE
    for row, picture in enumerate(x[:, 0]):
        for column, name in enumerate(["picture", *kept]):
            shown = picture.clone()
            if column:
                mask = kept[name][-1][row].view(SIDE, SIDE)
                shown[~mask.repeat_interleave(scale, 0).repeat_interleave(scale, 1)] = float("nan")
            axes[row, column].imshow(shown, cmap="gray", vmin=-1, vmax=2)
            axes[row, column].set_facecolor("#c05020")
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
            if row == 0:
                axes[row, column].set_title(name, fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@click.command()
@click.option("--out", default="digits-report", type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("--pictures", "count", default=500, show_default=True, help="How many held-out pictures to classify.")
def main(out: Path, count: int) -> None:
    """Accuracy of the trained digits ViT against average tokens, reorganized and pruned."""
    out.mkdir(parents=True, exist_ok=True)
    _, _, x, y = pictures()
    x, y = x[:count], y[:count]
    model = ca.zoo.create("deit", "digits_tiny", pretrained=True).eval()
    with torch.no_grad():
        dense = torch.cat([model(part) for part in x.split(BATCH)])
    hits = (dense.argmax(1) == y).double().mean().item()
    sure = dense.softmax(1).amax(1).argsort(descending=True)
    easy, hard = sure[: len(sure) // 4], sure[-(len(sure) // 4) :]
    lines = [
        f"{count} held-out pictures; dense: {SIDE**2 + 1} tokens, {100 * hits:.1f}%",
        f"{'':<32} {'tokens a block':>14} {'least':>6} {'most':>6} {'easy':>6} {'hard':>6} {'accuracy':>9}",
    ]
    curves: dict[str, list[tuple[float, float, float]]] = {}
    strip: dict[str, list[Tensor]] = {}
    progress = tqdm(total=sum(map(len, NAMED.values())), desc="settings", disable=None)
    for (name, items), shown in zip(NAMED.items(), SHOWN, strict=True):
        for i, item in enumerate(items):
            logits, stages = run(model, item, x)
            each = tokens_per_block(stages, isinstance(item, ca.passes.ReorganizeTokens))
            right = (logits.argmax(1) == y).double().mean().item()
            curves.setdefault(name, []).append((setting(item), each.mean().item(), right))
            if i == shown:
                strip[f"{name} {setting(item):g}"] = [mask[:8] for mask in stages]
            lines.append(
                f"{name + f' {setting(item):g}':<32} {each.mean():>14.1f} {each.min():>6.1f} {each.max():>6.1f} "
                f"{each[easy].mean():>6.1f} {each[hard].mean():>6.1f} {100 * right:>8.1f}%"
            )
            progress.update()
            progress.set_postfix_str(lines[-1].strip())
    lines.append(
        "easy, hard: tokens a block of the quarter of pictures that the dense form is surest and least sure of"
    )
    draw_tokens(curves, hits, out / "tokens.png")
    draw_strip(x[:8], strip, out / "strip.png")
    text = "\n".join(lines)
    (out / "tokens.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
