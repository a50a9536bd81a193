"""Records of a run as JSON lines, an aligned table and a plot."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

KEYS = ("model", "batch", "precision", "threads", "dynamic")
CLOCKS = {"wall": "ms", "cpu": "cpu_ms"}
RATES = {"wall": "gflops", "cpu": "gflops_cpu"}


def groups(records: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Records of one case together, in the order in which cases came."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(tuple(record[k] for k in KEYS), []).append(record)
    return list(found.values())


def title(record: dict[str, Any]) -> str:
    batch = "dynamic batch, run at" if record["dynamic"] else "batch"
    return f"{record['model']}  {batch} {record['batch']}  {record['precision']}  {record['threads']} thread(s)"


def table(records: Sequence[dict[str, Any]], *, clock: str = "wall") -> str:
    """One block a case: a peer a line; a wrong answer shows its difference and no time."""
    return "\n\n".join(block(group, clock=clock) for group in groups(records))


def block(group: Sequence[dict[str, Any]], *, clock: str = "wall") -> str:
    key = CLOCKS[clock]
    lines = [title(group[0])]
    roof = next((r["roof"] for r in group if "roof" in r), None)
    if roof is not None:
        least = group[0]["gflop"] / roof[RATES[clock]] * 1e3
        lines.append(
            f"  roof: matrix product {roof[RATES[clock]]:.0f} GF/s, copy {roof['copy_gb_per_s']:.1f} GB/s; "
            f"{group[0]['gflop']:.2f} GF take {least:.2f} ms at that rate"
        )
    base = next((r[key] for r in group if r["peer"] == "eager" and key in r), None)
    rows = [("peer", f"{clock} ms", "quartiles", "of eager", "of roof", "difference", "")]
    for r in group:
        if key not in r:
            wrong = f"{r['error']:.1e} > {r['tolerance']:.0e}" if "error" in r else ""
            rows.append((r["peer"], "-", "", "", "", wrong, f"because {r.get('because', 'it was not timed')}"))
            continue
        speed = f"{base / r[key]:.2f}x" if base else ""
        part = f"{r['gflop'] / r['roof'][RATES[clock]] * 1e3 / r[key]:.0%}" if roof and not r.get("approximate") else ""
        facts = "; ".join(f"{k} {v}" for k, v in r.get("facts", {}).items())
        spread = f"{r['ms_low']:.2f}..{r['ms_high']:.2f}"
        rows.append((r["peer"], f"{r[key]:.2f}", spread, speed, part, f"{r['error']:.1e}", facts))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines += [
        "  " + "  ".join([c.ljust(w) for c, w in zip(row, widths, strict=False)] + [row[6]]).rstrip() for row in rows
    ]
    for r in group:
        if "where" in r:
            lines.append(f"  {r['peer']}, ms by class: " + ", ".join(f"{k} {v:.2f}" for k, v in r["where"].items()))
    for r in group:
        if "costs" in r:
            lines.append(f"  {r['peer']}: " + ", ".join(f"{k} {v}" for k, v in r["costs"].items()))
    return "\n".join(lines)


def write(records: Sequence[dict[str, Any]], folder: Path, *, clock: str = "wall") -> list[Path]:
    """results.jsonl (one record a line, with the machine), results.txt and, where matplotlib is there, results.png."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, text = folder / "results.jsonl", folder / "results.txt"
    here = machine()
    lines.write_text("".join(json.dumps({**r, "machine": here}, sort_keys=True) + "\n" for r in records))
    about = ", ".join(f"{k} {v}" for k, v in here.items())
    text.write_text(f"{about}\n\n{table(records, clock=clock)}\n")
    picture = plot(records, folder / "results.png", clock=clock)
    return [lines, text] + ([picture] if picture else [])


def machine() -> dict[str, Any]:
    import torch

    from compiled_attn.ir.machine import here

    found = here()
    return {
        "processor": found.model,
        "capability": found.capability,
        "cores": found.cores,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def plot(records: Sequence[dict[str, Any]], path: Path, *, clock: str = "wall") -> Path | None:
    """Bars of milliseconds a picture, one panel a case, with the roof as a line; None without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    key = CLOCKS[clock]
    panels = [[r for r in group if key in r] for group in groups(records)]
    panels = [p for p in panels if p]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(6.5 * columns, 0.6 + 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, group in zip(axes.flat, panels, strict=False):
        each = [r[key] / r["batch"] for r in group]
        names = [r["peer"] for r in group]
        colours = ["#1f6f8b" if n.startswith("ours") else "#b8bec4" for n in names]
        axis.barh(names, each, color=colours)
        for i, value in enumerate(each):
            axis.text(value, i, f" {value:.1f}", va="center", fontsize=8)
        roof = group[0]["gflop"] / group[0]["roof"][RATES[clock]] * 1e3 / group[0]["batch"]
        axis.axvline(roof, color="#c0392b", linewidth=1, linestyle="--", label="roof (arithmetic alone)")
        axis.set_title(title(group[0]), fontsize=9)
        axis.set_xlabel(f"{clock} ms a picture", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
