"""The measurement service: times candidates side by side on this machine, once, and remembers the result on disk.

One JSON file per machine state (torch version, processor, threads) under the user's cache folder
(`XDG_CACHE_HOME`, else `~/.cache`), written atomically, so that any number of processes may share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compiled_attn.ir import machine
from compiled_attn.runtime.files import write_whole

FORMAT = 1  # raised when what is measured, or how, changes
ROUNDS = 7  # every candidate once a round, in turn
ROUND_SECONDS = 0.004  # of one candidate in one round, at least one call

Make = Callable[[], Callable[[], Any]]


def cache_folder() -> Path:
    """Where measurements are kept: `compiled_attn` in `XDG_CACHE_HOME`, else in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "compiled_attn"


def circumstances() -> dict[str, Any]:
    """What a time depends on beside the case: measurements taken under other circumstances are never used."""
    found = machine.here()
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "processor": found.model,
        "capability": found.capability,
        "threads": torch.get_num_threads(),
    }


@dataclass
class Measurements:
    """Times of candidates by case. folder: where they are kept.

    hits, misses: cases answered from the cache, and cases that were timed.  problems: what was wrong with files.
    """

    folder: Path = field(default_factory=cache_folder)
    hits: int = 0
    misses: int = 0
    problems: list[str] = field(default_factory=list)
    _known: dict[Path, dict[str, dict[str, float]]] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __call__(self, case: Mapping[str, Any], candidates: Mapping[str, Make]) -> dict[str, float]:
        """Seconds of one call of each candidate.

        case: what is measured, JSON values only; it is the key.  candidates: name -> function that prepares the inputs
        and returns the call to time; none is prepared when the answer is known.
        """
        key = json.dumps(dict(case), sort_keys=True)
        with self._lock:
            path = self.path
            if path not in self._known:
                self._known[path] = self._read(path)
            known = self._known[path].get(key)
            if known is not None and set(known) == set(candidates):
                self.hits += 1
                return dict(known)
            self.misses += 1
            found = time_in_turn({name: make() for name, make in candidates.items()})
            self._known[path][key] = found
            self._write(path)
            return dict(found)

    @property
    def path(self) -> Path:
        """The file for the present circumstances (the thread count may change between calls)."""
        digest = hashlib.sha256(json.dumps(circumstances(), sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"measure-{digest}.json"

    def _read(self, path: Path) -> dict[str, dict[str, float]]:
        try:
            text = path.read_text()
        except FileNotFoundError:
            return {}
        except OSError as error:
            self.problems.append(f"{path.name} can not be read: {error}")
            return {}
        try:
            content = json.loads(text)
            if content["circumstances"] != circumstances():
                raise ValueError("it was written under other circumstances")
            return {
                str(key): {str(name): float(seconds) for name, seconds in times.items()}
                for key, times in content["seconds"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems.append(f"{path.name} is not used and will be written anew: {error}")
            return {}

    def _write(self, path: Path) -> None:
        """Joins what others have written meanwhile, then replaces the file in one step."""
        merged = {**self._read(path), **self._known[path]}
        self._known[path] = merged
        text = json.dumps({"circumstances": circumstances(), "seconds": merged}, indent=1, sort_keys=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text.encode())
        except OSError as error:
            self.problems.append(f"measurements are not kept: {error}")


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = ROUNDS, round_seconds: float = ROUND_SECONDS
) -> dict[str, float]:
    """Median seconds of one call of each, timed in turn (A B C A B C ...) so that a busy machine disturbs all alike."""
    with torch.no_grad():
        counts = {name: _repeats(call, round_seconds) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(_once(call, counts[name]))
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _repeats(call: Callable[[], Any], seconds: float) -> int:
    call()  # first call: code generation inside libraries
    single = min(_once(call, 1), _once(call, 1))
    return max(1, int(seconds / max(single, 1e-7)))


def _once(call: Callable[[], Any], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


SERVICE = Measurements()
"""The process's service. Its folder is read when it is made; tests make their own."""
