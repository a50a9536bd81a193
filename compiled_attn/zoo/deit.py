"""DeiT: "Training data-efficient image transformers & distillation through attention", Touvron et al., ICML 2021.

https://arxiv.org/abs/2012.12877. A plain Vision Transformer trained on ImageNet alone, by strong augmentation; and a
distillation token, a second class token that learns a teacher's answer through attention.

Reference: facebookresearch/deit on timm 0.4.12 (as repeated by youweiliang/evit at 5ca95a7cf4a8).
Known differences: no dropout and no stochastic depth (both are off in the reference at inference); a picture of another
size gets bicubically resized positions, as EViT does it, also when it is not square, where the reference refuses.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compiled_attn.zoo.layers.vit import EPSILON, Block, PatchEmbed, initialise, resize_positions
from compiled_attn.zoo.paper import Paper, Published

torch.fx.wrap("resize_positions")


@dataclass(frozen=True)
class Config:
    """width: C; heads: H, each of width C / H; img_size, patch_size: sides in pixels; distilled: has a second."""

    width: int
    heads: int
    depth: int = 12
    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    classes: int = 1000
    mlp_ratio: int = 4
    distilled: bool = False


class DeiT(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes].

    The distilled form returns the mean of its two heads; in training mode the pair (class head, distillation head).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.prefix = 2 if config.distilled else 1
        self.patch_embed = PatchEmbed(width, config.patch_size, config.in_chans)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width)) if config.distilled else None
        patches = (config.img_size // config.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + patches, width))
        self.blocks = nn.ModuleList(self.block(i) for i in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.head = nn.Linear(width, config.classes)
        self.head_dist = nn.Linear(width, config.classes) if config.distilled else None
        initialise(self)

    def block(self, _index: int) -> nn.Module:
        return Block(self.config.width, self.config.heads, self.config.mlp_ratio * self.config.width)

    def embed(self, pictures: Tensor) -> Tensor:
        """Tokens [B, prefix + patches, C]: class, distillation, then patches in row-major order; all with positions."""
        patches = self.patch_embed(pictures)  # [B, C, y, x]
        first = self.cls_token if self.dist_token is None else torch.cat([self.cls_token, self.dist_token], dim=1)
        tokens = torch.cat([first.expand(pictures.shape[0], -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens + resize_positions(self.pos_embed, self.prefix, patches.shape[2:])

    def classify(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits from the last block's tokens [B, N, C]."""
        tokens = self.norm(tokens)
        logits = self.head(tokens[:, 0])
        if self.head_dist is None:
            return logits
        distilled = self.head_dist(tokens[:, 1])
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


TI = Config(width=192, heads=3)
S = Config(width=384, heads=6)
B = Config(width=768, heads=12)
DIGITS = Config(width=96, heads=3, img_size=48, patch_size=4, in_chans=1, classes=10)

# Images per second on one V100 and the accuracy of the tiny, base and distilled rows: table 5 of the paper and the
# reference's list of checkpoints. The others: card of EViT.
PAPER = Paper(
    title="Training data-efficient image transformers & distillation through attention",
    year=2021,
    link="https://arxiv.org/abs/2012.12877",
    reference="facebookresearch/deit, as in youweiliang/evit@5ca95a7cf4a8637193284895c5bc0dd9dc365982",
    model=DeiT,
    variants={
        "deit_ti": TI,
        "deit_s": S,
        "deit_b": B,
        "deit_b_384": replace(B, img_size=384),
        "deit_ti_distilled": replace(TI, distilled=True),
        "deit_s_distilled": replace(S, distilled=True),
        "deit_b_distilled": replace(B, distilled=True),
        "deit_b_384_distilled": replace(B, img_size=384, distilled=True),
        "digits_tiny": DIGITS,
    },
    tiny=Config(width=32, heads=2, depth=2, img_size=32, patch_size=8, classes=10),
    published={
        "deit_ti": Published(parameters=5_717_416, gmacs=1.258, stated_gmacs=1.3, top1=72.2, images_per_second=2536),
        "deit_s": Published(parameters=22_050_664, gmacs=4.608, stated_gmacs=4.6, top1=79.8, images_per_second=940),
        "deit_b": Published(parameters=86_567_656, gmacs=17.583, stated_gmacs=17.6, top1=81.8, images_per_second=292),
        "deit_b_384": Published(parameters=86_859_496, top1=82.9),
        "deit_ti_distilled": Published(parameters=5_910_800, top1=74.5),
        "deit_s_distilled": Published(parameters=22_436_432, top1=81.2),
        "deit_b_distilled": Published(parameters=87_338_192, top1=83.4),
        "deit_b_384_distilled": Published(parameters=87_630_032, top1=85.2),
    },
    keys="timm 0.4.12's: cls_token, dist_token, pos_embed, patch_embed.proj, blocks.i.{norm1,attn.qkv,attn.proj,norm2,"
    "mlp.fc1,mlp.fc2}, norm, head, head_dist; the reference's files hold them under `model`",
    weights={"digits_tiny": "digits_tiny.safetensors"},
)
