"""DToP: "Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation".

Tang et al., ICCV 2023, https://arxiv.org/abs/2308.01045. A segmentation head stands behind each stage of a plain ViT;
tokens that it grades as easy get their final prediction there and leave the network, but for the few surest of every
class, which stay as context.

Reference: zbwxp/Dynamic-Token-Pruning at 2baefffc879622b6514504dff44cf04d7e0e7504 (SegViT's form); SETR's host is
mmsegmentation's (config/_base_/models/setr_naive.py there), pruned by the paper's words, since no code is published.
Known differences: tokens are packed once a stage, a ragged batch, not zeroed in every block, which gives the same
numbers; of equally sure tokens the reference keeps any; pictures that are not square are taken, their maps have the
picture's size; SETR's class token goes through the heads with the others, so that in training their batch norms see it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ops import pack_tokens, ragged_attention, unpack_tokens
from compiled_attn.zoo.layers.mha import MultiheadAttention
from compiled_attn.zoo.layers.vit import resize_positions
from compiled_attn.zoo.paper import Paper, Published

torch.fx.wrap("resize_positions")

UP_SCALE = 4  # SETR enlarges its map by this before the picture's size


@dataclass(frozen=True)
class Config:
    """width, heads, depth: of the ViT; stages: the blocks behind which heads stand, 0-based, the last one's included.

    thresholds: above which confidence a head's tokens are easy, for each head but the last; 1 lets none go. keep: how
    many easy tokens of each class stay. channels, head_heads, layers: of the heads (SETR's have channels alone). host:
    a name of HEADS; SETR's ViT has a class token and a final norm.
    """

    width: int = 768
    heads: int = 12
    depth: int = 12
    img_size: int = 512
    patch_size: int = 16
    in_chans: int = 3
    classes: int = 150
    stages: tuple[int, ...] = (5, 7, 11)
    thresholds: tuple[float, ...] = (0.9, 0.9)
    keep: int = 5
    channels: int = 384
    head_heads: int = 6
    layers: int = 3
    mlp_ratio: int = 4
    host: str = "segvit"


class Live(NamedTuple):
    """The tokens that are still in the network where some have left: T in all, packed picture behind picture.

    here [B, N] bool: which of a picture's; place [T]: picture * N + position; begins [B + 1]: where a picture begins.
    N counts SETR's class token, which comes first and never leaves.
    """

    here: Tensor
    place: Tensor
    begins: Tensor


class Stage(NamedTuple):
    """What a stage leaves: its tokens [T, C], or [B, N, C] while all are live; the canvas [B, classes, N].

    weight [B, classes, 1]: the head's own, with which its confidences of the canvas are made; SETR has none.
    """

    x: Tensor
    live: Live | None
    canvas: Tensor
    weight: Tensor | None


class Attention(nn.Module):
    """mmcv's shell around attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = MultiheadAttention(width, heads)

    def forward(self, x: Tensor, live: Live | None) -> Tensor:
        return self.attn(x) if live is None else self.attn.packed(x, live.begins, live.here.shape[1])


class FFN(nn.Module):
    """Two maps with GELU (erf) between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(width, hidden), nn.GELU()), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Layer(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ln2 = nn.LayerNorm(width, eps=1e-6)
        self.ffn = FFN(width, hidden)

    def forward(self, x: Tensor, live: Live | None) -> Tensor:
        x = x + self.attn(self.ln1(x), live)
        return x + self.ffn(self.ln2(x))


class PatchEmbed(nn.Module):
    """Patches of a picture, which zeros fill up to whole ones at the right and below: [B, C, y, x]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config.patch_size
        self.size = size
        self.projection = nn.Conv2d(config.in_chans, config.width, size, stride=size)

    def forward(self, pictures: Tensor) -> Tensor:
        height, width = pictures.shape[2:]
        return self.projection(F.pad(pictures, (0, -width % self.size, 0, -height % self.size)))


class ViT(nn.Module):
    """mmsegmentation's plain ViT. SegViT's host drops the class token after it got its position."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, setr = config.width, config.host == "setr"
        self.prefix = int(setr)
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (config.img_size // config.patch_size) ** 2, width))
        self.layers = nn.ModuleList(Layer(width, config.heads, config.mlp_ratio * width) for _ in range(config.depth))
        self.ln1 = nn.LayerNorm(width, eps=1e-6) if setr else None

    def embed(self, pictures: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B, prefix + N, C] and the grid's (y, x)."""
        patches = self.patch_embed(pictures)
        grid = patches.shape[2:]
        tokens = torch.cat([self.cls_token.expand(pictures.shape[0], -1, -1), patches.flatten(2).mT], dim=1)
        return (tokens + resize_positions(self.pos_embed, 1, grid))[:, 1 - self.prefix :], grid


class CrossAttention(nn.Module):
    """Attention of class queries [B, Q, C] to the tokens of their picture, [B, N, C] or packed [T, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, query: Tensor, x: Tensor, live: Live | None) -> tuple[Tensor, Tensor]:
        """What the queries get [B, Q, C], and their scores before softmax, the mean over heads [B, Q, N].

        The heads' products add up to the product over all channels, so the scores need no heads. They are zero where a
        token has left.
        """
        q, k, v = self.q(query), self.k(x), self.v(x)
        scale = (q.shape[-1] // self.heads) ** -0.5
        if live is None:
            out = F.scaled_dot_product_attention(*(self.split(t).transpose(1, 2) for t in (q, k, v)), scale=scale)
            out = out.transpose(1, 2).flatten(2)
        else:
            out, k = self.packed(q, k, v, live, scale), on_grid(k, live)
        return self.proj(out), (q @ k.mT) * (scale / self.heads)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def packed(self, q: Tensor, k: Tensor, v: Tensor, live: Live, scale: float) -> Tensor:
        """Queries [B, Q, C] of keys and values [T, C]."""
        count = q.shape[1]
        begins = (torch.ones_like(live.begins).cumsum(dim=0) - 1) * count
        longest = torch.sym_max(count, live.here.shape[1])
        rows = (self.split(t) for t in (q.flatten(0, 1), k, v))
        return ragged_attention(*rows, begins, live.begins, scale=scale, longest=longest).view_as(q)


def on_grid(x: Tensor, live: Live) -> Tensor:
    """Rows [T, C] at their places [B, N, C], zeros where a token has left."""
    return unpack_tokens(x, live.place, x.new_zeros(live.here.shape[0], live.here.shape[1], x.shape[1]))


class DecoderLayer(nn.Module):
    """A post-norm decoder layer with ReLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(width, heads)
        self.multihead_attn = CrossAttention(width, heads)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, query: Tensor, x: Tensor, live: Live | None) -> tuple[Tensor, Tensor]:
        query = self.norm1(query + self.self_attn(query))
        got, scores = self.multihead_attn(query, x, live)
        query = self.norm2(query + got)
        return self.norm3(query + self.linear2(F.relu(self.linear1(query)))), scores


