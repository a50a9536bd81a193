"""Who is compared: each peer prepares a case once and gives a call to be timed, or says why it can not."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cases import KEEP_AT, KEEP_RATE, Case


@dataclass(frozen=True)
class Runner:
    """A prepared case. call: one inference, returns the output as float32.

    reference: computes what the output must equal, where that is not the model in eager float32.
    facts: what a reader must know to judge the time, such as a precision hint.  artifact: what was written, if any.
    """

    call: Callable[[], torch.Tensor]
    reference: Callable[[], torch.Tensor] | None = None
    facts: dict[str, str] = field(default_factory=dict)
    artifact: Path | None = None


class NotHere(Exception):
    """The peer can not run the case; the message says why."""


Prepare = Callable[[Case, nn.Module, torch.Tensor, Path], Runner]


def narrow(case: Case, model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """Model and input in the case's dtype, for peers that compute in the dtype of what they are given."""
    if case.precision == "bf16":
        return copy.deepcopy(model).to(torch.bfloat16), x.to(torch.bfloat16)
    return model, x


def written_out(case: Case, model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The model with the vocabulary's ops as plain ATen ones, which is all that others know; itself without any."""
    from compiled_attn.ir import _torch
    from compiled_attn.ir.op import op_of
    from compiled_attn.runtime.capture import capture
    from compiled_attn.runtime.onnx import decomposed

    name = next(iter(inspect.signature(model.forward).parameters))
    example = torch.cat([x, x]) if case.dynamic and len(x) == 1 else x
    shapes = {name: {0: "batch"}} if case.dynamic else None
    program = capture(model, (example,), {}, dynamic_shapes=shapes)
    ours = any(n.op == "call_function" and op_of(n.target) is not None for n in program.graph.nodes)
    return _torch.quiet_module(decomposed(program), guards=False) if ours else model


def eager(case: Case, model: nn.Module, x: torch.Tensor, _folder: Path) -> Runner:
    model, x = narrow(case, model, x)
    return Runner(lambda: model(x).float())


def _torch_compile(**options: Any) -> Prepare:
    def prepare(case: Case, model: nn.Module, x: torch.Tensor, _folder: Path) -> Runner:
        model, x = narrow(case, model, x)
        model = written_out(case, model, x)
        fast = torch.compile(model, fullgraph=True, dynamic=True if case.dynamic else None, options=options or None)
        fast(x)
        facts = {key: str(value) for key, value in options.items()}
        return Runner(lambda: fast(x).float(), facts=facts)

    return prepare


def _onnx_file(case: Case, model: nn.Module, x: torch.Tensor, folder: Path) -> Path:
    path = folder / "model.onnx"
    if not path.exists():
        shapes = ({0: torch.export.Dim("batch", min=1)},) if case.dynamic else None
        example = torch.cat([x, x]) if case.dynamic and len(x) == 1 else x
        torch.onnx.export(
            written_out(case, model, x), (example,), str(path), dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    return path


def onnxruntime(case: Case, model: nn.Module, x: torch.Tensor, folder: Path) -> Runner:
    if case.precision == "bf16":
        raise NotHere("ONNX Runtime has no bfloat16 matrix product on x86 CPUs")
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise NotHere(f"it is not installed: {error}") from error
    path = _onnx_file(case, model, x, folder)
    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # peers share the cores in turn
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name, value = session.get_inputs()[0].name, x.numpy()
    return Runner(
        lambda: torch.from_numpy(session.run(None, {name: value})[0]),
        facts={"version": ort.__version__, "optimisation": "all"},
        artifact=path,
    )


def openvino(case: Case, model: nn.Module, x: torch.Tensor, folder: Path) -> Runner:
    try:
        import openvino as ov
    except ImportError as error:
        raise NotHere(f"it is not installed: {error}") from error
    hint = {"float32": "f32", "bf16": "bf16"}[case.precision]
    core = ov.Core()
    shape = ov.PartialShape([-1 if case.dynamic else case.batch, *x.shape[1:]])
    converted = ov.convert_model(str(_onnx_file(case, model, x, folder)), input=shape)
    path = folder / "model.xml"
    ov.save_model(converted, str(path), compress_to_fp16=False)
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": case.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(converted, "CPU", options)
    request, value = compiled.create_infer_request(), x.numpy()
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return Runner(
        lambda: torch.from_numpy(next(iter(request.infer([value], share_inputs=True).values()))),
        facts={"version": ov.__version__.split("-")[0], "precision hint": f"{hint}, in force {used}"},
        artifact=path.with_suffix(".bin"),
    )


def _ours(*, reorganize: bool, tune: str = "heuristic") -> Prepare:
    def prepare(case: Case, model: nn.Module, x: torch.Tensor, _folder: Path) -> Runner:
        import compiled_attn as ca

        passes = [ca.passes.ReorganizeTokens(keep_rate=KEEP_RATE, at=KEEP_AT)] if reorganize else []
        precision = None if case.precision == "float32" else case.precision
        name = next(iter(inspect.signature(model.forward).parameters))
        shapes = {name: {0: "batch"}} if case.dynamic else None
        fast = ca.compile(
            model, "cpu", example_inputs=(x,), dynamic_shapes=shapes, precision=precision, passes=passes, tune=tune
        )
        facts = {"compile": ", ".join(f"{k} {v:.1f} s" for k, v in fast.builds[0].seconds.items())}
        if not reorganize:
            return Runner(lambda: fast(x), facts=facts)
        facts |= {"keep rate": str(KEEP_RATE), "at": str(KEEP_AT)}
        return Runner(lambda: fast(x), lambda: _plain(model, x, passes), facts)

    return prepare


def _plain(model: nn.Module, x: torch.Tensor, passes: list[Any]) -> torch.Tensor:
    """The reorganised program run node by node in eager float32: what the reorganised peer must compute."""
    import compiled_attn as ca
    from compiled_attn.ir.notes import Notes
    from compiled_attn.passes import pipelines
    from compiled_attn.passes.base import run_passes

    program, _ = run_passes(ca.capture(model, (x,)), pipelines.portable(passes), ca.targets.load("cpu"), Notes())
    return program(x)


PEERS: dict[str, Prepare] = {
    "eager": eager,
    "torch.compile": _torch_compile(),
    "torch.compile-max": _torch_compile(max_autotune=True, freezing=True),
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ours": _ours(reorganize=False),
    "ours-measured": _ours(reorganize=False, tune="measure"),
    "ours-keep0.7": _ours(reorganize=True),
}
DEFAULT = ("eager", "torch.compile", "torch.compile-max", "onnxruntime", "openvino", "ours", "ours-keep0.7")
APPROXIMATE = ("ours-keep0.7",)  # not the dense model's numbers: compared with the plain form of the same rule
