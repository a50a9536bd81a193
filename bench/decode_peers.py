"""Who decodes in bench/decode.py: each says a number of tokens behind one prompt, greedily, or says why it can not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import compiled_attn as ca
from bench.peers import NotHere
from compiled_attn.passes.evict_policies import HeavyHitters, Policy, SinkAndRecent
from compiled_attn.runtime.decoder import Step

Say = Callable[[int], list[int]]


@dataclass(frozen=True)
class Task:
    """A decoder of transformers in float32, the tokens of a prompt, most tokens said, slots that eviction keeps."""

    model: nn.Module
    prompt: list[int]
    count: int
    budget: int
    threads: int
    folder: Path

    @property
    def capacity(self) -> int:
        return len(self.prompt) + self.count


@dataclass(frozen=True)
class Peer:
    """say: the tokens behind the prompt.  wanted: says what `say` must, where that is not transformers' own tokens."""

    say: Say
    wanted: Say | None = None
    facts: dict[str, str] = field(default_factory=dict)


def dynamic(task: Task) -> Peer:
    return Peer(partial(_generated, task))


def static(task: Task) -> Peer:
    """The static cache with torch.compile, as `generate` does it by itself on a GPU."""
    from transformers import CompileConfig

    compiled = CompileConfig()
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled}
    return Peer(partial(_generated, task, **options), facts={"prompt": "read eagerly, as generate does"})


def _generated(task: Task, count: int, **options: Any) -> list[int]:
    model: Any = task.model
    given = torch.tensor([task.prompt])
    found = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return found[0, len(task.prompt) :].tolist()


def ours(task: Task, policy: Policy | None, budget: int) -> Peer:
    """Compiled; with a policy held to the same programs run eagerly."""
    options: dict[str, Any] = {"policy": policy, "budget": budget, "chunk": len(task.prompt), "batch": 1}
    fast = ca.decoder(task.model, **options, compiled=True, target="cpu")

    def say(decoder: Any, count: int) -> list[int]:
        return ca.generate(decoder, [task.prompt], max_new_tokens=count).tokens[0]

    wanted = None if policy is None else partial(say, ca.decoder(task.model, **options))
    return Peer(partial(say, fast), wanted, {"cache": f"{fast.fresh(1).nbytes / 1e6:.1f} MB"})


class Whole(nn.Module):
    """A step over full caches that gives the new ones: ONNX writes nothing in place."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        seen: torch.Tensor,
    ) -> tuple[Any, ...]:
        state = {"keys": [k.clone() for k in keys], "values": [v.clone() for v in values], "seen": seen.clone()}
        logits = self.step(tokens, positions, state)
        return (logits, *state["keys"], *state["values"], state["seen"])


def _onnx_files(task: Task) -> list[Path]:
    """The prompt's and the step's program, of fixed sizes."""
    step = Step(task.model, task.capacity, last=True)
    paths = [task.folder / "prompt.onnx", task.folder / "step.onnx"]
    for path, count in zip(paths, (len(task.prompt), 1), strict=True):
        if path.exists():
            continue
        state, whole = step.fresh(1), torch.zeros(1, count, dtype=torch.int64)
        args = (whole, whole.clone(), state["keys"], state["values"], state["seen"])
        program = ca.capture(Whole(step), args).to_exported()
        torch.onnx.export(program, (), str(path), dynamo=True, verbose=False)
    return paths


def _greedy(task: Task, run: Callable[[bool, Any, Any, Any], tuple[Any, Any]], fresh: Callable[[], Any]) -> Say:
    """The loop over run(is_prompt, tokens, positions, state) -> last logits as numpy [.., vocabulary], state."""
    import numpy as np

    def say(count: int) -> list[int]:
        length, said = len(task.prompt), []
        tokens, places, state = np.array([task.prompt]), np.arange(length)[None], fresh()
        for number in range(count):
            logits, state = run(number == 0, tokens, places, state)
            said.append(int(logits.reshape(-1).argmax()))
            tokens, places = np.array([said[-1:]]), np.array([[length + number]])
        return said

    return say


def _empty(task: Task) -> list[Any]:
    state = Step(task.model, task.capacity).fresh(1)
    return [t.numpy() for t in (*state["keys"], *state["values"], state["seen"])]


def onnxruntime(task: Task) -> Peer:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise NotHere(f"it is not installed: {error}") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # peers share the cores in turn
    sessions = [ort.InferenceSession(str(p), options, providers=["CPUExecutionProvider"]) for p in _onnx_files(task)]
    names = [i.name for i in sessions[0].get_inputs()]

    def value(array: Any) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array)

    def run(is_prompt: bool, tokens: Any, places: Any, state: Any) -> tuple[Any, Any]:
        given = dict(zip(names, (value(tokens), value(places), *state), strict=True))
        logits, *after = sessions[not is_prompt].run_with_ort_values(None, given)
        return logits.numpy(), after

    facts = {"version": ort.__version__, "caches": "whole, copied by each step: ONNX writes nothing in place"}
    return Peer(_greedy(task, run, lambda: [value(a) for a in _empty(task)]), facts=facts)


def openvino(task: Task) -> Peer:
    try:
        import openvino as ov
    except ImportError as error:
        raise NotHere(f"it is not installed: {error}") from error
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": task.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = ov.Core()
    requests = [
        core.compile_model(ov.convert_model(str(path)), "CPU", options).create_infer_request()
        for path in _onnx_files(task)
    ]

    def run(is_prompt: bool, tokens: Any, places: Any, state: Any) -> tuple[Any, Any]:
        logits, *after = requests[not is_prompt].infer([tokens, places, *state], share_inputs=True).values()
        return logits, after

    facts = {"version": ov.__version__.split("-")[0], "caches": "whole, copied by each step, as ONNX has them"}
    return Peer(_greedy(task, run, lambda: _empty(task)), facts=facts)


PEERS: dict[str, Callable[[Task], Peer]] = {
    "transformers": dynamic,
    "transformers static": static,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ours": lambda task: ours(task, None, task.capacity),
    "ours, H2O": lambda task: ours(task, HeavyHitters(recent=task.budget // 2), task.budget),
    "ours, sinks": lambda task: ours(task, SinkAndRecent(), task.budget),
}