class Decoder(nn.Module):
    """The decoder's layers; the scores are the last one's."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config.channels, config.head_heads) for _ in range(config.layers))

    def forward(self, query: Tensor, x: Tensor, live: Live | None) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            query, scores = layer(query, x, live)
        return query, scores


class PruneHead(nn.Module):
    """SegViT's attention-to-mask head (Zhang et al., arXiv 2210.05844): a class's scores of tokens are its mask."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_proj = nn.Linear(config.width, config.channels)
        self.proj_norm = nn.LayerNorm(config.channels)
        self.decoder = Decoder(config)
        self.q = nn.Embedding(config.classes, config.channels)
        self.class_embed = nn.Linear(config.channels, 2)

    def forward(self, x: Tensor, live: Live | None) -> tuple[Tensor, Tensor | None]:
        """What live tokens leave on the canvas [B, classes, N], how sure each class is there [B, classes, 1]."""
        pictures = x.shape[0] if live is None else live.here.shape[0]
        query, scores = self.decoder(self.q.weight.expand(pictures, -1, -1), self.proj_norm(self.input_proj(x)), live)
        return scores, self.class_embed(query).softmax(dim=-1)[..., :1]

    def predict(self, canvas: Tensor, weight: Tensor | None) -> Tensor:
        """Confidences [B, classes, N]."""
        return weight * canvas.sigmoid()

    def enlarge(self, canvas: Tensor, weight: Tensor | None, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Confidences of every pixel [B, classes, *size]."""
        maps = self.predict(canvas, weight).unflatten(2, grid)
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class ConvModule(nn.Module):
    """mmcv's convolution, batch norm and ReLU, of one pixel: a linear map of rows [M, C]."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.conv.weight.flatten(1))
        return F.relu(self.bn(x.unflatten(1, (-1, 1, 1)))).flatten(1)


class SETRHead(nn.Module):
    """SETR's naive head (Zheng et al., arXiv 2012.15840). What it enlarges it maps linearly, so it may map before."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.up_convs = nn.ModuleList([nn.Sequential(ConvModule(config.width, config.channels))])
        self.conv_seg = nn.Conv2d(config.channels, config.classes, 1)

    def forward(self, x: Tensor, live: Live | None) -> tuple[Tensor, Tensor | None]:
        """The logits of live tokens, which are what they leave on the canvas [B, classes, N]."""
        rows = self.up_convs[0](some(self.norm(x if live is not None else x.flatten(0, 1))))
        logits = F.linear(rows, self.conv_seg.weight.flatten(1), self.conv_seg.bias)
        return (logits.unflatten(0, (x.shape[0], -1)) if live is None else on_grid(logits, live)).mT, None

    def predict(self, canvas: Tensor, _weight: Tensor | None) -> Tensor:
        """Confidences [B, classes, N]."""
        return canvas.softmax(dim=1)

    def enlarge(self, canvas: Tensor, _weight: Tensor | None, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Logits of every pixel [B, classes, *size]."""
        maps = F.interpolate(canvas.unflatten(2, grid), scale_factor=UP_SCALE, mode="bilinear", align_corners=False)
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@torch.fx.wrap
def some(x: Tensor) -> Tensor:
    """Rows as they are. Class tokens never leave, so there is one; an export must know it to take the batch norm."""
    torch._check(x.shape[0] > 0)
    return x


HEADS: Mapping[str, Callable[[Config], nn.Module]] = {"segvit": PruneHead, "setr": SETRHead}


class DToP(nn.Module):
    """Pictures [B, in_chans, Y, X] to maps [B, classes, S, S] of confidences (SegViT) or logits (SETR).

    S is config.img_size; the maps of pictures that are not square, and of SETR, have the picture's size.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = ViT(config)
        head = HEADS[config.host]
        self.decode_head = head(config)
        self.auxiliary_head = nn.ModuleList(head(config) for _ in config.stages[:-1])
        initialise(self)

    @property
    def heads(self) -> list[nn.Module]:
        return [*self.auxiliary_head, self.decode_head]

    def stages(self, x: Tensor) -> list[Stage]:
        """What each stage leaves, of embedded tokens x [B, N, C]."""
        config, prefix = self.config, self.backbone.prefix
        live: Live | None = None
        canvas: Tensor | None = None
        begin, found = 0, []
        for head, end, threshold in zip(self.heads, config.stages, (*config.thresholds, 1.0), strict=True):
            for layer in self.backbone.layers[begin : end + 1]:
                x = layer(x, live)
            values, weight = head(self.normed(x, end), live)
            canvas = values if live is None else values.where(live.here.unsqueeze(1), canvas)
            found.append(Stage(x, live, canvas, weight))
            if threshold < 1:
                real = None if live is None else live.here[:, prefix:]
                finished = easy(head.predict(canvas[:, :, prefix:], weight), real, threshold, config.keep)
                x, live = leave(x, live, F.pad(finished, (prefix, 0), value=False))
            begin = end + 1
        return found

    def normed(self, x: Tensor, block: int) -> Tensor:
        """What the head behind that block reads: SETR's ViT ends with a norm."""
        last = block == self.config.depth - 1
        return self.backbone.ln1(x) if last and self.backbone.ln1 is not None else x

    def maps(self, last: Stage, grid: tuple[int, int], pictures: Tensor) -> Tensor:
        """The maps of pictures that the last stage leaves."""
        square = self.config.img_size if self.config.host == "segvit" else None
        canvas = last.canvas[:, :, self.backbone.prefix :]
        return self.decode_head.enlarge(canvas, last.weight, grid, map_size(pictures, grid, square))

    def forward(self, pictures: Tensor) -> Tensor:
        x, grid = self.backbone.embed(pictures)
        return self.maps(self.stages(x)[-1], grid, pictures)


@torch.fx.wrap
def map_size(pictures: Tensor, grid: tuple[int, int], square: int | None) -> tuple[int, int]:
    """The sides of the maps: `square` for a square grid, where it is given, otherwise the pictures'."""
    return (square, square) if square is not None and grid[0] == grid[1] else tuple(pictures.shape[2:])


@torch.no_grad()
def easy(confidence: Tensor, real: Tensor | None, threshold: float, keep: int) -> Tensor:
    """Which tokens are done [B, N]: their best of confidence [B, classes, N] lies above the threshold.

    Of the tokens whose best class is the same, the `keep` surest are not.
    """
    value, kind = confidence.max(dim=1)
    sure = value > threshold if real is None else (value > threshold) & real
    order = value.masked_fill(~sure, -torch.inf).sort(dim=1, descending=True).indices
    classes = torch.arange(confidence.shape[1], device=value.device)
    ranked = sure.gather(1, order)
    member = (kind.gather(1, order).unsqueeze(2) == classes) & ranked.unsqueeze(2)  # [B, N, classes], surest first
    rank = (member.cumsum(dim=1) * member).sum(dim=2)
    return torch.zeros_like(sure).scatter(1, order, ranked & (rank > keep))


def leave(x: Tensor, live: Live | None, finished: Tensor) -> tuple[Tensor, Live]:
    """Tokens x [B, N, C] or packed [T, C] without the finished [B, N], packed, each picture's in order."""
    if live is None:
        tokens, place, begins = pack_tokens(x, ~finished)
        return tokens, Live(~finished, place, begins)
    here = live.here & ~finished
    tokens, rows, _ = pack_tokens(x.unsqueeze(0), here.flatten()[live.place].unsqueeze(0))
    return tokens, Live(here, live.place[rows], F.pad(here.sum(dim=1).cumsum(dim=0), (1, 0)))


def feature_map(stage: Stage, grid: tuple[int, int]) -> Tensor:
    """A stage's tokens as a map [B, C, y, x], zero where tokens had left before."""
    x = stage.x if stage.live is None else on_grid(stage.x, stage.live)
    return x[:, -grid[0] * grid[1] :].mT.unflatten(2, grid)


def initialise(model: nn.Module) -> None:
    """Truncated normal of std 0.02 for linear maps and embeddings, zero biases."""
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_token", "pos_embed")) or (parameter.ndim == 2 and "norm" not in name):
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


B = Config()
L = Config(1024, 16, 24, img_size=640, stages=(7, 15, 23), thresholds=(0.95, 0.95), channels=512, head_heads=8)
SETR_B = Config(stages=(3, 6, 9, 11), thresholds=(0.9, 0.9, 0.9), channels=256, host="setr")
TINY = Config(
    width=32,
    heads=2,
    depth=2,
    img_size=32,
    patch_size=4,
    classes=4,
    stages=(0, 1),
    thresholds=(0.1,),  # all are easy, so what stays is at most five of each class that is seen
    channels=16,
    head_heads=2,
    layers=1,
)
UNREAD = "of a head in between only the scores of tokens that leave are read, not what its queries get"


def _idle(config: Config) -> dict[str, str]:
    """The parameters of the tiny network that reach no output but through which tokens leave."""
    parts = ("multihead_attn.v", "multihead_attn.proj", "linear1", "linear2", "norm2", "norm3")
    last = [f"decoder.layers.{config.layers - 1}.{part}" for part in parts]
    heads = [f"auxiliary_head.{i}.{part}" for i in range(len(config.stages) - 1) for part in (*last, "class_embed")]
    names = [f"{head}.{kind}" for head in heads for kind in ("weight", "bias")]
    return {name: UNREAD for name in names} | {"cls_token": "SegViT drops it after it got its position"}


# Counts measured on the reference (card of DToP).
PAPER = Paper(
    title="Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
    year=2023,
    link="https://arxiv.org/abs/2308.01045",
    reference="zbwxp/Dynamic-Token-Pruning@2baefffc879622b6514504dff44cf04d7e0e7504",
    model=DToP,
    variants={
        "segvit_b_ade20k_512": B,
        "segvit_l_ade20k_640": L,
        "segvit_l_context_480": replace(L, img_size=480, classes=59, head_heads=16),
        "segvit_l_cocostuff_512": replace(L, img_size=512, classes=171, head_heads=16),
        "setr_b_ade20k_512": SETR_B,
        "segvit_b_ade20k_512_whole": replace(B, thresholds=(1.0, 1.0)),
    },
    tiny=TINY,
    published={
        "segvit_b_ade20k_512": Published(108_795_654),
        "segvit_b_ade20k_512_whole": Published(108_795_654),
    },
    keys="mmsegmentation's: backbone (patch_embed.projection, layers.i.{ln1,attn.attn,ln2,ffn.layers}), decode_head, "
    "auxiliary_head.i; buffers of losses (loss_decode.*) are to be left out",
    idle=_idle(TINY),
)
