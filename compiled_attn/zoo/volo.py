"""VOLO: "VOLO: Vision Outlooker for Visual Recognition", Yuan, Hou, Jiang, Feng and Yan, 2021, TPAMI 2022.

https://arxiv.org/abs/2106.13112. Outlook attention lets each place mix the 3x3 pixels around it by weights that one
linear map reads off that place, with no query or key; what overlapping windows give a pixel is summed.

Reference: sail-sg/volo at cf35775276a887ccd749ad82c3ba0ac034020cc9 (models/volo.py).
Known differences: no dropout and no stochastic depth (off at inference); in training mode the forward returns the pair
(class logits, token logits) without mixing tokens of two pictures, which belongs to the recipe.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn import ops
from compiled_attn.zoo.layers import vit
from compiled_attn.zoo.layers.vit import Mlp, initialise
from compiled_attn.zoo.paper import Paper, Published

KERNEL, STRIDE = 3, 2  # of outlook attention: a window around every second pixel, in all of the paper's networks


@dataclass(frozen=True)
class Config:
    """One number a stage in depths, widths, heads and mlp_ratios: outlookers, then transformers at half the size.

    stem: channels of the stem's convolutions; class_blocks: of class attention, 0 for none. return_dense: the logits
    include the strongest token's; return_mean: they are the mean token's, instead of the class token's.
    """

    depths: tuple[int, ...] = (4, 4, 8, 2)
    widths: tuple[int, ...] = (192, 384, 384, 384)
    heads: tuple[int, ...] = (6, 12, 12, 12)
    mlp_ratios: tuple[float, ...] = (3, 3, 3, 3)
    stem: int = 64
    class_blocks: int = 2
    img_size: int = 224
    patch_size: int = 8
    in_chans: int = 3
    classes: int = 1000
    return_dense: bool = True
    return_mean: bool = False


class PatchEmbed(nn.Module):
    """Three convolutions, the first of stride 2, then a linear map of squares: [B, C, Y / patch, X / patch]."""

    def __init__(self, in_chans: int, hidden: int, width: int, patch_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, kernel, stride in ((in_chans, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            conv = nn.Conv2d(channels, hidden, kernel, stride=stride, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(hidden), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, width, kernel_size=patch_size // 2, stride=patch_size // 2)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.proj(self.conv(pictures))


class OutlookAttention(nn.Module):
    """Windows of 3x3 pixels around every second pixel, each remixed by predicted weights and summed (section 3.1)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.v = nn.Linear(width, width, bias=False)
        self.attn = nn.Linear(width, heads * KERNEL**4)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, Y, X, C]; y = ceil(Y / 2), x = ceil(X / 2) windows, the last ones reach beyond odd sizes."""
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), STRIDE, ceil_mode=True).permute(0, 2, 3, 1)
        weights = self.attn(pooled).unflatten(3, (self.heads, KERNEL**2, KERNEL**2))  # [B, y, x, H, 9, 9]
        values = self.v(x).unflatten(3, (self.heads, -1))
        values = F.pad(values, (0, 0, 0, 0, 0, x.shape[2] % STRIDE, 0, x.shape[1] % STRIDE))  # [B, 2 y, 2 x, H, D]
        mixed = ops.neighborhood_apply(
            (weights * self.scale).softmax(5),
            values,
            window=[KERNEL, KERNEL],
            stride=[STRIDE, STRIDE],
            block=[1, 1],
            border="zero",
        )  # [B, y, x, H, 9, D]
        mixed = mixed.unflatten(4, (KERNEL, KERNEL)).permute(4, 5, 0, 1, 2, 3, 6).flatten(5)  # [3, 3, B, y, x, C]
        rows = [sum_overlaps([mixed[i, j] for j in range(KERNEL)], dim=-2) for i in range(KERNEL)]  # [B, y, X, C]
        return self.proj(sum_overlaps(rows, dim=-3)[:, : x.shape[1], : x.shape[2]])


def sum_overlaps(parts: list[Tensor], dim: int) -> Tensor:
    """What windows of three pixels, the middle one at 2 n, give the pixels 0 to 2 N - 1 along `dim`, counted from last.

    parts: what the N windows give their first, middle and last pixel. An even pixel is the middle of one window; an odd
    one is the last of a window and the first of the next.
    """
    first, middle, last = parts
    behind = -dim - 1
    following = F.pad(first[(..., slice(1, None), *[slice(None)] * behind)], (0, 0) * behind + (0, 1))
    return torch.stack([middle, last + following], dim).flatten(dim - 1, dim)


class Attention(vit.Attention):
    """Multi-head self attention of tokens, without biases in front."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.qkv = nn.Linear(width, 3 * width, bias=False)


