"""OverLoCK: "An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", Lou & Yu, CVPR 2025.

https://arxiv.org/abs/2502.20087. An overview net makes a coarse context map that guides a focus net; in the focus net,
ContMix mixes every pixel's neighbourhood with weights made from its affinity to 7x7 regions of the context.

Reference: LMMMEng/OverLoCK at 2c8ab3b29e3a11fb4a2510d98e4d9ed8b33cf091 (models/overlock.py).
Known differences: no stochastic depth (off in the reference at inference). The map from 49 affinities to a window's
weights is applied to the regions' keys, once a picture, and not to every pixel's affinities: both are linear.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn import ops
from compiled_attn.zoo.layers.conv import LayerNorm2d, conv_norm, depthwise, initialise
from compiled_attn.zoo.layers.reparam import DilatedReparam
from compiled_attn.zoo.paper import Paper, Published

REGIONS = 7  # a side of the context's regions, whatever the picture's size

torch.fx.wrap("enlarge")
torch.fx.wrap("shrink")
torch.fx.wrap("position_bias")
torch.fx.wrap("mix_neighborhoods")


@dataclass(frozen=True)
class Config:
    """widths, depths, kernels, mlp_ratio: channels, blocks, large kernel and expansion of the base and overview stages.

    focus_depths, focus_heads, focus_mlp_ratio: of the two focus stages, which share widths and kernels of the last two;
    each branch of ContMix has 2 x heads. small_kernel: of ContMix's other branch. layer_scale: by stage, what the
    residual's scale begins with, None for none; scale_residual: it stands there and not on the branch.
    projection: channels before the classifier; aux: a second classifier on the overview, for training; deploy: large
    kernels are one convolution each, as `OverLoCK.reparameterised` makes them.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    focus_depths: tuple[int, int]
    focus_heads: tuple[int, int]
    kernels: tuple[int, ...] = (17, 15, 13, 7)
    small_kernel: int = 5
    mlp_ratio: tuple[float, ...] = (4, 4, 4, 4)
    focus_mlp_ratio: tuple[float, float] = (3, 3)
    layer_scale: tuple[float | None, ...] = (None, None, 1, 1)
    scale_residual: bool = True
    projection: int = 1024
    aux: bool = True
    deploy: bool = False
    img_size: int = 224
    in_chans: int = 3
    classes: int = 1000


class ResDWConv(nn.Conv2d):
    """A map and its depthwise 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class LayerScale(nn.Module):
    """Every channel times a weight, plus a bias."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width, 1, 1, 1), float(value)))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, 0] + self.bias[:, None, None]


def layer_scale(width: int, value: float | None) -> nn.Module:
    return nn.Identity() if value is None else LayerScale(width, value)


class GRN(nn.Module):
    """Global response normalization (ConvNeXt V2, arXiv 2301.00808): channels compete by their norms over the map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return (self.gamma * (norm / (norm.mean(1, keepdim=True) + 1e-6)) + 1) * x + self.beta


class SE(nn.Module):
    """Squeeze and excitation: every channel times a sigmoid of what the map's mean says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(16, width // 8)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.proj(x)


class RepConvBlock(nn.Module):
    """Basic block of the base and overview nets: 3x3, large kernel, SE and a convolutional MLP (figure 4a)."""

    def __init__(self, config: Config, stage: int) -> None:
        super().__init__()
        width = config.widths[stage]
        hidden = int(width * config.mlp_ratio[stage])
        self.scale_residual = config.scale_residual
        self.dwconv = ResDWConv(width)
        self.proj = nn.Sequential(
            LayerNorm2d(width),
            DilatedReparam(width, config.kernels[stage], config.deploy),
            nn.BatchNorm2d(width),
            SE(width),
            nn.Conv2d(width, hidden, 1),
            nn.GELU(),
            ResDWConv(hidden),
            GRN(hidden),
            nn.Conv2d(hidden, width, 1),
        )
        self.ls = layer_scale(width, config.layer_scale[stage])

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        return self.ls(x) + self.proj(x) if self.scale_residual else x + self.ls(self.proj(x))


