"""DHVT: "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets".

Lu et al., NeurIPS 2022, https://arxiv.org/abs/2210.05958. A vision transformer for little data: patches come from a
stack of convolutions, the MLP is a depthwise convolution among pointwise ones that also reweighs the class token, and
every block makes one token of each head's mean, lets it attend and be attended to, and gives it to the class token.

Reference: ArieSeirack/DHVT at a86fedab5a5848d2e64c0bccb41096258106883b (vision_transformer.py).
Known differences: no dropout and no stochastic depth (both are off in the reference at inference); batch norms are not
synchronised between devices. As there, tokens are laid out in a square whatever the picture's shape.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.layers.conv import conv_norm, depthwise, to_square
from compiled_attn.zoo.layers.vit import EPSILON, Attention, initialise
from compiled_attn.zoo.paper import Paper, Published

STEMS = {16: (8, 4, 2, 1), 4: (2, 1), 2: (1,)}  # by patch size, what the width is divided by in each convolution

torch.fx.wrap("to_square")


@dataclass(frozen=True)
class Config:
    """width: C; heads: H, each of width C / H; img_size, patch_size: in pixels, the latter 2, 4 or 16."""

    width: int
    heads: int
    depth: int = 12
    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    classes: int = 1000
    mlp_ratio: float = 4

    def __post_init__(self) -> None:
        if self.patch_size not in STEMS:
            raise CompiledAttnError(
                "no stack of convolutions makes such patches",
                where="zoo.dhvt.Config",
                facts=f"patch_size is {self.patch_size}, the paper has 2, 4 and 16",
                do="give one of these",
            )


class Affine(nn.Module):
    """Every channel times a weight, plus a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, width, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.beta


class SOPE(nn.Module):
    """Sequential overlapping patch embedding (section 3.2): pictures to tokens [B, N, C]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths = [config.in_chans, *(config.width // part for part in STEMS[config.patch_size])]
        steps: list[nn.Module] = []
        for before, width in pairwise(widths):
            steps += [conv_norm(before, width), nn.GELU()]
        if config.patch_size != 2:
            steps.pop()  # only the shortest stack ends with an activation
        self.pre_affine = Affine(config.in_chans)
        self.proj = nn.Sequential(*steps)
        self.post_affine = Affine(config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.post_affine(self.proj(self.pre_affine(x))).flatten(2).transpose(1, 2)


class HeadInteractedAttention(Attention):
    """HI-MHSA (section 3.4): attention among the tokens and one token of each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.ht_proj = nn.Linear(width // heads, width)
        self.ht_norm = nn.LayerNorm(width // heads)
        self.pos_embed = nn.Parameter(torch.zeros(1, heads, width))

    def head_tokens(self, x: Tensor) -> Tensor:
        """One token [B, H, C] of every head: from the mean over tokens [B, N, C] of its part of the channels."""
        part = (self.heads, -1)
        tokens = self.ht_proj(x.mean(1).unflatten(1, part)).unflatten(2, part)  # [B, H, H, D]
        return F.gelu(self.ht_norm(tokens)).flatten(2) + self.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(torch.cat([x, self.head_tokens(x)], dim=1))
        heads = out[:, -self.heads :].mean(1, keepdim=True)
        return torch.cat([out[:, :1] + heads, out[:, 1 : -self.heads]], dim=1)


class DAFF(nn.Module):
    """Dynamic aggregation feed-forward (section 3.3) of tokens [B, 1 + n * n, C]; the class token is only weighed."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = depthwise(hidden, 3)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, width, 1)
        self.bn3 = nn.BatchNorm2d(width)
        self.compress = nn.Linear(width, width // 4)
        self.excitation = nn.Linear(width // 4, width)

    def forward(self, x: Tensor) -> Tensor:
        cls, patches = x[:, :1], to_square(x[:, 1:])
        patches = F.gelu(self.bn1(self.conv1(patches)))
        patches = patches + F.gelu(self.bn2(self.conv2(patches)))
        patches = self.bn3(self.conv3(patches)).flatten(2).transpose(1, 2)
        weight = self.excitation(F.gelu(self.compress(patches.mean(1, keepdim=True))))
        return torch.cat([cls * weight, patches], dim=1)


class Block(nn.Module):
    """Pre-norm block of HI-MHSA and DAFF, each with its residual."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = HeadInteractedAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = DAFF(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DHVT(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes]; the count of patches must be a square."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.config = config
        self.patch_embed = SOPE(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, config.heads, hidden) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.head = nn.Linear(width, config.classes) if config.classes else nn.Identity()
        initialise(self)

    def tokens(self, x: Tensor) -> Tensor:
        """Normed tokens [B, 1 + N, C] of the last block, the class token first."""
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        return self.norm(self.blocks(torch.cat([cls, self.patch_embed(x)], dim=1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x)[:, 0])


TINY_CIFAR = Config(192, 4, img_size=32, patch_size=4, classes=100)
SMALL_CIFAR = Config(384, 8, img_size=32, patch_size=4, classes=100)

# Parameters and multiply-accumulates as measured on the reference (card of DHVT), accuracy: CIFAR-100 and ImageNet-1k,
# tables 2 and 4 of the paper.
PAPER = Paper(
    title="Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets",
    year=2022,
    link="https://arxiv.org/abs/2210.05958",
    reference="ArieSeirack/DHVT@a86fedab5a5848d2e64c0bccb41096258106883b",
    model=DHVT,
    variants={
        "dhvt_tiny_cifar_patch4": TINY_CIFAR,
        "dhvt_small_cifar_patch4": SMALL_CIFAR,
        "dhvt_tiny_cifar_patch2": replace(TINY_CIFAR, patch_size=2),
        "dhvt_small_cifar_patch2": replace(SMALL_CIFAR, patch_size=2),
        "dhvt_tiny_domain_patch16": Config(192, 4, classes=345),
        "dhvt_tiny_imagenet_patch16": Config(192, 3),
        "dhvt_small_imagenet_patch16": Config(384, 6),
    },
    tiny=Config(16, 2, depth=2, img_size=16, patch_size=4, classes=10, mlp_ratio=2),
    published={
        "dhvt_tiny_cifar_patch4": Published(6_008_650, stated_gmacs=0.4, top1=80.93),
        "dhvt_small_cifar_patch4": Published(23_425_450, stated_gmacs=1.5, top1=82.91),
        "dhvt_tiny_cifar_patch2": Published(5_845_162, stated_gmacs=1.7, top1=83.54),
        "dhvt_small_cifar_patch2": Published(22_766_698, stated_gmacs=6.2, top1=85.68),
        "dhvt_tiny_domain_patch16": Published(6_105_975, stated_gmacs=1.4),
        "dhvt_tiny_imagenet_patch16": Published(6_267_334, stated_gmacs=1.4, top1=77.6),
        "dhvt_small_imagenet_patch16": Published(24_040_606, stated_gmacs=5.1, top1=82.3),
    },
    keys="cls_token, patch_embed.{proj.i.{0,1},pre_affine,post_affine}, blocks.i.{norm1,attn.{pos_embed,qkv,proj,"
    "ht_proj,ht_norm},norm2,mlp.{conv1,conv2,conv3,bn1,bn2,bn3,compress,excitation}}, norm, head",
)
