"""Golden cases: what reference implementations compute, with weights that follow from their names.

A case is `<system>__<variant>.json` (configuration, keys and shapes of the reference's state dict, inputs, tolerance)
with a `.npz` of its outputs, long ones as every `stride`-th value. Weights and inputs are drawn from numpy's frozen
`RandomState`, seeded by the crc32 of their names, so nothing large is stored.
"""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CASES = Path(__file__).parent / "cases"


def _stream(name: str, seed: int, step: int) -> np.random.RandomState:
    return np.random.RandomState((zlib.crc32(name.encode()) + step * seed) % 2**32)


def weight(key: str, shape: list[int], seed: int) -> Tensor:
    """The float32 parameter or buffer of that key: near one for scales, small for biases, fan-in scaled otherwise."""
    noise = _stream(key, seed, 7919).standard_normal(size=tuple(shape)).astype(np.float32)
    last = key.rpartition(".")[2].lower()
    if last == "running_var":
        value = 1.0 + 0.1 * np.abs(noise)
    elif last == "running_mean":
        value = 0.1 * noise
    elif len(shape) == 0 or (len(shape) == 1 and last == "weight"):
        value = 1.0 + 0.1 * noise
    elif len(shape) == 1:
        value = (0.5 if "gamma" in last or "scale" in last else 0.0) + 0.1 * noise
    elif shape[0] == 1 and last != "weight":
        value = 0.2 * noise
    else:
        value = noise / math.sqrt(max(1, math.prod(shape[1:])))
    return torch.from_numpy(np.asarray(value, dtype=np.float32)).reshape(shape)


def draw(name: str, spec: Mapping[str, Any]) -> Tensor:
    """The input of that name: float32 (normal or uniform), or int64 tokens."""
    stream, shape = _stream(name, spec.get("seed", 0), 104729), tuple(spec["shape"])
    kind = spec.get("kind", "normal")
    if kind == "tokens":
        return torch.from_numpy(stream.randint(spec["low"], spec["high"], size=shape).astype(np.int64))
    if kind == "uniform":
        values = stream.uniform(spec.get("low", 0.0), spec.get("high", 1.0), size=shape)
    else:
        values = stream.standard_normal(size=shape)
    return torch.from_numpy(values.astype(np.float32))


@dataclass(frozen=True)
class Case:
    """One case; spec: its JSON; expected: output name -> the stored values."""

    name: str
    spec: dict[str, Any]
    expected: dict[str, np.ndarray]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The reference's floating-point state dict without what the reference computes itself."""
        return {
            key: weight(key, shape, self.spec["seed"])
            for key, (shape, dtype) in self.spec["state_dict"].items()
            if dtype.startswith(("float", "bfloat")) and not any(part in key for part in self.spec["keep"])
        }

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: draw(name, spec) for name, spec in self.spec["inputs"].items()}

    def differences(self, outputs: Mapping[str, Tensor]) -> dict[str, float]:
        """Largest absolute difference of each output; infinite where it is missing, misshapen or not finite."""
        return {name: self._difference(name, outputs.get(name)) for name in self.expected}

    def _difference(self, name: str, output: Tensor | None) -> float:
        spec = self.spec["outputs"][name]
        if output is None or list(output.shape) != spec["shape"]:
            return math.inf
        got = output.detach().double().flatten()[:: spec["stride"]]
        want = torch.from_numpy(self.expected[name]).double().flatten()
        return float((got - want).abs().max()) if bool(got.isfinite().all()) else math.inf


def load(name: str) -> Case:
    """The case of that name, without its suffix, from tests/goldens/cases."""
    path = CASES / f"{name}.json"
    with np.load(path.with_suffix(".npz")) as archive:
        return Case(name, json.loads(path.read_text()), {key: archive[key] for key in archive.files})


def names(system: str) -> list[str]:
    """The cases of one system, in name order."""
    return sorted(path.stem for path in CASES.glob(f"{system}__*.json"))