class ContextBlock(nn.Module):
    """Dynamic block of the focus net (figure 4b): ContMix on map and context, a gate, a large kernel, an MLP."""

    def __init__(self, config: Config, focus: int, first: bool) -> None:
        super().__init__()
        stage = len(config.widths) - 2 + focus
        width, context, kernel = config.widths[stage], config.widths[-1] // 4, config.kernels[stage]
        both, hidden = width + context, int(width * config.focus_mlp_ratio[focus])
        self.parts = (width, context)
        self.kernels = (config.small_kernel, kernel)
        self.heads = 2 * config.focus_heads[focus]
        self.scale = (width // self.heads) ** -0.5
        self.scale_residual = config.scale_residual
        self.x_scale = None if first else LayerScale(context, 1)
        self.h_scale = None if first else LayerScale(context, 1)
        self.dwconv1 = ResDWConv(both)
        self.norm1 = LayerNorm2d(both)
        self.fusion = nn.Sequential(
            depthwise(both, 3), nn.BatchNorm2d(both), nn.GELU(), nn.Conv2d(both, width, 1), GRN(width)
        )
        self.weight_query = nn.Sequential(nn.Conv2d(width, width // 2, 1, bias=False), nn.BatchNorm2d(width // 2))
        self.weight_key = nn.Sequential(
            nn.AdaptiveAvgPool2d(REGIONS),
            nn.Conv2d(context, width // 2, 1, bias=False),
            nn.BatchNorm2d(width // 2),
        )
        self.weight_proj = nn.Conv2d(REGIONS**2, sum(k * k for k in self.kernels), 1)
        self.dyconv_proj = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.lepe = nn.Sequential(DilatedReparam(width, kernel, config.deploy), nn.BatchNorm2d(width))
        self.se_layer = SE(width)
        self.gate = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, both, 1))
        self.dwconv2 = ResDWConv(both)
        self.norm2 = LayerNorm2d(both)
        self.mlp = nn.Sequential(
            nn.Conv2d(both, hidden, 1), nn.GELU(), ResDWConv(hidden), GRN(hidden), nn.Conv2d(hidden, both, 1)
        )
        self.ls1 = layer_scale(both, config.layer_scale[stage])
        self.ls2 = layer_scale(both, config.layer_scale[stage])
        self.rpb1, self.rpb2 = (nn.Parameter(torch.zeros(self.heads, 2 * k - 1, 2 * k - 1)) for k in self.kernels)

    def forward(self, x: Tensor, context: Tensor, first_context: Tensor) -> Tensor:
        """A map [B, C, Y, X] and two contexts [B, c, Y, X] to the next map and context, [B, C + c, Y, X]."""
        if self.x_scale is not None:
            context = self.x_scale(context) + self.h_scale(first_context)
        both = self.dwconv1(torch.cat([x, context], dim=1))
        normed = self.norm1(both)
        fused = self.fusion(normed)
        mixed = self.dyconv_proj(self.contmix(fused, normed)) + self.lepe(fused)
        both = self.add(self.ls1, both, self.proj(self.gate(fused) * self.se_layer(mixed)))
        both = self.dwconv2(both)
        return self.add(self.ls2, both, self.mlp(self.norm2(both)))

    def add(self, scale: nn.Module, residual: Tensor, branch: Tensor) -> Tensor:
        return scale(residual) + branch if self.scale_residual else residual + scale(branch)

    def contmix(self, fused: Tensor, normed: Tensor) -> Tensor:
        """Context-mixing dynamic convolution (section 3.3) of fused [B, C, Y, X] by normed [B, C + c, Y, X]."""
        height, width = fused.shape[2], fused.shape[3]
        fused, normed = enlarge(fused, self.kernels[1]), enlarge(normed, self.kernels[1])
        map_part, context_part = normed.split(self.parts, 1)
        query = (self.weight_query(map_part) * self.scale).unflatten(1, (self.heads, -1))  # [B, H, D, Y, X]
        key = self.weight_key(context_part).flatten(2).unflatten(1, (self.heads, -1))  # [B, H, D, 49]
        # weight_proj(key^T query) = (weight_proj key^T) query: what meets the pixels has K^2 rows and no 49 in between
        window_key = self.weight_proj.weight[:, :, 0, 0] @ key.transpose(2, 3)  # [B, H, k^2 + K^2, D]
        logits = window_key @ query.flatten(3) + self.weight_proj.bias[:, None]  # [B, H, k^2 + K^2, Y * X]
        small_logits, large_logits = logits.split([k * k for k in self.kernels], 2)
        small_values, large_values = fused.unflatten(1, (2, self.heads, -1)).unbind(1)  # each [B, H, C / 2H, Y, X]
        mixed = [
            mix_neighborhoods(small_logits, self.rpb1, small_values, self.kernels[0]),
            mix_neighborhoods(large_logits, self.rpb2, large_values, self.kernels[1]),
        ]
        return shrink(torch.cat(mixed, dim=1).flatten(1, 2), height, width)


class ContextStep(nn.Module):
    """The step between the focus stages, of map and context alike."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.x_proj = conv_norm(width, wider)
        self.h_proj = conv_norm(wider // 4, wider // 4)


class OverLoCK(nn.Module):
    """Pictures [B, in_chans, Y, X] to logits [B, classes]; in training mode with `aux` to {"main": ..., "aux": ...}."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        first, second, third, last = config.widths
        half = first // 2
        self.patch_embed1 = nn.Sequential(
            *conv_norm(config.in_chans, half), nn.GELU(), *conv_norm(half, half, stride=1), nn.GELU(),
            *conv_norm(half, first), nn.GELU(), *conv_norm(first, first, stride=1),
        )  # fmt: skip
        self.patch_embed2 = conv_norm(first, second)
        self.patch_embed3 = conv_norm(second, third)
        self.patch_embed4 = conv_norm(third, last)
        self.high_level_proj = nn.Conv2d(last, last // 4, 1)
        self.patch_embedx = ContextStep(third, last)
        self.blocks1, self.blocks2, self.blocks3, self.blocks4 = (
            nn.Sequential(*(RepConvBlock(config, stage) for _ in range(depth)))
            for stage, depth in enumerate(config.depths)
        )
        self.sub_blocks3, self.sub_blocks4 = (
            nn.ModuleList(ContextBlock(config, focus, first=focus == i == 0) for i in range(depth))
            for focus, depth in enumerate(config.focus_depths)
        )
        self.aux_head = classifier([nn.BatchNorm2d(last)], last, config.classes) if config.aux else None
        stem = [nn.Conv2d(last + last // 4, config.projection, 1, bias=False), nn.BatchNorm2d(config.projection)]
        self.head = classifier([*stem, nn.SiLU()], config.projection, config.classes)
        initialise(self, fan_out=False)

    def overview(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The base net's map, 1/16 of the picture, and the overview net's, 1/32."""
        x = self.blocks2(self.patch_embed2(self.blocks1(self.patch_embed1(x))))
        x = self.blocks3(self.patch_embed3(x))
        return x, self.blocks4(self.patch_embed4(x))

    def focus(self, x: Tensor, overview: Tensor) -> Tensor:
        """The focus net's map and context in one, 1/32 of the picture."""
        small = self.high_level_proj(overview)
        context = large = F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)
        for block in self.sub_blocks3:
            x, context = block(x, context, large).split(block.parts, 1)
        x, context = self.patch_embedx.x_proj(x), self.patch_embedx.h_proj(context)
        both = torch.cat([x, context], dim=1)
        for block in self.sub_blocks4:
            x, context = both.split(block.parts, 1)
            both = block(x, context, small)
        return both

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        x, overview = self.overview(x)
        logits = self.head(self.focus(x, overview)).flatten(1)
        if self.training and self.aux_head is not None:
            return {"main": logits, "aux": self.aux_head(overview).flatten(1)}
        return logits

    def reparameterised(self) -> "OverLoCK":
        """The same function at inference with every large kernel and its dilated branches as one convolution."""
        merged = OverLoCK(replace(self.config, deploy=True)).to(self.high_level_proj.weight).eval()
        state = self.state_dict()
        for name, module in self.named_modules():
            if isinstance(module, DilatedReparam):
                state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
                state[f"{name}.lk_origin.weight"], state[f"{name}.lk_origin.bias"] = module.merged()
        merged.load_state_dict(state)
        return merged


def classifier(before: list[nn.Module], width: int, classes: int) -> nn.Sequential:
    last = nn.Conv2d(width, classes, 1) if classes else nn.Identity()
    return nn.Sequential(*before, nn.AdaptiveAvgPool2d(1), last)


def enlarge(x: Tensor, kernel: int) -> Tensor:
    """A map whose shorter side is less than the kernel, bilinearly so large that it is not."""
    height, width = x.shape[2:]
    if min(height, width) >= kernel:
        return x
    size = (kernel, int(kernel / height * width)) if height < width else (int(kernel / width * height), kernel)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def shrink(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `enlarge`, by averages."""
    return x if x.shape[2:] == (height, width) else F.adaptive_avg_pool2d(x, (height, width))


def neighbors(size: int, kernel: int, device: torch.device) -> Tensor:
    """The positions [size, kernel] of each position's window, which is shifted so that it stays inside."""
    start = (torch.arange(size, device=device) - kernel // 2).clamp(0, size - kernel)
    return start[:, None] + torch.arange(kernel, device=device)


def position_bias(table: Tensor, kernel: int, height: int, width: int) -> Tensor:
    """The bias [H, K, K, Y, X] of each tap by its offset from the pixel, from a table [H, 2K - 1, 2K - 1]."""
    for dim, size in ((1, height), (2, width)):
        offset = neighbors(size, kernel, table.device) - torch.arange(size, device=table.device)[:, None] + kernel - 1
        table = table.index_select(dim, offset.flatten())
    return table.reshape(-1, height, kernel, width, kernel).permute(0, 2, 4, 1, 3)


def mix_neighborhoods(logits: Tensor, table: Tensor, values: Tensor, kernel: int) -> Tensor:
    """Values [B, H, D, Y, X] averaged over K x K windows by the softmax of logits [B, H, K^2, Y * X] and bias."""
    heads, (height, width) = values.shape[1], values.shape[3:]
    bias = position_bias(table, kernel, height, width).reshape(heads, kernel * kernel, height * width)
    weights = torch.softmax(logits + bias, dim=2).transpose(1, 3).unflatten(1, (height, width))  # [B, Y, X, K^2, H]
    mixed = ops.neighborhood_apply(
        weights.transpose(3, 4).unsqueeze(4), values.permute(0, 3, 4, 1, 2), window=[kernel, kernel]
    )  # [B, Y, X, H, 1, D]
    return mixed.squeeze(4).permute(0, 3, 4, 1, 2)


XT = Config((56, 112, 256, 336), (2, 2, 3, 2), (6, 2), (4, 6))
T = Config((64, 128, 256, 512), (4, 4, 6, 2), (12, 2), (4, 8))
S = Config((64, 128, 320, 512), (6, 6, 8, 3), (16, 3), (8, 16))
B = Config((80, 160, 384, 576), (8, 8, 10, 4), (20, 4), (6, 9))

TINY = Config(
    (8, 8, 16, 32), (1, 1, 1, 1), (2, 1), (1, 1), kernels=(5, 5, 5, 5), small_kernel=3, mlp_ratio=(2, 2, 2, 2),
    focus_mlp_ratio=(2, 2), projection=32, aux=False, img_size=80, classes=10,
)  # fmt: skip

# Parameters as measured on the reference (card of OverLoCK), those of the merged form with the second classifier;
# accuracy: table 2 of the paper.
PAPER = Paper(
    title="OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
    year=2025,
    link="https://arxiv.org/abs/2502.20087",
    reference="LMMMEng/OverLoCK@2c8ab3b29e3a11fb4a2510d98e4d9ed8b33cf091",
    model=OverLoCK,
    variants={
        "overlock_xt": XT,
        "overlock_t": T,
        "overlock_s": S,
        "overlock_b": B,
        "overlock_xt_reparam": replace(XT, deploy=True),
        "overlock_t_reparam": replace(T, deploy=True),
        "overlock_s_reparam": replace(S, deploy=True),
        "overlock_b_reparam": replace(B, deploy=True),
    },
    tiny=TINY,
    published={
        "overlock_xt": Published(17_307_272, top1=82.7),
        "overlock_t": Published(34_990_472, top1=84.2),
        "overlock_s": Published(58_309_772, top1=84.8),
        "overlock_b": Published(98_012_968, top1=85.1),
        "overlock_xt_reparam": Published(16_453_712 + 337_672, top1=82.7),
        "overlock_t_reparam": Published(33_467_040 + 514_024, top1=84.2),
        "overlock_s_reparam": Published(56_156_452 + 514_024, top1=84.8),
        "overlock_b_reparam": Published(94_942_528 + 578_152, top1=85.1),
    },
    keys="patch_embedK, blocksK.i.{dwconv,proj.{0,1,2,3,4,6,7,8},ls}, high_level_proj, patch_embedx.{x_proj,h_proj}, "
    "sub_blocks3.i, sub_blocks4.i, aux_head, head; large kernels lk_origin, origin_bn, dil_conv_kK_R and dil_bn_kK_R, "
    "in the merged files lk_origin with a bias alone",
)
