"""What is compared: models by name, their inputs, and how near to the reference an answer must be to be timed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

# name -> (paper, variant, picture side, channels) of the zoo; a name "timm:<model>" or "transformers:<class>" is the
# other library's own model, with random weights.
ZOO = {
    "deit_tiny": ("deit", "deit_ti", 224, 3),
    "deit_small": ("deit", "deit_s", 224, 3),
    "deit_base": ("deit", "deit_b", 224, 3),
    "digits": ("deit", "digits_tiny", 48, 1),
    "segvit_base": ("dtop", "segvit_b_ade20k_512", 512, 3),
}
KEEP_RATE, KEEP_AT = 0.7, (3, 6, 9)

# Largest difference to eager float32, relative to the largest output. bfloat16 has 8 bits: 12 blocks of it stay well
# below 5 % on random weights, and a wrong kernel is far above.
TOLERANCE = {"float32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True)
class Case:
    """One comparison. precision: "float32" or "bf16"; dynamic: the batch is a symbolic dimension where a peer can."""

    model: str
    batch: int
    precision: str = "float32"
    threads: int = 1
    dynamic: bool = False

    @property
    def text(self) -> str:
        batch = "dynamic batch" if self.dynamic else "batch"
        return f"{self.model} {batch} {self.batch} {self.precision} threads {self.threads}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def build(case: Case) -> tuple[nn.Module, torch.Tensor]:
    """The model in eval mode with random weights (seed 0), and a float32 batch of pictures (seed 1)."""
    torch.manual_seed(0)
    if case.model in ZOO:
        from compiled_attn import zoo

        paper, variant, side, channels = ZOO[case.model]
        model = zoo.create(paper, variant)
    elif case.model.startswith("timm:"):
        model, side, channels = _timm(case.model.removeprefix("timm:"))
    else:
        raise SystemExit(f"unknown model {case.model!r}: known are {', '.join(ZOO)} and timm:<name>")
    _liven(model)
    torch.manual_seed(1)
    return model.eval(), torch.randn(case.batch, channels, side, side)


def _timm(name: str) -> tuple[nn.Module, int, int]:
    try:
        import tests.torchvision_shim  # noqa: F401

        import timm  # isort: skip
    except Exception as error:  # absent, or its torchvision was built for another torch
        raise SystemExit(f"timm:{name} needs timm, which can not be imported here: {error}") from error
    model = timm.create_model(name)
    channels, side, _ = model.pretrained_cfg["input_size"]
    return model, side, channels


def _liven(model: nn.Module) -> None:
    """Random weights of ordinary size: with the initial ones every layer is near the identity and hides mistakes."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            fan = parameter.shape[-1] if parameter.dim() == 3 else parameter[0].numel()
            nn.init.normal_(parameter, std=1.0 / math.sqrt(fan))
        else:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)


def difference(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference relative to the largest value of the reference; infinite where shapes or finiteness differ."""
    if found.shape != reference.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return ((found.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def flops(model: nn.Module, x: torch.Tensor) -> int:
    """Floating-point operations of one call, counted by torch (a multiply-add is two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()
