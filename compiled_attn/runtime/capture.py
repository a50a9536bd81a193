"""From any `nn.Module` to a Program: torch.export, the normal form, and errors that name the user's line."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import CaptureError
from compiled_attn.ir.program import Program
from compiled_attn.ir.verify import verify

MODES = ("inference", "train")


@_torch.one_at_a_time
def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    mode: str = "inference",
) -> Program:
    """Captures `model` on example inputs; the model is not changed and its tensors are shared.

    args, kwargs: what the model is called with; pytrees and None are fine.
    dynamic_shapes: as torch.export takes it; besides, a dimension may be named by a string (`{"x": {0: "batch"}}`):
    the same name is the same size, and a size of 1 is among those allowed.
    mode: "inference" captures under no_grad in the functional normal form, as the model's train/eval flags say;
    "train" keeps the training form.
    Raises CaptureError, with the user's line, where the model can not be captured.
    """
    if mode not in MODES:
        raise CaptureError(f"unknown mode {mode!r}", facts=f"modes are {', '.join(MODES)}", do="choose one of them")
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"{type(model).__name__} is not an nn.Module",
            facts="capture records the parameters of a module",
            do="wrap the function in a module whose forward calls it",
        )
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise CaptureError(
            f"{type(model).__name__} can not be captured under autocast",
            facts="autocast is on, and a captured graph would not hold its casts",
            do="leave the autocast block and give precision='bf16'; what compile() returns may be called in it",
        )
    rewritten = getattr(model, "program_of", None)
    if rewritten is not None:  # an observed model, whose taps are outputs
        return rewritten(arguments(args), kwargs, dynamic_shapes=dynamic_shapes, mode=mode)
    args, kwargs = arguments(args), dict(kwargs or {})
    example = (args, kwargs)
    shapes = named_dimensions(dynamic_shapes)
    if shapes is not None:
        example = _away_from_one(example, shapes, model)
    grad = torch.enable_grad() if mode == "train" else torch.no_grad()
    try:
        with warnings.catch_warnings(), grad:
            warnings.simplefilter("ignore")
            exported = _export(model, example, shapes, retries=2 if _has_name(dynamic_shapes) else 0)
            if mode == "inference":
                exported = exported.run_decompositions({})
    except Exception as error:
        raise explain_failure(error, model) from error
    program = Program.from_export(exported, mode=mode)
    verify(program)
    return program


def arguments(args: Sequence[Any] | None) -> tuple[Any, ...]:
    """Example inputs as a tuple. Raises CaptureError for a tensor alone, which would count as one for each picture."""
    if isinstance(args, torch.Tensor):
        raise CaptureError(
            "example inputs are the model's arguments, one after the other",
            facts=f"given is a single tensor of the shape {list(args.shape)}",
            do="give a tuple: (x,)",
        )
    return tuple(args or ())


def _export(model: nn.Module, example: tuple[Any, Any], shapes: Any, *, retries: int) -> torch.export.ExportedProgram:
    """torch.export; a dimension that was only named takes the range that the model needs, never one size.

    retries: how often a range may be taken from what torch.export suggests.
    """
    try:
        return torch.export.export(
            model,
            example[0],
            example[1],
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    except Exception as error:
        refined = _torch.refined_shapes(str(error), shapes) if retries else None
        if refined is None:
            raise
    return _export(model, example, refined, retries=retries - 1)


def _has_name(shapes: Any) -> bool:
    if isinstance(shapes, Mapping):
        return any(_has_name(v) for v in shapes.values())
    if isinstance(shapes, (list, tuple)):
        return any(_has_name(v) for v in shapes)
    return isinstance(shapes, str)


def named_dimensions(shapes: Any, dims: dict[str, Any] | None = None) -> Any:
    """dynamic_shapes with every string replaced by one torch.export.Dim of that name, which allows sizes from 1."""
    dims = {} if dims is None else dims
    if isinstance(shapes, str):
        if not shapes.isidentifier():
            raise CaptureError(
                f"{shapes!r} can not name a dimension", facts="names are Python identifiers", do="rename it"
            )
        return dims.setdefault(shapes, torch.export.Dim(shapes, min=1))
    if isinstance(shapes, Mapping):
        return {k: named_dimensions(v, dims) for k, v in shapes.items()}
    if isinstance(shapes, (list, tuple)):
        return type(shapes)(named_dimensions(v, dims) for v in shapes)
    return shapes


def _away_from_one(example: tuple[Any, Any], shapes: Any, model: nn.Module) -> tuple[Any, Any]:
    """Example inputs whose dynamic dimensions of size 1 are doubled, since tracing specialises sizes 0 and 1.

    Only tensors are changed, and the captured program allows the given size all the same.
    """
    args, kwargs = example
    if not isinstance(shapes, (Mapping, list, tuple)):
        raise CaptureError(
            "dynamic_shapes says which argument's dimensions vary",
            facts=f"given is a {type(shapes).__name__} alone",
            do="give one entry for each argument, for example ({0: 'batch'},) or {'x': {0: 'batch'}}",
        )
    positional, keyword = shapes_of_arguments(shapes, inspect.signature(model.forward), len(args), list(kwargs))
    new_args = tuple(_doubled(a, s) for a, s in zip(args, positional, strict=False)) + tuple(args[len(positional) :])
    return new_args, {k: _doubled(v, keyword.get(k)) for k, v in kwargs.items()}


def shapes_of_arguments(
    shapes: Any, signature: inspect.Signature, count: int, names: Sequence[str]
) -> tuple[list[Any], dict[str, Any]]:
    """What dynamic_shapes says of each of `count` positional arguments, and of the keyword arguments `names`.

    Of `*args` it says one thing for all, a tuple, as torch.export takes it.
    """
    named = isinstance(shapes, Mapping)
    entries = iter(() if named else shapes)
    positional: list[Any] = []
    for parameter in signature.parameters.values():
        entry = shapes.get(parameter.name) if named else next(entries, None)
        many = parameter.kind is inspect.Parameter.VAR_POSITIONAL and (named or isinstance(entry, (list, tuple)))
        positional += list(entry or ()) if many else [entry]
    positional += [] if named else list(entries)
    keyword = {k: shapes.get(k) if named else None for k in names}
    return (positional + [None] * count)[:count], keyword


def _doubled(value: Any, spec: Any) -> Any:
    if spec is None:
        return value
    if isinstance(value, torch.Tensor):
        dims = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
        for dim, declared in dims:
            if not -value.dim() <= dim < value.dim():
                raise CaptureError(
                    f"dynamic_shapes names dimension {dim} of a tensor that has {value.dim()}",
                    facts=f"its shape is {list(value.shape)}",
                    do="number its dimensions from 0",
                )
            if declared is not None and not isinstance(declared, int) and value.shape[dim] == 1:
                value = torch.cat([value, value], dim)
        return value
    if isinstance(value, Mapping) and isinstance(spec, Mapping):
        made: Any = type(value)
        return made({k: _doubled(v, spec.get(k)) for k, v in value.items()})
    if isinstance(value, (list, tuple)) and isinstance(spec, (list, tuple)):
        return type(value)(_doubled(v, s) for v, s in zip(value, spec, strict=False))
    return value


def explain_failure(error: Exception, model: nn.Module) -> CaptureError:
    """torch.export's failure as a CaptureError: the user's line, what was met there, what to change."""
    text = str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    first = first.split(" For more information")[0]
    return CaptureError(
        f"{type(model).__name__} can not be captured: {first}",
        where=_user_line(error, text),
        facts=type(error).__name__ + _second_fact(text),
        do=_advice(error, text),
    )


def _user_line(error: Exception, text: str) -> str:
    import traceback

    own = ("/torch/", "compiled_attn/", "<frozen", "<string>", "contextlib", "/inspect.py")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(o in f.filename for o in own)]
    inside = [f for f in frames if f.name not in ("<module>",)]
    for frame in reversed(inside or frames):
        return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    found = re.findall(r'File "([^"]+)", line (\d+), in (\w+)\n\s+(.*)', text)
    if found:
        file, line, name, code = found[-1]
        return f"{file}:{line} in {name}: {code}"
    return ""


def _second_fact(text: str) -> str:
    """What torch.export says of a dimension that can not vary as declared, and which range it suggests."""
    found = re.findall(r"^ *- (Not all values[^\n]*|You marked[^.\n]*)", text, re.M)
    suggested = re.search(r"Suggested fixes:\n((?: +\S[^\n]*\n)+)", text)
    if suggested:
        found.append("suggested: " + ", ".join(line.strip() for line in suggested[1].splitlines()))
    if not found:
        found = re.findall(r"(Not all values[^\n]*|specialized[^\n]*)", text)[:1]
    return "".join(f": {part}" if i == 0 else f"; {part}" for i, part in enumerate(found))


def _advice(error: Exception, text: str) -> str:
    kind = type(error).__name__
    if "Constraints violated" in text or "specialized" in text:
        return "leave that dimension static, or give it the range that the message suggests (torch.export.Dim)"
    if "GuardOnDataDependent" in kind or "data-dependent" in text or "Could not guard" in text:
        return "a branch depends on tensor values; replace it by torch.where or torch.cond, or bound it (torch._check)"
    if "`dynamic_shapes`" in text:
        return "give dynamic_shapes one entry for each argument, in order or by the arguments' own names"
    if "Unsupported input type" in text or (isinstance(error, TypeError) and "argument" in text):
        return "give example inputs that the model's forward accepts"
    if "shape" in text or "size" in text:
        return "give example inputs of a shape that the model accepts in eager mode"
    return "run the model eagerly on these inputs; if that works, use torch.compile(model, backend='compiled_attn')"
