"""Decoding a long text in fixed memory: resident memory and time a token as it grows, the full cache beside it.

    python -m bench.decode_memory --tokens 20000 --full 3000 --out decode-memory

A Llama-shaped decoder with random weights (dim 256, 2 layers, 8 heads over 2 key heads) says 20,000 tokens greedily:
compiled, with H2O at a budget of 512; then transformers' own, eager, with the cache that grows. Each runs in a process
of its own. At the end the next logits of the evicting decoder are compared with transformers' attention over the tokens
that it kept, at their positions: what drifted would show there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

BUDGET, CHUNK, EVERY, RECENT = 512, 64, 500, 256
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model() -> Any:
    import tests.torchvision_shim  # noqa: F401

    from transformers import LlamaConfig, LlamaForCausalLM  # isort: skip

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)


def resident() -> float:
    """MB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Meter:
    """Called after each token; a row each EVERY tokens: tokens said, MB resident, median ms a token since the last."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, float]] = []
        self.times: list[float] = []
        self.last = time.perf_counter()

    def __call__(self, *_: int) -> None:
        now = time.perf_counter()
        self.times.append(now - self.last)
        if len(self.times) % EVERY == 0:
            self.rows.append((len(self.times), resident(), median(self.times[-EVERY:]) * 1e3))
            print("{:7d} tokens  {:7.1f} MB  {:6.2f} ms".format(*self.rows[-1]), file=sys.stderr)
        self.last = time.perf_counter()


def evicting(tokens: int) -> dict[str, Any]:
    import compiled_attn as ca
    from compiled_attn.passes.evict_policies import HeavyHitters

    net = model()
    decoder = ca.decoder(
        net, policy=HeavyHitters(recent=RECENT), budget=BUDGET, chunk=CHUNK, batch=1, compiled=True, target="cpu"
    )
    meter = Meter()
    found = ca.generate(decoder, [list(range(3, 3 + CHUNK))], max_new_tokens=tokens, on_token=meter)
    talk = found.conversation
    seen = talk.lengths[0]
    sound = all(
        len(set(head)) == len(head) == BUDGET and set(range(seen - RECENT, seen)) <= set(head) and head[-1] < seen
        for layer in range(SIZES["num_hidden_layers"])
        for head in talk.kept(layer)[0]
    )
    logits, wanted = next_logits(decoder, talk), next_logits_by_transformers(net, talk)
    error = ((logits - wanted).norm() / wanted.norm()).item()
    return {"rows": meter.rows, "positions": sound and seen == CHUNK + tokens - 1, "error": error, "cache": talk.nbytes}


def next_logits(decoder: Any, talk: Any) -> torch.Tensor:
    """Of the pending token, over a copy of the state."""
    there = talk.copy()
    token = torch.tensor([talk.pending[0]])
    return decoder.step(token, torch.tensor([talk.lengths]), there.state, slots=there.slots)[0, -1]


def next_logits_by_transformers(net: Any, talk: Any) -> torch.Tensor:
    """The same by transformers' attention over the keys and values that were kept, in the order of their positions."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(talk.state["keys"], talk.state["values"], strict=True)):
        places = talk.slots["positions"][layer]
        order = places.masked_fill(places < 0, 1 << 40).argsort(2)[..., :BUDGET, None]
        cache.update(*(t.gather(2, order.expand(-1, -1, -1, t.shape[3])) for t in (keys, values)), layer)
    token = torch.tensor([talk.pending[0]])
    return net(input_ids=token, position_ids=torch.tensor([talk.lengths]), past_key_values=cache).logits[0, -1]


def full(tokens: int) -> dict[str, Any]:
    from transformers import DynamicCache

    net, cache, meter = model(), DynamicCache(), Meter()
    token = torch.arange(3, 3 + CHUNK)[None]
    with torch.no_grad():
        for _ in range(tokens):
            token = (
                net(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(2)
            )
            meter()
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return {"rows": meter.rows, "cache": size}


def report(evicted: dict[str, Any], grown: dict[str, Any], threads: int) -> list[str]:
    beside = {count: (memory, spent) for count, memory, spent in grown["rows"]}
    lines = [
        f"Llama-shaped decoder (dim 256, 2 layers, 8 heads over 2 key heads), float32, {threads} threads: H2O at a",
        f"budget of {BUDGET}, compiled, and transformers' growing cache, eager. Resident memory; median time of the",
        f"{EVERY} tokens before; a busy machine, so take the shape of the columns and not their height.",
        "",
        f"{'tokens':>7}  {'evicting':>10}  {'':>9}  {'growing':>10}",
    ]
    for count, memory, spent in evicted["rows"]:
        if count % (2 * EVERY) and count not in beside:
            continue
        there = beside.get(count)
        right = f"{there[0]:7.1f} MB  {there[1]:6.2f} ms" if there else ""
        lines.append(f"{count:7d}  {memory:7.1f} MB  {spent:6.2f} ms  {right}".rstrip())
    first, last = evicted["rows"][1], evicted["rows"][-1]
    return [
        *lines,
        "",
        f"caches   {evicted['cache'] / 1e6:.1f} MB at any length, the growing one {grown['cache'] / 1e6:.1f} MB",
        f"memory   {last[1] - first[1]:+.1f} MB from token {first[0]} to {last[0]}",
        f"time     {last[2] / first[2]:.2f} times that at token {first[0]}",
        f"kept     {'distinct, within the budget, the last ones among them' if evicted['positions'] else 'WRONG'}",
        f"logits   {evicted['error']:.1e} from transformers' over the tokens kept, at the last position",
    ]


@click.command()
@click.option("--tokens", default=20000, show_default=True)
@click.option("--full", "grown", default=3000, show_default=True, help="Tokens with the growing cache.")
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for decode_memory.txt.")
@click.option("--part", type=click.Choice(["evicting", "growing"]), hidden=True)
def main(tokens: int, grown: int, threads: int, out: Path, part: str | None) -> None:
    torch.set_num_threads(threads)
    if part:
        print(json.dumps(evicting(tokens) if part == "evicting" else full(grown)))
        return
    found = []
    for name in ("evicting", "growing"):
        words = [sys.executable, "-m", "bench.decode_memory", *sys.argv[1:], "--part", name]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    text = "\n".join(report(found[0], found[1], threads))
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "decode_memory.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
