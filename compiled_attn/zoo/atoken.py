"""AToken: "AToken: A Unified Tokenizer for Vision".

Lu et al., CVPR 2026, https://arxiv.org/abs/2509.14476. Images, videos and voxels are all sets of tokens at places
(t, x, y, z); one transformer with a 4-d rotary embedding encodes them for understanding and for reconstruction, with
continuous latents or with codes.

Reference: apple/ml-atoken at 3f5afdc1256e9baa53fc6cab5381d6215f5a4455 (atoken_inference/model/), read, not copied.
Known differences: latents are the posterior's mean unless noise is given; windows of time are one ragged attention, not
a loop; the Gaussian decoder of voxels and the text tower are not here; only what is released is ("joint" positions,
"full" attention, FSQ, no cache between windows).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ops import ragged_attention
from compiled_attn.zoo.paper import Paper, Published

SIDE = 16  # of the learned table of places
FRAMES = 16  # that see one another
BASE = 10000.0  # of the rotary frequencies
LOGIT_SCALE, LOGIT_BIAS = 4.8438, -15.5625  # of SigLIP's logits of image and text features
LEVELS = {
    2**6: (8, 8),
    2**8: (8, 6, 5),
    2**9: (8, 8, 8),
    2**10: (8, 5, 5, 5),
    2**12: (4,) * 6,
    2**16: (8, 8, 8, 5, 5, 5),
}


@dataclass(frozen=True)
class Tower:
    """One of the two transformers; qk_norm: of queries and keys per head; rms: RMSNorm in place of LayerNorm."""

    width: int = 1152
    depth: int = 27
    heads: int = 16
    hidden: int = 4304
    qk_norm: bool = False
    bias: bool = True
    rms: bool = False


@dataclass(frozen=True)
class Config:
    """patch: frames, rows, columns of a token; channels: of a token's pixels, which voxels fill up with zeros.

    latent: channels of a latent; codebook: codes of a codebook, 0 for continuous latents; codebooks: how many.
    frames, img_size: sizes of drawn inputs (no parameter depends on them).
    """

    encoder: Tower = Tower()
    decoder: Tower = Tower(qk_norm=True, bias=False, rms=True)
    patch: tuple[int, int, int] = (4, 16, 16)
    channels: int = 3072
    latent: int = 48
    codebook: int = 0
    codebooks: int = 8
    frames: int = 1
    img_size: int = 256


class Tokens(NamedTuple):
    """x [N, C] at place [N, 5] int64 (sample, t, x, y, z) in any order; samples [B] int64: 0, 1, ..., B - 1."""

    x: Tensor
    place: Tensor
    samples: Tensor


class Places(NamedTuple):
    """What a tower needs of the tokens' places, tokens that see one another side by side.

    order [N]: the tokens' numbers in that order; begins [N + 1]: where each group of them begins, the last ones empty;
    cos, sin [N, D / 2]: of the rotary angles; rows [N, SIDE * SIDE]: how each token mixes the table of places.
    """

    order: Tensor
    begins: Tensor
    cos: Tensor
    sin: Tensor
    rows: Tensor


def locate(place: Tensor, head_width: int, steps: int) -> Places:
    """Windows of `steps` steps of time from the first one on; angles with time counted within the window."""
    step = place[:, 1] - place[:, 1].amin(dim=0)
    window, step = step // steps, step % steps
    key = place[:, 0] * (window.amax(dim=0) + 1) + window  # of what sees one another: a sample's window
    order = in_order(key)
    key = key[order]
    group = (F.pad(key[:-1], (1, 0), value=-1) != key).cumsum(dim=0) - 1
    begins = offsets(group, key)
    step, x, y, z = (axis[order] for axis in (step, place[:, 2], place[:, 3], place[:, 4]))
    rate = BASE ** (-torch.arange(head_width // 8, device=place.device) / head_width)
    angle = torch.cat([axis[:, None].float() * rate for axis in (step, x, y, z)], dim=1)
    most = (torch.zeros_like(axis).scatter_reduce(0, group, axis, "amax")[group] for axis in (x, y))
    rows, columns = (resampling(axis, last + 1) for axis, last in zip((x, y), most, strict=True))
    return Places(order, begins, angle.cos(), angle.sin(), (rows[:, :, None] * columns[:, None]).flatten(1))


def in_order(key: Tensor) -> Tensor:
    """The numbers of whole keys [N] by rising key, equal ones as they stand."""
    place = torch.ones_like(key).cumsum(dim=0)
    return (key * key.shape[0] + place).argsort(dim=0)


def offsets(group: Tensor, groups: Tensor) -> Tensor:
    """Where each of G groups begins [G + 1] when tokens lie in the order of their `group` [N]; groups [G]."""
    counts = torch.zeros_like(groups).scatter_add(0, group, torch.ones_like(group))
    return F.pad(counts.cumsum(dim=0), (1, 0))


def resampling(index: Tensor, size: Tensor) -> Tensor:
    """Weights [N, SIDE] with which row `index` of a table resized to `size` rows mixes the SIDE rows of the table.

    Bilinear, antialiased, align_corners=False: a triangle around the row's centre, as wide as a row of the larger grid.
    """
    step = SIDE / size.float()  # [N]
    centre = step * (index.float() + 0.5)
    offset = torch.arange(SIDE, device=index.device) + 0.5 - centre[:, None]
    weight = (1 - offset.abs() / step.clamp(min=1)[:, None]).clamp(min=0)
    return weight / weight.sum(dim=1, keepdim=True)


class Positions(nn.Module):
    """The learned 2-d table of places, resized for every sample to its own extent: [N, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(SIDE * SIDE, width)

    def forward(self, places: Places) -> Tensor:
        return places.rows @ self.position_embedding.weight


class RMSNorm(nn.Module):
    """x / sqrt(mean of squares + eps), scaled; in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)
        return (wide * self.weight.float()).to(x.dtype)


def norm(tower: Tower) -> nn.Module:
    return RMSNorm(tower.width) if tower.rms else nn.LayerNorm(tower.width, eps=1e-6)


class HeadNorm(nn.Module):
    """Unit vectors per head times sqrt(D) times gamma [H, D]."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, width))

    def forward(self, x: Tensor) -> Tensor:
        unit = F.normalize(x.float(), dim=-1)
        return (unit * self.gamma * x.shape[-1] ** 0.5).to(x.dtype)


def rotate(x: Tensor, places: Places) -> Tensor:
    """x [N, H, D] with its neighbouring pairs of channels turned by the token's angles."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(dim=-1)
    cos, sin = places.cos.unsqueeze(1), places.sin.unsqueeze(1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, q_begins: Tensor, k_begins: Tensor) -> Tensor:
    """Attention of packed q [M, H, D] to packed k and v [N, H, D] within each group of rows: [M, H * D]."""
    return ragged_attention(q, k, v, q_begins, k_begins, scale=q.shape[2] ** -0.5).flatten(1)


class Attention(nn.Module):
    """Self attention with the rotary embedding, within sample and window."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.heads = tower.heads
        self.to_qkv = nn.Linear(tower.width, 3 * tower.width, bias=tower.bias)
        self.to_out = nn.Linear(tower.width, tower.width, bias=tower.bias)
        self.q_rms_norm = HeadNorm(tower.heads, tower.width // tower.heads) if tower.qk_norm else nn.Identity()
        self.k_rms_norm = HeadNorm(tower.heads, tower.width // tower.heads) if tower.qk_norm else nn.Identity()

    def forward(self, x: Tensor, places: Places) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(1, (3, self.heads, -1)).unbind(dim=1)
        q, k = rotate(self.q_rms_norm(q), places), rotate(self.k_rms_norm(k), places)
        return self.to_out(attend(q, k, v, places.begins, places.begins))


class Mlp(nn.Module):
    """Two maps with GELU (tanh) between."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(tower.width, tower.hidden, bias=tower.bias),
            nn.GELU(approximate="tanh"),
            nn.Linear(tower.hidden, tower.width, bias=tower.bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.norm1 = norm(tower)
        self.norm2 = norm(tower)
        self.attn = Attention(tower)
        self.mlp = Mlp(tower)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        x = x + self.attn(self.norm1(x), places)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """What encoder and decoder share: the first map, places, and the blocks."""

    def __init__(self, tower: Tower, in_channels: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.head_width = tower.width // tower.heads
        self.pos_embedder = Positions(tower.width)
        self.input_layer = nn.Linear(in_channels, tower.width, bias=tower.bias)
        self.blocks = nn.ModuleList(Block(tower) for _ in range(tower.depth))

    def trunk(self, tokens: Tokens) -> Tensor:
        places = locate(tokens.place, self.head_width, self.steps)
        x = self.input_layer(tokens.x[places.order])
        x = x + self.pos_embedder(places).to(x.dtype)
        for block in self.blocks:
            x = block(x, places)
        return torch.zeros_like(x).index_copy(0, places.order, x)


class CrossAttention(nn.Module):
    """Attention of probes to the tokens of their sample; no rotary embedding."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.heads = tower.heads
        self.to_q = nn.Linear(tower.width, tower.width, bias=tower.bias)
        self.to_kv = nn.Linear(tower.width, 2 * tower.width, bias=tower.bias)
        self.to_out = nn.Linear(tower.width, tower.width, bias=tower.bias)
        self.q_rms_norm = HeadNorm(tower.heads, tower.width // tower.heads) if tower.qk_norm else nn.Identity()
        self.k_rms_norm = HeadNorm(tower.heads, tower.width // tower.heads) if tower.qk_norm else nn.Identity()

    def forward(self, probe: Tensor, x: Tensor, samples: Tensor, begins: Tensor) -> Tensor:
        """probe [B, C], one a sample; x [N, C] in the order of samples [B], each from begins [B + 1]."""
        q = self.q_rms_norm(self.to_q(probe).unflatten(1, (self.heads, -1)))
        k, v = self.to_kv(x).unflatten(1, (2, self.heads, -1)).unbind(dim=1)
        return self.to_out(attend(q, self.k_rms_norm(k), v, F.pad(samples + 1, (1, 0)), begins))


class Head(nn.Module):
    """SigLIP's pooling: one learned probe for each sample, then an MLP with its residual."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(tower.width))
        self.attention = CrossAttention(tower)
        self.layernorm = norm(tower)
        self.mlp = Mlp(tower)

    def forward(self, tokens: Tokens) -> Tensor:
        """Image features [B, C] of the samples."""
        probes = self.probe.expand(tokens.samples.shape[0], -1)
        order = in_order(tokens.place[:, 0])
        begins = offsets(tokens.place[:, 0], tokens.samples)
        x = self.attention(probes, tokens.x[order], tokens.samples, begins)
        return x + self.mlp(self.layernorm(x))


class Encoder(Transformer):
    """Tokens' pixels to features [N, C]."""

    def __init__(self, tower: Tower, in_channels: int, steps: int) -> None:
        super().__init__(tower, in_channels, steps)
        self.post_layernorm = norm(tower)
        self.head = Head(tower)

    def forward(self, tokens: Tokens) -> Tensor:
        return self.post_layernorm(self.trunk(tokens))


class Decoder(Transformer):
    """Latents to tokens' pixels [N, channels]."""

    def __init__(self, tower: Tower, latent: int, channels: int, steps: int) -> None:
        super().__init__(tower, latent, steps)
        self.out_norm = RMSNorm(tower.width) if tower.rms else nn.LayerNorm(tower.width, 1e-6, elementwise_affine=False)
        self.out_layer = nn.Linear(tower.width, channels, bias=False)

    def forward(self, tokens: Tokens) -> Tensor:
        return self.out_layer(self.out_norm(self.trunk(tokens)))


class Quantizer(nn.Module):
    """Finite scalar quantization (Mentzer et al., arXiv 2309.15505): every channel is rounded to a few levels."""

    def __init__(self, codebook: int, codebooks: int) -> None:
        super().__init__()
        self.codebooks = codebooks
        self.levels = LEVELS[codebook]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes in [-1, 1] of z [N, codebooks * channels], with the gradient of no rounding, and ids [N, codebooks]."""
        levels = torch.tensor(self.levels, device=z.device)
        half, offset = (levels - 1) * 1.001 / 2, torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = (z.unflatten(1, (self.codebooks, -1)) + (offset / half).atanh()).tanh() * half - offset
        codes = bounded + (bounded.round() - bounded).detach()
        size = levels.cumprod(dim=0) // levels
        ids = ((codes.detach().round() + levels // 2) * size).sum(dim=2).long()
        return (codes / (levels // 2)).flatten(1), ids


class AToken(nn.Module):
    """The tokenizer. `forward` takes one size of picture; `encode` and `decode` take packed tokens of any sizes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        steps = FRAMES // config.patch[0]
        self.encoder = Encoder(config.encoder, config.channels, steps)
        self.proj = nn.Linear(config.encoder.width, 2 * config.latent, bias=False)
        self.quantizer = Quantizer(config.codebook, config.codebooks) if config.codebook else None
        self.decoder = Decoder(config.decoder, config.latent, config.channels, steps)

    def encode(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of the latents [N, 2 * latent], features of images [B, C] and of tokens [N, C]."""
        features = self.encoder(tokens)
        return self.proj(features), F.normalize(self.encoder.head(tokens._replace(x=features)), dim=-1), features

    def latent(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """The latents [N, latent] to decode: codes, or the mean, or a sample with the noise [N, latent]."""
        mean, log_variance = z.chunk(2, dim=1)
        if self.quantizer is not None:
            return self.quantizer(mean)[0]
        return mean if noise is None else mean + (0.5 * log_variance).exp() * noise

    def decode(self, latent: Tensor, tokens: Tokens) -> Tensor:
        """Pixels [N, channels] of latents at the places of `tokens`."""
        return self.decoder(tokens._replace(x=latent))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures in [-1, 1], [B, T, Y, X, 3], to their reconstruction of whole patches, and image features [B, C]."""
        x, place, samples = patchify(pictures, self.config.patch)
        tokens = Tokens(x, place, samples)
        z, features, _ = self.encode(tokens)
        return unpatchify(self.decode(self.latent(z), tokens), pictures, self.config.patch), features


@torch.fx.wrap
def patchify(pictures: Tensor, patch: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of Tokens of pictures [B, T, Y, X, 3]; tokens in the order of t, rows, columns.

    Fewer frames than a patch has are filled up with zeros, frames beyond whole patches are cut; rows and columns are
    cut to whole patches around the centre.
    """
    batch, frames, height, width, channels = pictures.shape
    pictures = F.pad(pictures, (0, 0, 0, 0, 0, 0, 0, max(0, patch[0] - frames)))
    t, y, x = max(1, frames // patch[0]), height // patch[1], width // patch[2]
    top, left = (height - y * patch[1]) // 2, (width - x * patch[2]) // 2
    cut = pictures[:, : t * patch[0], top : top + y * patch[1], left : left + x * patch[2]]
    cut = cut.reshape(batch, t, patch[0], y, patch[1], x, patch[2], channels)
    pixels = cut.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(0, 3)
    samples = torch.arange(batch, device=pictures.device)
    axes = [torch.arange(size, device=pictures.device) for size in (t, y, x, 1)]
    return pixels, torch.stack(torch.meshgrid(samples, *axes, indexing="ij"), dim=-1).flatten(0, 4), samples


@torch.fx.wrap
def unpatchify(pixels: Tensor, pictures: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Pixels [N, channels] as pictures [B, T, Y, X, 3] of whole patches; of a single frame, the first one alone."""
    batch, frames, height, width, channels = pictures.shape
    t, y, x = max(1, frames // patch[0]), height // patch[1], width // patch[2]
    whole = pixels.reshape(batch, t, y, x, *patch, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
    whole = whole.reshape(batch, t * patch[0], y * patch[1], x * patch[2], channels)
    return whole[:, :1] if frames == 1 else whole


def pack(pictures: Sequence[Tensor], patch: tuple[int, int, int]) -> Tokens:
    """Images [Y, X, 3] and videos [T, Y, X, 3] of different sizes in one set of tokens."""
    parts = [patchify(p[None, None] if p.ndim == 3 else p[None], patch) for p in pictures]
    place = torch.cat([place + torch.tensor([i, 0, 0, 0, 0]) for i, (_, place, _) in enumerate(parts)])
    return Tokens(torch.cat([x for x, _, _ in parts]), place, torch.arange(len(parts)))


def voxels(features: Tensor, place: Tensor, channels: int) -> Tokens:
    """Tokens of one object: features [N, C] at voxels place [N, 3], filled up with zeros to `channels`, at t = 1."""
    place = F.pad(F.pad(place.long(), (1, 0), value=1), (1, 0))
    return Tokens(F.pad(features, (0, channels - features.shape[1])), place, place.new_zeros(1))


def videos(config: Config, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random pictures [B, frames, img_size, img_size, 3] in [-1, 1]."""
    size = (batch, config.frames, config.img_size, config.img_size, 3)
    return (torch.rand(size, generator=generator) * 2 - 1,)


SOC = Config()

# Counts measured on the reference (card of AToken).
PAPER = Paper(
    title="AToken: A Unified Tokenizer for Vision",
    year=2026,
    link="https://arxiv.org/abs/2509.14476",
    reference="apple/ml-atoken@3f5afdc1256e9baa53fc6cab5381d6215f5a4455",
    model=AToken,
    variants={
        "so_c": SOC,
        "so_d": replace(SOC, codebook=4096),
        "so_c_s1": replace(SOC, latent=32),
    },
    tiny=Config(
        encoder=Tower(32, 1, 2, 40),
        decoder=Tower(32, 1, 2, 40, qk_norm=True, bias=False, rms=True),
        patch=(2, 4, 4),
        channels=96,
        latent=6,
        frames=2,
        img_size=16,
    ),
    published={
        "so_c": Published(845_738_048),
        "so_d": Published(845_738_048),
        "so_c_s1": Published(845_682_752),
    },
    keys="the released AutoencoderKL's: encoder.{pos_embedder,input_layer,blocks,post_layernorm,head}, proj, decoder",
    inputs=videos,
)
