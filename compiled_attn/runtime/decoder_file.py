"""A decoder as one file: `export(decoder, path=...)` writes it, `load_decoder(path)` and the C++ runner continue texts.

    art = ca.export(ca.decoder(llama, policy=HeavyHitters(), budget=512), path="llama.pt2")
    found = ca.generate(ca.load_decoder("llama.pt2"), [[1, 5, 9]])

Both programs are built without their weights, of which the file, and the process that loads it, hold one copy. The
state of a conversation is the caller's: two over one decoder do not mix.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compiled_attn.ir.errors import CaptureError, TargetError
from compiled_attn.ir.targets import Target
from compiled_attn.passes.evict_kv import EvictKV
from compiled_attn.runtime import archive, conversation, cross, describe, programs, weights
from compiled_attn.runtime.artifact import Artifact, write_artifact
from compiled_attn.runtime.build import Settings, build_package, prepare
from compiled_attn.runtime.contract import Call, TensorSpec
from compiled_attn.runtime.conversation import Conversation
from compiled_attn.runtime.decoder import Step, step_inputs
from compiled_attn.runtime.load import LoadedModel, bytes_of, checked_programs, device_of, set_threads
from compiled_attn.runtime.programs import NAMES, DecoderFile


@dataclass(frozen=True)
class Recipe:
    """What a decoder is made of: a decoder of transformers, the pass over its caches, tokens and texts at once."""

    model: nn.Module
    item: EvictKV
    chunk: int
    batch: int | None


@dataclass(frozen=True)
class Decoder:
    """Two programs over one state: `prompt` takes 1 to `chunk` tokens a text, `step` one; both give the last logits.

    (tokens [B, T], positions [B, T], state, slots=) -> logits [B, 1, vocabulary].
    limit: longest text, where the caches hold all of it; None: they forget, and there is no end.
    recipe: None where it was loaded.
    """

    prompt: Callable[..., Tensor]
    step: Callable[..., Tensor]
    call: Call
    chunk: int
    device: torch.device
    limit: int | None = None
    recipe: Recipe | None = None

    def fresh(self, batch: int = 1) -> Conversation:
        """A conversation of `batch` texts that has not begun."""
        return conversation.fresh(self.call, batch, self.device)


def export_decoder(
    decoder: Decoder,
    path: str | Path,
    *,
    target: str | Target = "auto",
    strict: bool = False,
    tune: str = "heuristic",
) -> DecoderFile:
    """Compiles a decoder's programs into one file at `path`. Raises as `export` does."""
    recipe = decoder.recipe
    if recipe is None:
        raise CaptureError(
            "a decoder that was loaded can not be exported again",
            where=str(path),
            facts="its programs are machine code, and the model is not there",
            do="copy its file, or make the decoder again: compiled_attn.decoder(model, ...)",
        )
    settings = Settings.of(target, passes=(recipe.item,), strict=strict, tune=tune, weights_beside=True)
    if cross.wanted(settings.target) or cross.is_sources(path):
        raise TargetError(
            f"a decoder is not built for {settings.target.name} here",
            where=str(path),
            facts="its programs share weights beside their code, and a build for a GPU that is not here holds its own",
            do="export it on that machine, or export its prompt and its step by themselves",
        )
    module = Step(recipe.model, recipe.chunk, last=True)
    artifacts, taken = {}, {}
    with tempfile.TemporaryDirectory(prefix="compiled_attn-") as folder:
        for name in NAMES:
            given = step_inputs(module, prompt=name == "prompt", batch=recipe.batch)
            artifacts[name], taken[name] = _built(module, given, settings, Path(folder) / f"{name}.pt2")
        return programs.write_programs(path, artifacts, taken, decoder.limit)


def _built(module: nn.Module, given: Any, settings: Settings, path: Path) -> tuple[Artifact, dict[str, bytes]]:
    """One program's artifact, written to `path`, and the weights that it asks for."""
    args, shapes = given
    build = prepare(module, args, None, Settings(**{**vars(settings), "dynamic_shapes": shapes}))
    call = describe.call_of(build.program, dynamic_shapes=shapes)
    raw = build_package(build, path.with_suffix(".raw.pt2"))
    return write_artifact(path, raw, call, settings.target, passes=describe.passes_of(build)), weights.taken_from(raw)


def load_decoder(
    path: str | Path,
    *,
    expect_sha256: str | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
) -> Decoder:
    """The decoder of a file that `export` wrote. Arguments, checks and errors are those of `load`."""
    path = Path(path)
    members, digest = archive.unpack(memoryview(bytes_of(path, expect_sha256)), str(path))
    programs.require_decoder(members, str(path))
    found, contents = checked_programs(path, members, digest, torch.__version__)
    where = device_of(contents["step"].contract, device, path)
    set_threads(threads)
    stores = [weights.stored(payload, where) for payload in found.weights]
    models = {}
    for name, program in found.programs.items():
        given = {weight: stores[at] for weight, at in program.weights.items()}
        models[name] = LoadedModel(contents[name], where, weights.tensors(contents[name].weights, given))
    call = contents["step"].contract.call
    return Decoder(
        models["prompt"], models["step"], call, _longest(contents["prompt"].contract.call), where, found.limit
    )


def _longest(call: Call) -> int:
    """Most tokens a text that a prompt's program takes at once."""
    tokens = next(i for i in call.inputs if isinstance(i, TensorSpec))
    size = tokens.shape[1]
    return (size if isinstance(size, int) else call.symbols[str(size)].max) or 1
