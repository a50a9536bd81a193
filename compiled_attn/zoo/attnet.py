"""AttNet: "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency".

Yu et al., 2025, https://arxiv.org/abs/2510.20092. ATConv: every channel of every picture is convolved with a small
kernel of its own, made from that channel's means over a few bands of the picture; a share of the kernel's mean is
subtracted, so that its taps compete as softmax makes scores compete.

Reference: price112/Attentive-Convolution at f4f5a3978789bcadb3d08068d2a50939ec77de16 (models/AttNet.py).
Known differences: no stochastic depth (off in the reference at inference). Two steps are computed otherwise, with the
same result: bands are averaged before the pointwise map that makes kernels and not behind it (both are linear, and the
averages' weights sum to one), which spares a product at full resolution; and kernels act as shifted multiply-adds, not
as a convolution of batch x channels groups, which a symbolic batch could not have.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.zoo.layers.conv import LayerNorm2d, conv_norm, depthwise, initialise
from compiled_attn.zoo.paper import Paper, Published


@dataclass(frozen=True)
class Config:
    """widths, depths, expansion, kernels: channels, blocks, the GLU's factor and the side of ATConv's kernel by stage.

    glu_conv, glu_norm: by stage, whether the GLU has its depthwise convolution and its norm; layer_scale: whether
    blocks scale their branches; bias: whether ATConv's linear maps have one.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    expansion: tuple[float, ...] = (8, 8, 4, 4)
    kernels: tuple[int, ...] = (3, 3, 3, 3)
    glu_conv: tuple[bool, ...] = (True,) * 4
    glu_norm: tuple[bool, ...] = (True,) * 4
    layer_scale: bool = True
    bias: bool = True
    img_size: int = 224
    in_chans: int = 3
    classes: int = 1000


class RmsNorm2d(nn.Module):
    """Every pixel over the root mean square of its channels, times a weight per channel."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps) * self.weight[:, None, None]


class LayerScale(nn.Module):
    """Every channel times a weight that begins small."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None]


class GLU(nn.Module):
    """Gated linear unit: the first half of the channels, convolved and through GELU (erf), times the second half."""

    def __init__(self, width: int, hidden: int, conv: bool, norm: bool) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, 2 * hidden, 1)
        self.dwconv = depthwise(hidden, 3) if conv else nn.Identity()
        self.norm_layer = RmsNorm2d(hidden) if norm else nn.Identity()
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, value = self.fc1(x).chunk(2, dim=1)
        return self.fc2(self.norm_layer(F.gelu(self.dwconv(x)) * value))


class ATConv(nn.Module):
    """Attentive convolution: kernels routed from the picture, with lateral inhibition among their taps."""

    def __init__(self, width: int, kernel: int, bias: bool) -> None:
        super().__init__()
        taps = kernel * kernel
        self.kernel = kernel
        self.kernel_proj = nn.Conv2d(width, width, 1, bias=bias)
        self.kernel_gen = nn.Linear(taps, taps, bias=bias)
        self.x_proj = nn.Conv2d(width, width, 1, bias=bias)
        self.proj = nn.Conv2d(width, width, 1, bias=bias)
        self.difference_control = nn.Parameter(torch.zeros(width))

    def kernels_of(self, x: Tensor) -> Tensor:
        """The kernels [B, C, K, K] of a map [B, C, Y, X]: its mean over K^2 bands of consecutive row-major pixels."""
        bands = F.adaptive_avg_pool1d(x.flatten(2), self.kernel * self.kernel)  # [B, C, K^2]
        bands = F.gelu(self.kernel_proj(bands.unsqueeze(3)).squeeze(3))
        kernels = self.kernel_gen(bands)
        inhibited = torch.sigmoid(self.difference_control)[:, None] * kernels.mean(2, keepdim=True)
        return (kernels - inhibited).unflatten(2, (self.kernel, self.kernel))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(convolve_each(self.x_proj(x), self.kernels_of(x), self.kernel))


