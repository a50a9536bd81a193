"""Reading the authors' checkpoints into a model of the zoo, key for key, with a report of what did not fit."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compiled_attn.ir.errors import CheckpointError
from compiled_attn.zoo.layers.vit import resize_positions

NESTS = ("model", "state_dict", "model_state_dict", "model_ema", "state_dict_ema")  # where trainers put the weights
PREFIXES = ("module.", "model.", "_orig_mod.")  # what wrappers put before every key
POSITIONS = "pos_embed"


@dataclass(frozen=True)
class Report:
    """What a checkpoint gave: keys loaded, and keys missing from it, unexpected in it, misshapen or resized.

    misshapen and resized: key -> (shape in the checkpoint, shape in the model).
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    resized: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def complete(self) -> bool:
        """Every key of either side found its fellow, resized ones included."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        lines = [f"loaded      {len(self.loaded)} keys"]
        for label, keys in (("missing", self.missing), ("unexpected", self.unexpected)):
            lines += [f"{label:<11} {key}" for key in keys]
        for label, shapes in (("misshapen", self.misshapen), ("resized", self.resized)):
            verb = "in the checkpoint, the model has" if label == "misshapen" else "made bicubically into"
            lines += [f"{label:<11} {key}: {list(old)} {verb} {list(new)}" for key, (old, new) in shapes.items()]
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    source: str | PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    resize: bool = False,
) -> Report:
    """Copies a checkpoint into `model`, whose dtype and device stay, and says what fitted.

    source: a `.safetensors` file, a torch file (read with weights_only=True, so it can run nothing), or a mapping; the
    weights may lie under "model" or "state_dict", their keys begin with "module.". resize: position embeddings of
    another picture size are resized bicubically. strict: anything that does not fit raises CheckpointError and leaves
    the model as it was; otherwise what fits is loaded and the report lists the rest.
    """
    where = "load_checkpoint(mapping)" if isinstance(source, Mapping) else f"load_checkpoint({str(source)!r})"
    if not isinstance(source, (Mapping, str, PathLike)):
        raise _no_weights(where, f"it is a {type(source).__name__}; a path, or a mapping from key to tensor is needed")
    given = _weights(source if isinstance(source, Mapping) else _read(Path(source), where), where)
    own = model.state_dict()
    given = _without_prefix(given, own)
    fitting: dict[str, Tensor] = {}
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for key in own.keys() & given.keys():
        shapes = (tuple(given[key].shape), tuple(own[key].shape))
        if shapes[0] == shapes[1]:
            fitting[key] = given[key]
        elif resize and (positions := _resized(model, key, given[key], own[key])) is not None:
            fitting[key], resized[key] = positions, shapes
        else:
            misshapen[key] = shapes
    report = Report(
        loaded=tuple(key for key in own if key in fitting),
        missing=tuple(key for key in own if key not in given),
        unexpected=tuple(key for key in given if key not in own),
        misshapen={key: misshapen[key] for key in own if key in misshapen},
        resized=resized,
    )
    if strict and not report.complete:
        raise _unfit(report, where)
    for key, value in fitting.items():
        _want_copyable(key, value, own[key], where)
    model.load_state_dict(fitting, strict=False)
    return report


def _read(path: Path, where: str) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        damaged = _damaged(path)
        if damaged is None:
            # trainers store their options beside; it is data
            with torch.serialization.safe_globals([argparse.Namespace]):
                read = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle ends in almost any of Python's own errors
        raise CheckpointError(
            "the checkpoint cannot be read",
            where=where,
            facts=_first_fact(error),
            do="give a .safetensors file or a torch file that holds tensors and plain containers only",
        ) from error
    if damaged is not None:
        raise CheckpointError(
            "the checkpoint is damaged",
            where=where,
            facts=f"the bytes of its member {damaged} do not give the checksum that stands beside them",
            do="fetch the file again",
        )
    if not isinstance(read, Mapping):
        raise _no_weights(where, f"the file holds a {type(read).__name__}, a mapping from key to tensor is needed")
    return read


def _damaged(path: Path) -> str | None:
    """The first member of a zip archive that is not what was written; torch's reader asks for no checksum."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _first_fact(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it would call {asked.group(1)}, which is no tensor" if asked else "it is no file that torch.save wrote"
        return f"{type(error).__name__}: {what}"
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'empty'}"


