"""SpaRTAN: "Spatial Reinforcement Token-based Aggregation Network for Visual Recognition", Pay et al., IJCNN 2025.

https://arxiv.org/abs/2507.10999. A spatial mixer adds what a small and what a dilated convolution see, each gated per
channel; a channel mixer adds to a gated product that of the pixel's strongest channel, and turns and stretches channel
pairs by learned complex numbers.

Reference: henry-pay/SpaRTAN at 1715a4308cbaac521abafd97c63068158c2716da (src/model/spartan.py).
Known differences: no stochastic depth (off in the reference at inference); the complex product is four real ones, on
neighbouring channels and in the map's own type, where the reference permutes twice and goes through float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.layers.conv import initialise
from compiled_attn.zoo.paper import Paper, Published

EPSILON = 1e-6  # of every norm, batch norms included
SCALE = 1e-5  # what gates and layer scales begin with


@dataclass(frozen=True)
class Config:
    """widths, depths, expansion: channels, blocks and the channel mixer's factor of each stage."""

    widths: tuple[int, ...] = (32, 64, 128, 256)
    depths: tuple[int, ...] = (3, 3, 12, 2)
    expansion: tuple[int, ...] = (4, 4, 2, 2)
    img_size: int = 256
    in_chans: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        if any(width % 8 for width in self.widths) or min(self.expansion) < 2:
            raise CompiledAttnError(
                "the widths or factors do not fit the mixers",
                where="zoo.spartan.Config",
                facts=f"widths are {self.widths}, of which all must be multiples of 8; expansion is {self.expansion}, "
                "of which all must be 2 or more",
                do="give such widths and factors, as (32, 64, 128, 256) and (4, 4, 2, 2)",
            )


class ConvNormAct(nn.Module):
    """A convolution without bias, a batch norm and an activation; `act` None leaves both of the latter away."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        act: Callable[[Tensor], Tensor] | None = F.gelu,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, dilation, groups, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=EPSILON) if act else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.act(self.norm(x))


class SE(nn.Module):
    """Squeeze and excitation: every channel times a sigmoid of what the map's mean says."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, hidden, 1)
        self.expand = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(scale))


class SMixer(nn.Module):
    """Spatial mixer: high and low frequencies by a 3x3 and by two dilated 3x3 convolutions of half the channels."""

    def __init__(self, width: int, dense: bool) -> None:
        super().__init__()
        half = width // 2
        groups = 1 if dense else half
        self.gamma = nn.Parameter(torch.full((1, half, 1, 1), SCALE))
        self.proj_in = nn.Conv2d(width, half, 1)
        self.h_conv = ConvNormAct(half, half, 3, padding=1, groups=groups)
        self.l_conv = nn.Sequential(
            ConvNormAct(half, half, 3, padding=2, dilation=2, groups=groups, act=None),
            ConvNormAct(half, half, 3, padding=2, dilation=2, groups=groups),
        )
        self.h_attn = SE(half, half // 4)
        self.l_attn = SE(half, half // 4)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x)
        x = x + self.gamma * (x - x.mean((2, 3), keepdim=True))
        return self.proj_out(torch.cat([self.h_attn(self.h_conv(x)), self.l_attn(self.l_conv(x))], dim=1))


class CMixer(nn.Module):
    """Channel mixer: wave-like products, those of the pixel's largest channel added to all, then a 3x3 convolution."""

    def __init__(self, width: int, expansion: int, depthwise: bool) -> None:
        super().__init__()
        hidden = width * expansion
        self.theta = nn.Conv2d(width, hidden, 1)
        self.proj = nn.Conv2d(width, hidden, 1)
        self.complex = nn.Parameter(torch.randn(1, 1, 1, hidden // 2, 2))
        self.conv = ConvNormAct(hidden, hidden, 3, padding=1, groups=hidden if depthwise else width)
        self.attn = SE(hidden, width // 4)
        self.proj_out = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        largest = x.argmax(1, keepdim=True)  # [B, 1, Y, X], a channel of the input and so one of the first C of hidden
        theta, weight = F.gelu(self.theta(x)), self.proj(x)
        product = weight * theta + weight.gather(1, largest) * theta.gather(1, largest)
        return self.proj_out(self.attn(self.conv(rotate(product, self.complex))))


class Block(nn.Module):
    """Both mixers, each behind a norm over the whole picture, scaled per channel and added."""

    def __init__(self, width: int, expansion: int, early: bool) -> None:
        super().__init__()
        self.smixer = SMixer(width, dense=early)
        self.cmixer = CMixer(width, expansion, depthwise=early)
        self.norm_1 = nn.GroupNorm(1, width, eps=EPSILON)
        self.norm_2 = nn.GroupNorm(1, width, eps=EPSILON)
        self.scale_1 = nn.Parameter(torch.full((1, width, 1, 1), SCALE))
        self.scale_2 = nn.Parameter(torch.full((1, width, 1, 1), SCALE))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale_1 * self.smixer(self.norm_1(x))
        return x + self.scale_2 * self.cmixer(self.norm_2(x))


class SpaRTAN(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width, last = config.widths[0], len(config.widths) - 1
        layers: list[nn.Module] = []
        for stage, (depth, expansion) in enumerate(zip(config.depths, config.expansion, strict=True)):
            early = stage < len(config.depths) // 2
            layers += [Block(width, expansion, early) for _ in range(depth)]
            if depth and stage < last:  # a stage without blocks is no stage in the reference either
                wider = config.widths[stage + 1]
                layers.append(ConvNormAct(width, wider, 2, stride=2, act=F.silu))
                width = wider
        first = config.widths[0]
        self.conv = nn.Sequential(
            ConvNormAct(config.in_chans, first // 2, 3, stride=2, padding=1),
            ConvNormAct(first // 2, first, 3, stride=2, padding=1),
        )
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(width, config.classes)
        initialise(self, fan_out=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layers(self.conv(x)).mean((2, 3)))


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Channels 2j and 2j + 1 of a map [B, C, Y, X], as a complex number, times by[0, 0, 0, j]: turned and stretched."""
    even, odd = x.unflatten(1, (-1, 2)).unbind(2)  # [B, C / 2, Y, X]
    real, imaginary = by.reshape(-1, 2, 1, 1).unbind(1)  # [C / 2, 1, 1]
    return torch.stack([real * even - imaginary * odd, real * odd + imaginary * even], dim=2).flatten(1, 2)


# Measured on the reference at 256 pixels (card of SpaRTAN); accuracy: abstract of the paper.
PAPER = Paper(
    title="SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition",
    year=2025,
    link="https://arxiv.org/abs/2507.10999",
    reference="henry-pay/SpaRTAN@1715a4308cbaac521abafd97c63068158c2716da",
    model=SpaRTAN,
    variants={"spartan_t": Config()},
    tiny=Config((32, 32, 32), (1, 1, 1), (2, 2, 2), img_size=32, classes=10),
    published={"spartan_t": Published(3_820_296, top1=77.7)},
    keys="conv.{0,1}.{conv,norm}, layers.i of blocks {norm_1,smixer.{gamma,proj_in,h_conv,l_conv.{0,1},h_attn,l_attn,"
    "proj_out},scale_1,norm_2,cmixer.{complex,theta,proj,conv,attn,proj_out},scale_2} and steps {conv,norm}, linear; "
    "the files hold them under `model`",
)
