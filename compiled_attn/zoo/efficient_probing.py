"""EP: "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency".

Psomas et al., ICLR 2026, https://arxiv.org/abs/2506.10178. A frozen backbone is probed by attention whose learned
queries meet the raw tokens as keys; each query pools its own slice of the value channels, so there is neither a map of
queries nor of keys. With it come the thirteen poolings that it is compared with (layers/poolings.py).

Reference: billpsomas/efficient-probing at b8f4fb84e8127d41aaad997d35b98c2f43f33125 (poolings/ep.py, probe_heads.py,
models_vit.py). Known differences: any batch works (the reference's squeeze() fails at one picture); the tokens of a
`_all` probe are given by `Config.tokens`; the probes of layers in between and of attention statistics are not here.
As in the reference, the backbone's final norm is in the checkpoint but never applied to what is probed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compiled_attn.zoo import deit
from compiled_attn.zoo.layers import poolings
from compiled_attn.zoo.paper import Paper, Published


class EfficientProbing(nn.Module):
    """EP (section 3): tokens [B, N, C] to [B, C / d_out]; `queries` divides C / d_out."""

    def __init__(self, width: int, queries: int = 32, d_out: int = 1) -> None:
        super().__init__()
        self.queries = queries
        self.v = nn.Linear(width, width // d_out, bias=False)
        self.cls_token = nn.Parameter(torch.randn(1, queries, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.cls_token * x.shape[-1] ** -0.5 @ x.transpose(1, 2)).softmax(dim=-1)  # [B, Q, N]
        v = self.v(x).unflatten(-1, (self.queries, -1)).transpose(1, 2)  # [B, Q, N, C / (Q d_out)]
        return (weights.unsqueeze(2) @ v).flatten(1)


@dataclass(frozen=True)
class Head:
    """What a probe is built of.

    pooling: a name of POOLINGS, or "linear" for none; queries and d_out are EP's; heads: of aim and jepa; tokens: how
    many clip is built for; the others are abmilp's (poolings.Abmilp).
    """

    pooling: str = "ep"
    queries: int = 32
    d_out: int = 1
    heads: int = 16
    tokens: int = 196
    attended: str = "both"
    activation: str = "tanh"
    depth: int = 2
    positions: int = 0
    patches_only: bool = False


POOLINGS: Mapping[str, Callable[[int, Head], nn.Module]] = {
    "ep": lambda width, head: EfficientProbing(width, head.queries, head.d_out),
    "abmilp": lambda width, head: poolings.Abmilp(
        width, head.attended, head.activation, head.depth, head.positions, head.patches_only
    ),
    "aim": lambda width, head: poolings.Aim(width, head.heads),
    "cae": lambda width, _: poolings.Cae(width),
    "cait": lambda width, _: poolings.Cait(width),
    "cbam": lambda width, _: poolings.Cbam(width),
    "clip": lambda width, head: poolings.Clip(width, head.tokens),
    "coca": lambda width, _: poolings.Coca(width),
    "dinovit": lambda width, _: poolings.DinoVit(width),
    "dolg": lambda width, _: poolings.Dolg(width),
    "esimpool": lambda width, _: poolings.SimPoolWithoutLinear(width),
    "jepa": lambda width, head: poolings.Jepa(width, head.heads),
    "siglip": lambda width, _: poolings.Siglip(width),
    "simpool": lambda width, _: poolings.SimPool(width),
}


def probe(width: int, classes: int, head: Head) -> nn.Sequential:
    """The probe of tokens [B, N, width], or of vectors [B, width] for "linear": pooling, batch norm, classifier."""
    pooled = width // head.d_out if head.pooling == "ep" else width
    parts = [nn.BatchNorm1d(pooled, affine=False, eps=1e-6), nn.Linear(pooled, classes)]
    if head.pooling != "linear":
        parts.insert(0, POOLINGS[head.pooling](width, head))
    return nn.Sequential(*parts)


class Probed(nn.Module):
    """A probe on any backbone: `backbone` returns `(out, taps)`, as `ca.observe(model, taps=[tap])` does.

    The tap [B, N, C] is read from token `first` on, so that a class token is left out by first=1. The backbone stays
    as it is: no gradient reaches it.
    """

    def __init__(self, backbone: nn.Module, tap: str, head: nn.Module, first: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.tap = tap
        self.head = head
        self.first = first

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            _, taps = self.backbone(*inputs)
        return self.head(taps[self.tap][:, self.first :])


@dataclass(frozen=True)
class Config(deit.Config):
    """A ViT and its probe; tokens: "patches", "all" (class token first), or for a linear probe "cls" or "mean"."""

    head: Head = field(default_factory=Head)
    tokens: str = "patches"


class ProbedViT(deit.DeiT):
    """Pictures [B, in_chans, Y, X] to logits [B, classes] by a probe on the last block's tokens."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head = probe(config.width, config.classes, config.head)

    def tokens(self, x: Tensor) -> Tensor:
        """What the probe reads, of pictures x: [B, N, C], or [B, C] where it is linear."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return {
            "patches": lambda: x[:, 1:],
            "all": lambda: x,
            "cls": lambda: x[:, 0],
            "mean": lambda: x[:, 1:].mean(dim=1),
        }[self.config.tokens]()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x))


TI = Config(**vars(deit.TI))
S = Config(**vars(deit.S))
B = Config(**vars(deit.B))
L = Config(width=1024, heads=16, depth=24)
H = Config(width=1280, heads=16, depth=32, patch_size=14)

# Measured: pooling, norm and classifier of 1000 classes at width 768 and 196 tokens (card of EP).
HEADS = {
    "ep": 1_383_400,
    "dolg": 1_361_897,
    "cbam": 842_828,
    "esimpool": 770_536,
    "coca": 1_805_032,
    "aim": 1_949_416,
    "simpool": 1_950_184,
    "cae": 3_135_976,
    "clip": 3_284_200,
    "abmilp": 3_720_425,
    "siglip": 7_854_568,
    "dinovit": 7_854_568,
    "jepa": 7_857_640,
    "cait": 7_860_712,
}
BACKBONE_B = 85_798_656  # ViT-B/16 without its classifier


def _variants() -> dict[str, Any]:
    rows = {f"vit_b_{name}": replace(B, head=Head(name, heads=12)) for name in HEADS}
    return rows | {
        "vit_s_ep": S,
        "vit_l_ep": L,
        "vit_ti_160_ep_q8_d2": replace(TI, img_size=160, classes=37, head=Head(queries=8, d_out=2)),
        "vit_b_linear": replace(B, head=Head("linear"), tokens="cls"),
    }


# Accuracy of EP on MAE's backbones (the reference's README); the measured counts: card of EP.
PAPER = Paper(
    title="Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency",
    year=2026,
    link="https://arxiv.org/abs/2506.10178",
    reference="billpsomas/efficient-probing@b8f4fb84e8127d41aaad997d35b98c2f43f33125",
    model=ProbedViT,
    variants=_variants(),
    tiny=Config(width=32, heads=2, depth=1, img_size=32, patch_size=8, classes=10, head=Head(queries=4, d_out=2)),
    published={
        "vit_s_ep": Published(22_210_408, top1=64.6),
        "vit_ti_160_ep_q8_d2": Published(5_529_541),
        **{f"vit_b_{name}": Published(BACKBONE_B + count) for name, count in HEADS.items()},
    },
    keys="MAE's and timm's ViT; head.0 (pooling), head.1 (norm), head.2 (classifier); released EP heads: head alone",
    idle={"norm.weight": "the probe reads the tokens before the final norm", "norm.bias": "as norm.weight"},
)
