"""DaViT: "DaViT: Dual Attention Vision Transformers", Ding et al., ECCV 2022.

https://arxiv.org/abs/2204.03645. Blocks of window attention, which sees all channels of a few pixels, take turns with
blocks of channel attention, which sees all pixels of a few channels: both are linear in the picture's size.

Reference: dingmyu/davit at fc79470d99babab23e45e0087790fa23cfd10a02 (timm/models/davit.py).
Known differences: no stochastic depth (off at inference).
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ops import local_attention
from compiled_attn.zoo.layers.vit import Attention, Mlp, initialise
from compiled_attn.zoo.paper import Paper, Published


@dataclass(frozen=True)
class Config:
    """One number a stage in widths, heads and depths; kinds: the attention of a layer's blocks, in order.

    overlapped: the later patch embeddings have 3x3 kernels instead of 2x2.
    """

    widths: tuple[int, ...] = (96, 192, 384, 768)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    depths: tuple[int, ...] = (1, 1, 3, 1)
    window: int = 7
    mlp_ratio: float = 4
    img_size: int = 224
    in_chans: int = 3
    classes: int = 1000
    overlapped: bool = False
    kinds: tuple[str, ...] = ("spatial", "channel")


class PatchEmbed(nn.Module):
    """Picture or map [B, Y, X, channels] to a map [B, Y / stride, X / stride, C]; sizes are rounded up by zeros.

    The first (stride 4) is normed behind its convolution, the others in front of it.
    """

    def __init__(self, channels: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        padding = kernel // 2 if kernel > stride else 0
        self.proj = nn.Conv2d(channels, width, kernel_size=kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(width if stride == 4 else channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != 4:
            x = self.norm(x)
        x = F.pad(x, (0, 0, 0, -x.shape[2] % self.stride, 0, -x.shape[1] % self.stride))
        x = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(x) if self.stride == 4 else x


class ConvPosition(nn.Module):
    """The map and its depthwise 3x3 convolution: where a pixel stands, from its neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class WindowAttention(Attention):
    """Attention within windows of `window` x `window` pixels (section 3.2), without shift, bias or mask.

    Zeros fill the last windows; they stand as keys with the bias of qkv.
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__(width, heads)
        self.window = [window, window]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        x = F.pad(x, (0, 0, 0, -width % self.window[1], 0, -height % self.window[0]))
        q, k, v = self.qkv(x).unflatten(3, (3, self.heads, -1)).unbind(3)  # [B, Y, X, H, D]
        out = local_attention(q, k, v, window=self.window, stride=self.window, scale=self.scale)
        return self.proj(out.flatten(3))[:, :height, :width]


class ChannelAttention(Attention):
    """Attention among the channels of a group, over all pixels (section 3.3): softmax(k^T v / sqrt(D)) q^T."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x.flatten(1, 2))  # [B, H, Y X, D]
        among = ((k * self.scale).transpose(2, 3) @ v).softmax(3)  # [B, H, D, D]
        out = among @ q.transpose(2, 3)  # [B, H, D, Y X]
        return self.proj(out.flatten(1, 2).transpose(1, 2).unflatten(1, (x.shape[1], x.shape[2])))


class Block(nn.Module):
    """Attention and MLP, a convolutional position in front of each (figure 3)."""

    def __init__(self, width: int, attn: nn.Module, hidden: int) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([ConvPosition(width), ConvPosition(width)])
        self.norm1 = nn.LayerNorm(width)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe[0](x)
        x = x + self.attn(self.norm1(x))
        x = self.cpe[1](x)
        return x + self.mlp(self.norm2(x))


class DaViT(nn.Module):
    """Pictures [B, in_chans, Y, X] of any size to logits [B, classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths, later = config.widths, 3 if config.overlapped else 2
        self.patch_embeds = nn.ModuleList([PatchEmbed(config.in_chans, widths[0], kernel=7, stride=4)])
        self.patch_embeds.extend(PatchEmbed(a, b, later, stride=2) for a, b in pairwise(widths))
        self.main_blocks = nn.ModuleList(
            nn.ModuleList(nn.Sequential(*(self.block(stage, kind) for kind in config.kinds)) for _ in range(depth))
            for stage, depth in enumerate(config.depths)
        )
        self.norms = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], config.classes)
        initialise(self)

    def block(self, stage: int, kind: str) -> Block:
        width, heads = self.config.widths[stage], self.config.heads[stage]
        windows = kind == "spatial"
        attn = WindowAttention(width, heads, self.config.window) if windows else ChannelAttention(width, heads)
        return Block(width, attn, int(width * self.config.mlp_ratio))

    def features(self, x: Tensor) -> Tensor:
        """The last stage's map [B, ceil(Y / 32), ceil(X / 32), C]."""
        x = x.permute(0, 2, 3, 1)
        for embed, layers in zip(self.patch_embeds, self.main_blocks, strict=True):
            x = embed(x)
            for layer in layers:
                x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norms(self.features(x).mean((1, 2))))


TINY = Config()
SMALL = replace(TINY, depths=(1, 1, 9, 1))
BASE = replace(SMALL, widths=(128, 256, 512, 1024), heads=(4, 8, 16, 32))
LARGE = replace(SMALL, widths=(192, 384, 768, 1536), heads=(6, 12, 24, 48), window=12, img_size=384)

# Table 1 of the paper; parameters and multiply-accumulates as measured on the reference's code.
PAPER = Paper(
    title="DaViT: Dual Attention Vision Transformers",
    year=2022,
    link="https://arxiv.org/abs/2204.03645",
    reference="dingmyu/davit@fc79470d99babab23e45e0087790fa23cfd10a02",
    model=DaViT,
    variants={"davit_tiny": TINY, "davit_small": SMALL, "davit_base": BASE, "davit_large_window12_384": LARGE},
    tiny=Config((16, 32), (2, 4), (1, 1), window=3, mlp_ratio=2, img_size=40, classes=10),
    published={
        "davit_tiny": Published(parameters=28_360_168, gmacs=4.54, top1=82.8),
        "davit_small": Published(parameters=49_745_896, gmacs=8.80, top1=84.2),
        "davit_base": Published(parameters=87_954_408, gmacs=15.51, top1=84.6),
        "davit_large_window12_384": Published(parameters=196_811_752, stated_gmacs=103.0, top1=87.5),
    },
    keys="the reference's: patch_embeds.s.{proj,norm}, main_blocks.s.layer.block.{cpe.0.proj,cpe.1.proj,norm1,attn.qkv,"
    "attn.proj,norm2,mlp.fc1,mlp.fc2} with block 0 over windows and 1 over channels, norms, head",
)
