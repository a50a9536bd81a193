"""What is compared: models by name, their inputs, and how near to the reference an answer must be to be timed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

# Short names. Any model of the zoo is "<paper>/<variant>"; "timm:<model>" is timm's own, with random weights.
SHORT = {
    "deit_tiny": "deit/deit_ti",
    "deit_small": "deit/deit_s",
    "deit_base": "deit/deit_b",
    "digits": "deit/digits_tiny",
    "segvit_base": "dtop/segvit_b_ade20k_512",
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
    name = SHORT.get(case.model, case.model)
    if name.startswith("timm:"):
        model, x = _timm(name.removeprefix("timm:"), case.batch)
    elif "/" in name:
        model, x = _zoo(*name.split("/", 1), case.batch)
    else:
        raise SystemExit(f"unknown model {name!r}: known are {', '.join(SHORT)}, <paper>/<variant> and timm:<name>")
    _liven(model)
    return model.eval(), x


def _zoo(paper: str, variant: str, batch: int) -> tuple[nn.Module, torch.Tensor]:
    from compiled_attn import zoo

    model = zoo.create(paper, variant)
    record = zoo.PAPERS[paper]
    inputs = record.inputs(record.variants[variant], batch, torch.Generator().manual_seed(1))
    if len(inputs) != 1:
        raise SystemExit(f"{paper}/{variant} takes {len(inputs)} inputs; only models of one input are timed")
    return model, inputs[0]


def _timm(name: str, batch: int) -> tuple[nn.Module, torch.Tensor]:
    try:
        import tests.torchvision_shim  # noqa: F401

        import timm  # isort: skip
    except Exception as error:  # absent, or its torchvision was built for another torch
        raise SystemExit(f"timm:{name} needs timm, which can not be imported here: {error}") from error
    model = timm.create_model(name)
    channels, side, _ = model.pretrained_cfg["input_size"]
    return model, torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


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
    """Floating-point operations of one call in eager mode (a multiply-add is two).

    Counted by torch, with two operators that it leaves out: its attention on a CPU, and attention within ragged
    sequences, by their own lengths.
    """
    from torch.utils.flop_counter import FlopCounterMode

    import compiled_attn.ops  # noqa: F401

    own: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.compiled_attn.ragged_attention: _ragged_flops,
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=own) as counter:
        model(x)
    return counter.get_total_flops()


def _attention_flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_args: Any, **_options: Any) -> int:
    """Of both products: q [B, H, N, D], k [B, H, M, D], v [B, H, M, Dv]."""
    return 2 * q.shape[:3].numel() * k.shape[2] * (q.shape[3] + v.shape[3])


def _ragged_flops(*args: torch.Tensor, **_options: Any) -> int:
    q, _, v, q_offsets, k_offsets = args
    pairs = int((q_offsets.diff() * k_offsets.diff()).sum())
    return 2 * pairs * q.shape[1] * (q.shape[2] + v.shape[2])


for _count in (_attention_flops, _ragged_flops):
    _count._get_raw = True  # type: ignore[attr-defined]  # the counter hands over tensors, not their shapes