def _want_copyable(key: str, value: Tensor, own: Tensor, where: str) -> None:
    """Raises CheckpointError where copying would lose what the checkpoint says, or copies nothing."""
    kinds = [x.dtype for x in (value, own)]
    because = None
    if value.is_meta:
        because = "it holds no numbers, only a shape (device meta)"
    elif value.layout is not torch.strided:
        because = f"its layout is {value.layout}, the model's weights are dense"
    elif own.is_floating_point() and not value.is_floating_point():
        because = f"it is {kinds[0]}, the model's weight is {kinds[1]}"
    if because is not None:
        raise CheckpointError(
            f"the checkpoint's {key} can not be copied",
            where=where,
            facts=because,
            do="turn it into a dense floating-point tensor first, as whoever wrote the file defines",
        )


def _weights(read: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The mapping itself, or the one nested in it, that maps keys to tensors."""
    for nest in NESTS:
        if isinstance(read.get(nest), Mapping):
            return _weights(read[nest], where)
    weights = {key: value for key, value in read.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not weights:
        listed = ", ".join(map(str, list(read)[:8])) or "nothing"
        raise _no_weights(where, f"it holds {listed}; tensors, or one of {', '.join(NESTS)} with tensors, are needed")
    return weights


def _without_prefix(given: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the wrappers' prefixes, as long as all of them carry one and the model's do not."""
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in given) and not any(key.startswith(prefix) for key in own):
            return _without_prefix({key.removeprefix(prefix): value for key, value in given.items()}, own)
    return given


def _resized(model: nn.Module, key: str, given: Tensor, own: Tensor) -> Tensor | None:
    """Position embeddings made to fit, or None where this key holds none or its grid is not square."""
    if key == POSITIONS and given.ndim == own.ndim == 4 and given.shape[3] == own.shape[3]:  # a map [1, Y, X, C]
        old_grid, grid = given.shape[1:3], own.shape[1:3]
        return resize_positions(given.float().flatten(1, 2), 0, grid, old_grid).unflatten(1, grid)
    if key != POSITIONS or given.ndim != 3 or given.shape[2] != own.shape[2]:
        return None
    prefix = getattr(model, "prefix", 1)
    old, new = given.shape[1] - prefix, own.shape[1] - prefix
    if old < 1 or round(old**0.5) ** 2 != old or round(new**0.5) ** 2 != new:
        return None
    side = round(new**0.5)
    return resize_positions(given.float(), prefix, (side, side))


def _no_weights(where: str, facts: str) -> CheckpointError:
    return CheckpointError(
        "the checkpoint holds no weights", where=where, facts=facts, do="give the state dict, or a file that holds it"
    )


def _unfit(report: Report, where: str) -> CheckpointError:
    def some(keys: object) -> str:
        keys = list(keys)  # type: ignore[call-overload]
        return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")

    facts = [f"missing {some(report.missing)}"] if report.missing else []
    facts += [f"unexpected {some(report.unexpected)}"] if report.unexpected else []
    shapes = [f"{key} {list(old)} for {list(new)}" for key, (old, new) in report.misshapen.items()]
    facts += [f"misshapen {some(shapes)}"] if shapes else []
    hint = "pass resize=True to resize the positions bicubically" if POSITIONS in report.misshapen else ""
    return CheckpointError(
        "the checkpoint does not fit the model",
        where=where,
        facts="; ".join(facts),
        do=hint or "create the variant that the checkpoint was made for, or pass strict=False and read the report",
    )