class Block(nn.Module):
    """ATConv and GLU, each behind a norm over channels, scaled and added."""

    def __init__(self, config: Config, stage: int) -> None:
        super().__init__()
        width = config.widths[stage]
        hidden = int(2 * int(width * config.expansion[stage]) / 3)
        self.token_mixer = ATConv(width, config.kernels[stage], config.bias)
        self.channel_mixer = GLU(width, hidden, config.glu_conv[stage], config.glu_norm[stage])
        self.layer_scale_1 = LayerScale(width) if config.layer_scale else nn.Identity()
        self.layer_scale_2 = LayerScale(width) if config.layer_scale else nn.Identity()
        self.norm_1 = LayerNorm2d(width)
        self.norm_2 = LayerNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1(self.token_mixer(self.norm_1(x)))
        return x + self.layer_scale_2(self.channel_mixer(self.norm_2(x)))


class AttNet(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes]; no positions anywhere."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        stem = nn.Sequential(
            conv_norm(config.in_chans, widths[0] // 2), nn.GELU(), conv_norm(widths[0] // 2, widths[0])
        )
        steps = (conv_norm(before, width) for before, width in pairwise(widths))
        self.downsample_layers = nn.ModuleList([stem, *steps])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(config, stage) for _ in range(depth))) for stage, depth in enumerate(config.depths)
        )
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], config.classes)
        initialise(self, fan_out=False)

    def features(self, x: Tensor) -> list[Tensor]:
        """The map [B, width, y, x] that each stage ends with."""
        maps = []
        for step, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(step(x))
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x)[-1].mean((2, 3))))


def convolve_each(x: Tensor, kernels: Tensor, side: int) -> Tensor:
    """Every channel of a map [B, C, Y, X] correlated with its own of kernels [B, C, K, K], zeros outside the map."""
    _, _, height, width = x.shape
    padded = F.pad(x, (side // 2,) * 4)
    out = 0
    for i in range(side):
        for j in range(side):
            out = out + kernels[:, :, i, j, None, None] * padded[:, :, i : i + height, j : j + width]
    return out


# Parameters as measured on the reference (card of AttNet), which gives multiply-accumulates with the product that is
# spared here; accuracy: abstract of the paper.
PAPER = Paper(
    title="Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency",
    year=2025,
    link="https://arxiv.org/abs/2510.20092",
    reference="price112/Attentive-Convolution@f4f5a3978789bcadb3d08068d2a50939ec77de16",
    model=AttNet,
    variants={
        "attnet_xxs": Config((32, 64, 128, 240), (2, 2, 4, 2), glu_norm=(False,) * 4, layer_scale=False),
        "attnet_xs": Config((40, 80, 160, 320), (2, 2, 7, 2), glu_norm=(False,) * 4),
        "attnet_s": Config((40, 80, 160, 320), (2, 3, 10, 3), glu_norm=(False,) * 4, layer_scale=False),
        "attnet_t1": Config((48, 96, 224, 384), (2, 3, 12, 3)),
        "attnet_t2": Config((64, 128, 288, 512), (3, 3, 16, 3)),
        "attnet_t3": Config((72, 144, 320, 576), (4, 4, 26, 4)),
        "attnet_t4": Config((96, 192, 384, 768), (5, 5, 28, 5)),
    },
    tiny=Config((16, 24), (1, 1), (2, 2), (3, 3), (True, True), (True, False), img_size=32, classes=10),
    published={
        "attnet_xxs": Published(2_853_556),
        "attnet_xs": Published(5_554_902),
        "attnet_s": Published(7_681_316),
        "attnet_t1": Published(13_714_900),
        "attnet_t2": Published(27_010_782, top1=84.4),
        "attnet_t3": Published(49_175_682),
        "attnet_t4": Published(87_320_214),
    },
    keys="downsample_layers.0.{0,2}.{0,1}, downsample_layers.s.{0,1}, stages.s.i.{norm_1,token_mixer.{kernel_proj,"
    "kernel_gen,x_proj,proj,difference_control},layer_scale_1.gamma,norm_2,channel_mixer.{fc1,dwconv,norm_layer,fc2},"
    "layer_scale_2.gamma}, norm, head; the files hold them under `model`",
)
