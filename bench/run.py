"""Times peers on cases, side by side in one run, and refuses to print a time for wrong numbers.

    python -m bench.run --model deit_small --batch 1 8 --precision float32 bf16 --threads 1 2 --out bench/results

Each case runs in a process of its own, in which all peers take turns. Writes JSON lines, a table and a plot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import hotspots, report, roof, timing
from bench.cases import TOLERANCE, Case, build, difference, flops
from bench.peers import APPROXIMATE, DEFAULT, PEERS, NotHere, Runner

PREPARES = "prepares"  # key of a line by which a process says which peer it prepares now


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.worker is not None:
        work(json.loads(options.worker))
        return 0
    cases = [
        Case(model, batch, precision, threads, dynamic)
        for model, threads, precision, batch, dynamic in itertools.product(
            options.model, options.threads, options.precision, options.batch, options.dynamic
        )
    ]
    records: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        print(f"[{number + 1}/{len(cases)}] {case.text}", file=sys.stderr, flush=True)
        records += in_process(case, options)
    print(report.table(records, clock=options.clock))
    if options.out is not None:
        for path in report.write(records, Path(options.out), clock=options.clock):
            print(f"wrote {path}")
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.run", description="Times peers side by side on attention models.")
    p.add_argument(
        "--model", nargs="+", default=["deit_small"], help="short names, <paper>/<variant> of the zoo, or timm:<name>"
    )
    p.add_argument("--batch", nargs="+", type=int, default=[1])
    p.add_argument("--precision", nargs="+", choices=sorted(TOLERANCE), default=["float32"])
    p.add_argument("--threads", nargs="+", type=int, default=[1])
    p.add_argument("--dynamic", nargs="+", type=lambda s: s == "yes", default=[False], help="symbolic batch: yes, no")
    p.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(DEFAULT))
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--round-ms", type=float, default=100.0, help="time given to each peer in each round")
    p.add_argument("--limit", type=float, default=300.0, help="seconds that each peer may take to get ready")
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: process time, on a busy machine")
    p.add_argument("--where", action="store_true", help="also where the time of ours goes, by class of op")
    p.add_argument("--costs", action="store_true", help="also compile time cold and warm, start-up, memory, size")
    p.add_argument("--out", help="folder for results.jsonl, results.txt and results.png")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    return p


def in_process(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of a case, from a new process whose thread pools have the case's size from the start.

    A peer that does not get ready in time ends that process, and the others begin again in another.
    """
    slow: list[dict[str, Any]] = []
    peers = list(options.peers)
    while True:
        job = {
            "case": case.as_dict(),
            "peers": peers,
            "rounds": options.rounds,
            "round_seconds": options.round_ms / 1e3,
            "where": options.where,
            "costs": options.costs,
        }
        found = watched(["-m", "bench.run", "--worker", json.dumps(job)], case.threads, options.limit)
        if not isinstance(found, Slow):
            return (found if isinstance(found, list) else [failed(case, "all", str(found))]) + slow
        slow.append(failed(case, found.peer, f"it was not ready after {options.limit:g} s"))
        peers.remove(found.peer)


def failed(case: Case, peer: str, because: str) -> dict[str, Any]:
    return {**case.as_dict(), "peer": peer, "because": because}


@dataclass(frozen=True)
class Slow:
    """A peer that did not get ready in time."""

    peer: str


def watched(command: list[str], threads: int, limit: float) -> Any:
    """What `child` gives, of a process that says which peer it prepares; Slow where that takes more than `limit` s.

    Native code can not be interrupted: the process is killed.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: Any) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], env=environment(threads), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        last, peer, end = "", None, 0.0
        while True:
            try:
                line = lines.get(timeout=None if peer is None else max(0.0, end - time.monotonic()))
            except queue.Empty:
                process.kill()
                process.wait()
                return Slow(str(peer))
            if line is None:
                break
            last = line
            if line.startswith(f'{{"{PREPARES}"'):
                peer, end = json.loads(line)[PREPARES], time.monotonic() + limit
        if process.wait() or not last:
            errors.seek(0)
            return errors.read().strip()[-2000:] or f"exit code {process.returncode}"
        return json.loads(last)


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def child(command: list[str], threads: int, extra: dict[str, str] | None = None) -> Any:
    """What a Python process prints as its last line, read as JSON; the end of its errors where it fails."""
    own = environment(threads) | (extra or {})
    done = subprocess.run([sys.executable, *command], env=own, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return done.stderr.strip()[-2000:] or f"exit code {done.returncode}"
    return json.loads(lines[-1])


def work(job: dict[str, Any]) -> None:
    """Runs one case and prints its records as one line of JSON."""
    warnings.simplefilter("ignore")
    case = Case(**job["case"])
    torch.set_num_threads(case.threads)
    with torch.no_grad():
        records = compare(case, job)
    print(json.dumps(records))


def compare(case: Case, job: dict[str, Any]) -> list[dict[str, Any]]:
    model, x = build(case)
    wanted = model(x)
    limit = roof.measure(case.precision)
    total = flops(model, x)
    ready: dict[str, Runner] = {}
    records: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for name in job["peers"]:
            record = records[name] = {**case.as_dict(), "peer": name, "gflop": total / 1e9, "roof": vars(limit)}
            began = time.perf_counter()
            print(json.dumps({PREPARES: name}), flush=True)
            try:
                runner = PEERS[name](case, model, x, Path(folder))
                found = runner.call().float()
            except NotHere as error:
                record["because"] = str(error)
                continue
            except Exception as error:
                record["because"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
                continue
            record["prepare_s"] = round(time.perf_counter() - began, 2)
            record["facts"] = runner.facts
            record["error"] = difference(found, runner.reference() if runner.reference else wanted)
            record["tolerance"] = TOLERANCE[case.precision]
            record["approximate"] = name in APPROXIMATE
            if record["error"] <= record["tolerance"]:
                ready[name] = runner
            else:
                record["because"] = "its numbers are wrong"
        print(json.dumps({PREPARES: None}), flush=True)
        times = timing.interleave(
            {name: runner.call for name, runner in ready.items()},
            rounds=job["rounds"],
            round_seconds=job["round_seconds"],
        )
        for name, taken in times.items():
            records[name] |= taken.as_dict()
        if job["where"]:
            for name in [n for n in ready if n.startswith("ours")]:
                records[name]["where"] = hotspots.by_class(lambda name=name: PEERS[name](case, model, x, Path(folder)))
    if job["costs"]:
        from bench import costs

        for name in ready:
            records[name]["costs"] = costs.of(case, name)
    return list(records.values())


if __name__ == "__main__":
    raise SystemExit(main())
