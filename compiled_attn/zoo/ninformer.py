"""NiNformer: "A Network in Network Transformer with Token Mixing as a Gating Function Generator".

Abdullah & Aydin, Neural Computing & Applications 2025, https://arxiv.org/abs/2403.02411. An MLP-Mixer block inside of
each block makes the gate that a linear map of the tokens is multiplied by; there is no attention.

Reference: Abdullah-88/NiNformer at 0ec85d46a82ea9472fdd28dde0b70dc0ca62a91a (ninformer.py, train.py).
Known differences: no dropout (off in the reference at inference).
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.paper import Paper, Published


@dataclass(frozen=True)
class Config:
    """width: C; hidden: width of every MLP, that over tokens included; the weights fix the count of tokens."""

    img_size: int = 32
    patch_size: int = 4
    in_chans: int = 3
    classes: int = 10
    width: int = 256
    hidden: int = 512
    depth: int = 4

    def __post_init__(self) -> None:
        if self.img_size % self.patch_size:
            raise CompiledAttnError(
                "the patches do not fill the picture",
                where="zoo.ninformer.Config",
                facts=f"img_size is {self.img_size}, patch_size {self.patch_size}",
                do="give a picture size that the patch size divides",
            )

    @property
    def tokens(self) -> int:
        return (self.img_size // self.patch_size) ** 2


class FeedForward(nn.Module):
    """Two linear maps with GELU (erf) between; keys net.0 and net.3."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width), nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class OverTokens(nn.Module):
    """A feed-forward network along the tokens of [B, N, C], every channel for itself."""

    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.net = FeedForward(tokens, hidden).net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(1, 2)).transpose(1, 2)


class Mixer(nn.Module):
    """MLP-Mixer block (arXiv 2105.01601): mixes tokens, then channels, each with its residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        mix = OverTokens(config.tokens, hidden)
        self.token_mix = nn.Sequential(nn.LayerNorm(width), nn.Identity(), mix, nn.Identity())
        self.channel_mix = nn.Sequential(nn.LayerNorm(width), FeedForward(width, hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(x)
        return x + self.channel_mix(x)


class MixerGatingUnit(nn.Module):
    """A linear map of the tokens times the gate that the mixer makes of them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.Mixer = Mixer(config)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.Mixer(x)


class Block(nn.Module):
    """Gating unit and feed-forward network with their residuals, both behind one and the same norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.mgu = MixerGatingUnit(config)
        self.ffn = FeedForward(config.width, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mgu(self.norm(x))
        return x + self.ffn(self.norm(x))


class NiNformer(nn.Module):
    """Pictures [B, in_chans, img_size, img_size] to logits [B, classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.patcher = nn.Conv2d(config.in_chans, config.width, config.patch_size, stride=config.patch_size)
        self.classifier = nn.Linear(config.width, config.classes)

    def tokens(self, x: Tensor) -> Tensor:
        """What the last block gives, [B, N, C]."""
        return self.model(self.patcher(x).flatten(2).transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.tokens(x).mean(1))


CIFAR10 = Config()

# Parameters as measured on the reference (card of NiNformer).
PAPER = Paper(
    title="NiNformer: A Network in Network Transformer with Token Mixing as a Gating Function Generator",
    year=2024,
    link="https://arxiv.org/abs/2403.02411",
    reference="Abdullah-88/NiNformer@0ec85d46a82ea9472fdd28dde0b70dc0ca62a91a",
    model=NiNformer,
    variants={
        "ninformer_cifar10": CIFAR10,
        "ninformer_cifar100": replace(CIFAR10, classes=100),
        "ninformer_mnist": replace(CIFAR10, img_size=28, in_chans=1),
    },
    tiny=Config(img_size=16, patch_size=4, width=16, hidden=24, depth=2),
    published={
        "ninformer_cifar10": Published(2_652_170, stated_gmacs=0.2),
        "ninformer_cifar100": Published(2_675_300, stated_gmacs=0.2),
        "ninformer_mnist": Published(2_582_478),
    },
    keys="model.i.{norm,mgu.Mixer.{token_mix.{0,2.net.0,2.net.3},channel_mix.{0,1.net.0,1.net.3}},mgu.proj,ffn.net.0,"
    "ffn.net.3}, patcher, classifier",
)
