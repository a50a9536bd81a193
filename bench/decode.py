"""Tokens a second of small Llamas, and one step's attention over a cache against SDPA and the memory's bandwidth.

    python -m bench.decode --dim 512 --dim 1024 --threads 2 --out decode-report
    python -m bench.decode --dim 256 --layers 2 --prompt 32 --count 24 --rounds 3 --slots 512 --slots 2048   # short

Llama shapes with random weights, float32, one text: heads of 64, four query heads to a key head. All peers say the same
number of tokens behind the same prompt, in turns; one whose tokens are not transformers' own gets no time, one that
evicts is held to its own rule run eagerly. The first token's time is the prompt's, the others' is decoding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.nn.functional as F

from bench import roof
from bench.decode_peers import PEERS, Peer, Task
from bench.timing import interleave
from compiled_attn.ir import _torch
from compiled_attn.ops import cached_attention
from compiled_attn.ops.templates.base import marked

VOCABULARY, HEAD, SHARE = 4096, 64, 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def llama(dim: int, layers: int) -> Any:
    import tests.torchvision_shim  # noqa: F401

    from transformers import LlamaConfig, LlamaForCausalLM  # isort: skip

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": dim,
        "intermediate_size": 64 * round(dim * 8 / 3 / 64),
        "num_hidden_layers": layers,
        "num_attention_heads": dim // HEAD,
        "num_key_value_heads": max(1, dim // HEAD // SHARE),
        "max_position_embeddings": 32768,
        "initializer_range": 0.05,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)


def ready(task: Task, names: Sequence[str]) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that say the right tokens, and of the others why not."""
    theirs = PEERS["transformers"](task).say(task.count)
    good: dict[str, Peer] = {}
    because: dict[str, str] = {}
    for name in names:
        began = time.perf_counter()
        try:
            peer = PEERS[name](task)
            found = peer.say(task.count)
            wanted = theirs if peer.wanted is None else peer.wanted(task.count)
        except Exception as error:
            because[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        click.echo(f"{name}: ready after {time.perf_counter() - began:.0f} s", err=True)
        if found == wanted:
            good[name] = peer
        else:
            place = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
            because[name] = f"says another token at place {place}"
    return good, because


def decoding(task: Task, names: Sequence[str], rounds: int) -> list[str]:
    """The table of one model: ms of the prompt and first token, tokens a second of the others."""
    good, because = ready(task, names)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in good}
    for _ in range(rounds):
        for name, peer in good.items():
            spans = []
            for count in (1, task.count):
                began = time.perf_counter()
                peer.say(count)
                spans.append(time.perf_counter() - began)
            times[name].append((spans[0], (spans[1] - spans[0]) / (task.count - 1)))
    lines = [f"  {'':<20} {'prompt ms':>9} {'ms a token':>10} {'tokens / s':>10} {'to generate':>11}"]
    step = {name: median(t[1] for t in taken) for name, taken in times.items()}
    for name in names:
        if name in because:
            lines.append(f"  {name:<20} -  because {because[name]}")
            continue
        first, ratio = median(t[0] for t in times[name]), step.get("transformers", float("nan")) / step[name]
        facts = ", ".join(f"{k} {v}" for k, v in good[name].facts.items())
        row = f"  {name:<20} {first * 1e3:9.1f} {step[name] * 1e3:10.2f} {1 / step[name]:10.1f} {ratio:10.2f}x  {facts}"
        lines.append(row.rstrip())
    return lines