class ClassAttention(nn.Module):
    """Attention of the class token over all tokens (CaiT, Touvron et al., arXiv 2103.17239)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.q = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C], the class token first, to its update [B, 1, C]."""
        k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        q = self.q(x[:, :1]).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, 1, D]
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block of any attention; with outlook attention, the Outlooker (equations 1 and 2)."""

    def __init__(self, width: int, attn: nn.Module, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ClassBlock(Block):
    """Changes the class token alone."""

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1] + self.attn(self.norm1(x))
        first = first + self.mlp(self.norm2(first))
        return torch.cat([first, x[:, 1:]], dim=1)


class Downsample(nn.Module):
    """A linear map of every 2x2 pixels of a map [B, Y, X, C]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class VOLO(nn.Module):
    """Pictures [B, in_chans, img_size, img_size] to logits [B, classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width, later = config.widths[0], config.widths[-1]
        self.patch_embed = PatchEmbed(config.in_chans, config.stem, width, config.patch_size)
        side = config.img_size // config.patch_size // 2
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, later))
        self.network = nn.ModuleList([self.stage(0, OutlookAttention), Downsample(width, config.widths[1])])
        self.network.extend(self.stage(index, Attention) for index in range(1, len(config.depths)))
        if config.class_blocks:
            hidden = int(later * config.mlp_ratios[-1])
            self.post_network = nn.ModuleList(
                ClassBlock(later, ClassAttention(later, config.heads[-1]), hidden) for _ in range(config.class_blocks)
            )
            self.cls_token = nn.Parameter(torch.zeros(1, 1, later))
        if config.return_dense:
            self.aux_head = nn.Linear(later, config.classes)
        self.norm = nn.LayerNorm(later)
        self.head = nn.Linear(later, config.classes)
        initialise(self)

    def stage(self, index: int, kind: type[nn.Module]) -> nn.Sequential:
        config = self.config
        width, heads, hidden = (
            config.widths[index],
            config.heads[index],
            config.widths[index] * config.mlp_ratios[index],
        )
        return nn.Sequential(*(Block(width, kind(width, heads), int(hidden)) for _ in range(config.depths[index])))

    def features(self, pictures: Tensor) -> Tensor:
        """Normed tokens [B, N, C], the class token first if there is one, then the map's in row-major order."""
        x = self.patch_embed(pictures).permute(0, 2, 3, 1)
        outlookers, downsample, *transformers = self.network
        x = downsample(outlookers(x)) + self.pos_embed
        x = x.flatten(1, 2)
        for blocks in transformers:
            x = blocks(x)
        if self.config.class_blocks:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            for block in self.post_network:
                x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.features(x)
        if self.config.return_mean:
            return self.head(x.mean(1))
        logits = self.head(x[:, 0])
        if not self.config.return_dense:
            return logits
        tokens = self.aux_head(x[:, 1:])
        return (logits, tokens) if self.training else logits + 0.5 * tokens.amax(1)


D1 = Config()
D2 = Config((6, 4, 10, 4), (256, 512, 512, 512), (8, 16, 16, 16))
D3 = replace(D2, depths=(8, 8, 16, 4))
D4 = Config((8, 8, 16, 4), (384, 768, 768, 768), (12, 16, 16, 16))
D5 = replace(D4, depths=(12, 12, 20, 4), mlp_ratios=(4, 4, 4, 4), stem=128)
SIZES = {"volo_d1": (D1, (384,)), "volo_d2": (D2, (384,)), "volo_d3": (D3, (448,)), "volo_d4": (D4, (448,)),
         "volo_d5": (D5, (448, 512))}  # fmt: skip


def _variants() -> dict[str, Config]:
    rows = {name: row for name, (row, _) in SIZES.items()}
    larger = {f"{name}_{size}": replace(row, img_size=size) for name, (row, sizes) in SIZES.items() for size in sizes}
    return rows | larger


# Accuracy: the reference's list of checkpoints; parameters and multiply-accumulates: measured on its code.
PAPER = Paper(
    title="VOLO: Vision Outlooker for Visual Recognition",
    year=2021,
    link="https://arxiv.org/abs/2106.13112",
    reference="sail-sg/volo@cf35775276a887ccd749ad82c3ba0ac034020cc9",
    model=VOLO,
    variants=_variants(),
    tiny=Config((1, 1), (16, 32), (2, 4), (2, 2), stem=8, class_blocks=1, img_size=80, classes=10),
    published={
        "volo_d1": Published(parameters=26_632_040, gmacs=6.94, top1=84.2),
        "volo_d2": Published(parameters=58_678_336, top1=85.2),
        "volo_d3": Published(parameters=86_325_072, gmacs=20.8, top1=85.4),
        "volo_d4": Published(parameters=192_961_520, top1=85.7),
        "volo_d5": Published(parameters=295_455_584, top1=86.1),
    },
    keys="the reference's: patch_embed.{conv,proj}, pos_embed, network.0.i the outlookers with attn.{v,attn,proj}, "
    "network.1 the downsampling, network.{2,3,4}.i transformers, post_network.i with attn.{q,kv,proj}, norm, head, "
    "aux_head",
)
