"""Which depthwise chains of stock models are fused: convolutions held by ops of those present, numbers, and misses.

python -m bench.depthwise_table [name ...]     published sizes of the networks, random weights, pictures of 64 pixels
"""

from __future__ import annotations

import collections
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from compiled_attn.ir import targets
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Program
from compiled_attn.passes import pipelines
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.fuse_depthwise import RULE, FuseDepthwise
from compiled_attn.runtime.capture import capture

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from models import transformers_model

aten = torch.ops.aten
TIMM = (
    "convnext_tiny",
    "convnextv2_tiny",
    "focalnet_tiny_srf",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "mobileone_s1",
    "repvit_m1",
    "inception_next_tiny",
    "fastvit_t8",
    "poolformerv2_s12",
    "tf_efficientnet_b0",
    "mambaout_tiny",
)
TRANSFORMERS = ("ConvNextV2Model", "FocalNetModel")
SIDE = 64


@dataclass(frozen=True)
class Row:
    """One model. present, fused: depthwise convolutions before, and those that an op now holds.  ops: what each is, and
    how often.  error: largest difference from eager, relative to the largest output.  misses: sentences, how often."""

    name: str
    present: int
    fused: int
    ops: dict[str, int]
    error: float
    misses: dict[str, int]

    def __str__(self) -> str:
        count = sum(self.ops.values())
        lines = [f"{self.name:<24} {self.fused:>4} of {self.present:<4} {count:>4} ops   {self.error:8.1e}"]
        lines += [f"    {times:>3} x {what}" for what, times in self.ops.items()]
        lines += [f"    {times:>3} not, because {what}" for what, times in self.misses.items()]
        return "\n".join(lines)


HEADER = f"{'model':<24} {'convolutions':<14} {'':<8} error"


def build(name: str) -> nn.Module:
    """The stock model in inference mode; random weights, and statistics of its batch norms from random pictures."""
    import torchvision_shim  # noqa: F401

    torch.manual_seed(0)
    model = transformers_model(name, "eager") if name in TRANSFORMERS else __import__("timm").create_model(name)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean of what was seen
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    for parameter in model.parameters():
        if parameter.dim() == 1 and float(parameter.detach().abs().max()) < 1e-3:
            nn.init.uniform_(parameter, 0.1, 1.0)  # layer scales and biases that start near 0 and would hide the blocks
    with torch.no_grad():
        model.train()(torch.randn(4, 3, SIDE, SIDE))
    return model.eval()


def depthwise(program: Program) -> list[torch.fx.Node]:
    """The depthwise convolutions of a program."""
    found = []
    for node in program.graph.nodes:
        groups = node.args[6] if node.target is aten.conv2d.default and len(node.args) > 6 else 1
        if groups != 1 and node.args[1].meta["val"].shape[1] == 1:
            found.append(node)
    return found


def row(name: str) -> Row:
    """Captures the model with a symbolic batch, fuses (verified), and compares with eager at another batch."""
    model = build(name)
    argument = "pixel_values" if name in TRANSFORMERS else "x"
    program = capture(model, (torch.randn(2, 3, SIDE, SIDE),), {}, dynamic_shapes={argument: {0: "batch"}})
    notes = Notes()
    target = targets.load("cpu")
    cleaned, _ = run_passes(program, pipelines.portable(), target, notes)
    fused, _ = run_passes(cleaned, [FuseDepthwise()], target, notes)
    x = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        wanted, found = (_first(one(x)) for one in (model, fused))
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    chains = notes.of(RULE)
    present, left = len(depthwise(program)), len(depthwise(fused))
    ops = collections.Counter(n.what for n in chains.done)
    return Row(name, present, present - left, ops, error, collections.Counter(m.because for m in chains.misses))


def _first(out: object) -> torch.Tensor:
    found = out if isinstance(out, torch.Tensor) else next(iter(out.values()))  # type: ignore[attr-defined]
    if not bool(found.isfinite().all()):
        raise SystemExit("the model's own output is not finite, so that there is nothing to compare")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(HEADER, flush=True)
    for chosen in sys.argv[1:] or (*TIMM, *TRANSFORMERS):
        print(row(chosen), flush=True)