def attention_row(slots: int, dtype: torch.dtype, heads: int, limit: roof.Roof, rounds: int) -> str:
    """One query a head over a full cache of `slots`: microseconds of ours, with the mass, and of SDPA, without."""
    random, groups = torch.Generator().manual_seed(0), heads // SHARE
    q, k, v = (torch.randn(1, h, n, HEAD, generator=random).to(dtype) for h, n in ((heads, 1), *[(groups, slots)] * 2))
    positions = torch.stack([torch.randperm(slots, generator=random) for _ in range(groups)])[None]
    queries, scale = torch.tensor([[slots]]), HEAD**-0.5
    out, mass = torch.empty_like(q), torch.empty(1, groups, slots)
    function = _torch.cpp_function(kernel(dtype))
    tensors = torch.tensor([t.data_ptr() for t in (q, k, v, positions, queries, out, mass)])
    numbers = torch.tensor([groups, SHARE, slots, HEAD])

    def ours() -> None:
        function(tensors.data_ptr(), numbers.data_ptr())

    ours()
    wanted = cached_attention.decomposition(*(t.double() for t in (q, k, v)), positions, queries, scale=scale)
    error = max((a.double() - b).abs().max().item() for a, b in zip((out, mass), wanted, strict=True))
    if error > TOLERANCE[dtype]:
        return f"  {slots:6d}  wrong by {error:.1e}: no time"
    calls = {"ours": ours, "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)}
    times = {name: t.median * 1e3 for name, t in interleave(calls, rounds=rounds, round_seconds=0.03).items()}
    moved = 2 * k.numel() * k.element_size()
    least = moved / (limit.copy_gb_per_s * 1e9) * 1e6
    mine, theirs, name = times["ours"], times["sdpa"], str(dtype).removeprefix("torch.")
    row = f"  {slots:6d} {name:<9} {moved / 1e6:6.1f} {mine:9.1f} {theirs:9.1f} {theirs / mine:8.2f}x"
    return f"{row} {least:9.1f} {100 * least / mine:7.0f}%"


def kernel(dtype: torch.dtype) -> str:
    """C++ of `kernel(tensors, numbers)`: the template's kernel by itself, on contiguous tensors of one text."""
    kind = "float" if dtype == torch.float32 else "Bf16"
    read = ", ".join(f"(const {kind}*)t[{i}]" for i in range(3))
    return f"""{marked("cpp_cached_attention", "cached_attention.h")}
extern "C" void kernel(const int64_t* t, const int64_t* n) {{
  using namespace compiled_attn_cpp;
  CacheShape s{{}};
  s.batch = s.queries = 1;
  s.groups = n[0], s.share = n[1], s.slots = n[2], s.width = s.value_width = n[3];
  s.q[1] = s.q[2] = s.k[2] = s.v[2] = s.out[1] = s.out[2] = n[3];
  s.k[1] = s.v[1] = n[2] * n[3];
  s.positions[1] = n[2], s.positions[2] = s.at[1] = 1;
  s.scale = 1.f / std::sqrt(float(n[3]));
  cached_attention<{kind}>(s, {read}, (const int64_t*)t[3], (const int64_t*)t[4], ({kind}*)t[5], (float*)t[6]);
}}
"""


@click.command()
@click.option("--dim", "dims", multiple=True, default=(512, 1024), show_default=True, help="Width of the stream.")
@click.option("--layers", default=8, show_default=True)
@click.option("--prompt", default=128, show_default=True, help="Tokens of the prompt.")
@click.option("--count", default=64, show_default=True, help="Tokens said behind it.")
@click.option("--budget", default=64, show_default=True, help="Slots that eviction keeps.")
@click.option("--peer", "names", multiple=True, type=click.Choice(list(PEERS)), default=tuple(PEERS))
@click.option("--slots", "sizes", multiple=True, default=(512, 1024, 2048, 4096, 8192), show_default=True)
@click.option("--heads", default=16, show_default=True, help="Query heads of the attention by itself.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--part", type=click.Choice(["both", "decode", "attention"]), default="both", show_default=True)
@click.option("--out", default="decode-report", type=click.Path(path_type=Path), help="Folder for decode.txt.")
def main(
    dims: tuple[int, ...],
    layers: int,
    prompt: int,
    count: int,
    budget: int,
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    heads: int,
    rounds: int,
    threads: int,
    part: str,
    out: Path,
) -> None:
    """Times decoding of small Llamas, and one step's attention over its cache."""
    torch.set_num_threads(threads)
    limit = roof.measure("float32")
    lines = [
        f"float32, one text, {threads} threads, {rounds} rounds in turns, medians; a copy moves"
        f" {limit.copy_gb_per_s:.1f} GB/s. Ratios hold, heights are this machine's at that time."
    ]
    tokens = torch.randint(3, VOCABULARY, (prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    for dim in dims if part != "attention" else ():
        model = llama(dim, layers)
        weights = sum(p.numel() for p in model.parameters()) / 1e6
        shape = f"dim {dim}, {layers} layers, {weights:.0f} M weights"
        lines += ["", f"{shape}: {count} tokens behind {prompt}; eviction keeps {budget}"]
        with tempfile.TemporaryDirectory(prefix="decode-") as folder, torch.no_grad():
            lines += decoding(Task(model, tokens, count, budget, threads, Path(folder)), names, rounds)
    if part != "decode":
        shared = f"{heads} heads over {heads // SHARE} key heads of {HEAD}"
        lines += ["", f"one query over a full cache, {shared}; ours gives the mass too"]
        heading = ("ours us", "SDPA us", "faster", "copy us")
        lines.append(f"  {'slots':>6} {'':<9} {'MB':>6} " + " ".join(f"{h:>9}" for h in heading) + "  of copy")
        with torch.no_grad():
            lines += [attention_row(n, dtype, heads, limit, 3 * rounds) for dtype in TOLERANCE for n in sizes]
    text = "\n".join(lines)
    click.echo(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "decode.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
