"""SinkLoRA: "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context LLMs", Zhang, 2024, arXiv 2406.05678.

Long texts are learned with attention inside groups of a quarter of the text, half of the heads shifted by half a group
(LongLoRA's S2 attention), low-rank updates and trainable embeddings and norms; answers are given with full attention
over a cache that drops what got little of it (H2O). The paper's own attention lets every query also see the sinks.

Reference: Dexter-GT-86/SinkLoRA at a7410943a2ce95d6811a904f941d9e436f1b4df1, which holds LongLoRA's attention only
(dvlab-research/LongLoRA at d4eb344c5ccc); eviction: FMInference/H2O at ac75c2a8a9e7, mit-han-lab/streaming-llm at
2e5042606d69, FasterDecoding/SnapKV at e216ddc84c5b.
Known differences: "sinks" is our reading of section 3.2, whose code is not published; scores of evicting caches are
kept per sample, and summed over the query heads that share a key, where H2O sums over the batch and breaks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.layers.eviction import Cache, MaskedHeavyHitters, Policy, empty
from compiled_attn.zoo.layers.llama import Attention, Decoder, Layer, initialise
from compiled_attn.zoo.paper import Paper

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
PATTERNS = ("full", "shifted", "segments", "sinks")


@dataclass(frozen=True)
class Config:
    """width: C; hidden: the MLP's; heads: H; groups: key heads G (0: H); rope_factor: positions are divided by it.

    pattern, over the whole text: "full"; "shifted", LongLoRA's form without flash attention, whose last group of the
    shifted heads joins the text's end with its beginning, so that early tokens see late ones; "segments", its form with
    flash attention, where that group is two; "sinks", segments and the first `sinks` tokens.
    ratio: a group over the text. rank: of low-rank updates of attention's projections, scaled by alpha / rank.
    """

    vocabulary: int = 32000
    width: int = 4096
    hidden: int = 11008
    depth: int = 32
    heads: int = 32
    groups: int = 0
    epsilon: float = 1e-6
    theta: float = 10000.0
    rope_factor: float = 1.0
    pattern: str = "full"
    ratio: float = 0.25
    sinks: int = 4
    rank: int = 0
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise CompiledAttnError(
                "no attention pattern of that name",
                where="zoo.sinklora.Config",
                facts=f"pattern is {self.pattern!r}, there are {', '.join(PATTERNS)}",
                do="name one of them",
            )


class LowRankLinear(nn.Linear):
    """A linear map whose weight W acts as W + alpha / rank * B A."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.scale = alpha / rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))

    def merged(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.weight + self.scale * self.lora_B.weight @ self.lora_A.weight)
        return linear


class SinkLoRA(nn.Module):
    """Tokens [B, T] to logits [B, T, vocabulary]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        layers = []
        for _ in range(config.depth):
            groups = config.groups or config.heads
            attention = Attention(config.width, config.heads, groups, config.theta, config.rope_factor)
            if config.rank:
                for name in PROJECTIONS:
                    setattr(attention, name, LowRankLinear(getattr(attention, name), config.rank, config.alpha))
            layers.append(Layer(attention, config.width, config.hidden, config.epsilon))
        self.model = Decoder(config.vocabulary, config.width, config.epsilon, layers)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        initialise(self)
        for module in self.modules():
            if isinstance(module, LowRankLinear):
                nn.init.zeros_(module.lora_B.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        config = self.config
        mix = partial(attend, pattern=config.pattern, ratio=config.ratio, sinks=config.sinks)
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, mix)
        return self.lm_head(self.model.norm(x))

    def caches(self, batch: int) -> list[Cache]:
        """One empty cache a layer."""
        like = self.lm_head.weight
        return [empty(batch, layer.self_attn.groups, layer.self_attn.size, like) for layer in self.model.layers]

    def extend(self, tokens: Tensor, caches: list[Cache], policy: Policy, start: int) -> tuple[Tensor, list[Cache]]:
        """Logits [B, t, vocabulary] of tokens [B, t] at positions from `start`, over full attention to what the caches
        hold, and the caches behind them, from which the policy has dropped after use.
        """
        x, behind = self.model.embed_tokens(tokens), []
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        for layer, cache in zip(self.model.layers, caches, strict=True):
            out, cache = cached_attention(layer.self_attn, layer.input_layernorm(x), cache, positions, policy.rolling)
            index = policy.keep(cache)
            behind.append(cache if index is None else cache.kept(index))
            x = layer.add(x, out)
        return self.lm_head(self.model.norm(x)), behind

    def cache_shapes(self) -> list[tuple[int, int, int]]:
        """Key heads, key width and value width of every layer."""
        shared = [layer.self_attn for layer in self.model.layers]
        return [(attention.groups, attention.size, attention.size) for attention in shared]

    def cached(
        self, tokens: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor], seen: Tensor, last: bool
    ) -> Tensor:
        """Logits of tokens [B, T] at positions [B, T], or of the last alone, over full attention to full caches.

        keys and values: [B, G, capacity, D] a layer, whose slots from `seen` [] on are written; as the compiler's
        eviction takes a decoder.
        """
        x, index = self.model.embed_tokens(tokens), torch.arange(tokens.shape[1], device=tokens.device) + seen
        earlier = torch.arange(keys[0].shape[2], device=tokens.device) <= index[:, None]  # [T, capacity]
        for layer, k_cache, v_cache in zip(self.model.layers, keys, values, strict=True):
            attention = layer.self_attn
            q, k, v = attention.heads_of(layer.input_layernorm(x))
            q, k = attention.rotate(q, positions[:, None]), attention.rotate(k, positions[:, None])
            shared = [attention.shared(c.index_copy_(2, index, new)) for c, new in ((k_cache, k), (v_cache, v))]
            x = layer.add(x, attention.join(F.scaled_dot_product_attention(q, *shared, attn_mask=earlier)))
        return self.lm_head(self.model.norm(x[:, -1:] if last else x))

    def extend_masked(
        self, tokens: Tensor, caches: list[Cache], masks: list[Tensor | None], policy: MaskedHeavyHitters, prompt: int
    ) -> tuple[Tensor, list[Cache], list[Tensor]]:
        """As `extend`, with nothing dropped: masks [B, H, n + t] of ones and zeros hide slots, and the next follow.

        prompt: the text's length before the first answer, of which the budgets are a share.
        """
        x, behind, following = self.model.embed_tokens(tokens), [], []
        for layer, cache, mask in zip(self.model.layers, caches, masks, strict=True):
            start = cache.keys.shape[2]
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
            out, cache = cached_attention(layer.self_attn, layer.input_layernorm(x), cache, positions, False, mask)
            mask, scores = policy.step(cache.scores, *policy.budgets(prompt))
            behind.append(cache._replace(scores=scores))
            following.append(mask)
            x = layer.add(x, out)
        return self.lm_head(self.model.norm(x)), behind, following

    def train_as_published(self) -> None:
        """Only low-rank updates, embeddings and norms learn ("LoRA+" of LongLoRA)."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad = "lora_" in name or "norm" in name or "embed_tokens" in name

    def merge(self) -> None:
        """Low-rank updates go into the weights that they update; the answers stay."""
        for layer in self.model.layers:
            for name in PROJECTIONS:
                projection = getattr(layer.self_attn, name)
                if isinstance(projection, LowRankLinear):
                    setattr(layer.self_attn, name, projection.merged())


@torch.fx.wrap
def attend(q: Tensor, k: Tensor, v: Tensor, pattern: str, ratio: float, sinks: int) -> Tensor:
    """Causal attention of rotated q, k and v [B, H, T, D] under one of the PATTERNS."""
    if pattern == "full":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    batch, heads, length, _ = q.shape
    group = group_length(length, ratio)
    if pattern == "shifted":
        # what rounds up going there rounds down coming back, as in the reference: equal for even groups
        q, k, v = (roll_half(x, -group // 2).unflatten(2, (-1, group)) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * groups, H, group, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).unflatten(0, (batch, -1))
        return roll_half(out.transpose(1, 2).flatten(2, 3), group // 2)
    seen = visible(heads, length, group, sinks if pattern == "sinks" else 0, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None])


def roll_half(x: Tensor, shift: int) -> Tensor:
    """The second half of the heads of [B, H, T, D] moved on by `shift` tokens, around the end."""
    still = x.shape[1] // 2
    return torch.cat([x[:, :still], x[:, still:].roll(shift, dims=2)], dim=1)


def visible(heads: int, length: int, group: int, sinks: int, device: torch.device) -> Tensor:
    """[H, T, T]: whether query n sees key m: not later, in its own segment or among the sinks.

    Segments of the first half of the heads begin at multiples of `group`, those of the others half a group later.
    """
    index = torch.arange(length, device=device)
    own = [index // group, (index + group - group // 2) // group]
    segment = torch.stack([own[head >= heads // 2] for head in range(heads)])
    together = (segment[:, :, None] == segment[:, None, :]) | (index < sinks)
    return together & (index[:, None] >= index)


def group_length(length: int, ratio: float) -> int:
    """Tokens of a group: that share of the text, which must consist of whole groups."""
    group = int(length * ratio) if isinstance(length, int) else length // round(1 / ratio)
    if isinstance(length, int) and (group == 0 or length % group):
        raise CompiledAttnError(
            "the text does not divide into groups",
            where="zoo.sinklora.attend",
            facts=f"it has {length} tokens, a group is {group}, {ratio} of it",
            do=f"pad it to a multiple of {round(1 / ratio)}",
        )
    return group


def cached_attention(
    attention: Attention, x: Tensor, cache: Cache, positions: Tensor, rolling: bool, mask: Tensor | None = None
) -> tuple[Tensor, Cache]:
    """What t new tokens x [B, t, C] attend to among the cached ones and themselves, and the cache with them and with
    the attention that every slot got added to its score.

    positions [t]: theirs in the text; rolling: slots' numbers are the positions; mask [B, G, n + t]: 0 hides a slot.
    """
    q, k, v = attention.heads_of(x)
    if rolling:
        cache = cache.appended(k, v, positions)
        slots = torch.arange(cache.keys.shape[2], device=x.device)
        q, keys = attention.rotate(q, slots[-x.shape[1] :]), attention.rotate(cache.keys, slots)
    else:
        q, k = attention.rotate(q, positions), attention.rotate(k, positions)
        cache = cache.appended(k, v, positions)
        keys = cache.keys
    logits = q @ attention.shared(keys).transpose(2, 3) * attention.size**-0.5
    late = torch.ones(logits.shape[2:], dtype=torch.bool, device=x.device).triu(1 + keys.shape[2] - x.shape[1])
    hidden = late if mask is None else late | (attention.shared(mask[..., None])[..., 0][:, :, None] == 0)
    weights = torch.softmax(logits.masked_fill(hidden, torch.finfo(logits.dtype).min).float(), dim=3)
    out = attention.join(weights.to(q.dtype) @ attention.shared(cache.values))
    return out, cache.scored(weights.sum(2).unflatten(1, (attention.groups, -1)).sum(2))


def merged(weights: Mapping[str, Tensor], updates: Mapping[str, Tensor], alpha: float = 16.0) -> dict[str, Tensor]:
    """A checkpoint with low-rank updates, and embeddings and norms trained beside them, in place of what they change.

    updates: PEFT's keys, `base_model.model.<key>.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank], and whole
    parameters under their own keys or under `base_model.model.`.
    """
    given = {key.removeprefix("base_model.model."): value for key, value in updates.items()}
    out = {**weights, **{key: value for key, value in given.items() if "lora_" not in key}}
    for key, down in given.items():
        if key.endswith(".lora_A.weight"):
            base = key.removesuffix("lora_A.weight")
            out[base + "weight"] = out[base + "weight"] + alpha / down.shape[0] * given[base + "lora_B.weight"] @ down
    return out


def _tokens(config: Any, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(config.vocabulary, (batch, 16), generator=generator),)


def _sizes() -> Iterable[tuple[str, Config]]:
    yield "llama2_7b", Config(epsilon=1e-5)
    yield "llama2_13b", Config(width=5120, hidden=13824, depth=40, heads=40, epsilon=1e-5)
    yield "llama2_70b", Config(width=8192, hidden=28672, depth=80, heads=64, groups=8, epsilon=1e-5)


# The hosts that LongLoRA trains; the paper's own weights are not published, so no counts are given.
PAPER = Paper(
    title="SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
    year=2024,
    link="https://arxiv.org/abs/2406.05678",
    reference="Dexter-GT-86/SinkLoRA@a7410943a2ce95d6811a904f941d9e436f1b4df1",
    model=SinkLoRA,
    variants=dict(_sizes()),
    tiny=Config(vocabulary=40, width=16, hidden=24, depth=2, heads=4, groups=2, pattern="sinks", sinks=1),
    published={},
    keys="transformers' LLaMA: model.embed_tokens, model.layers.i.{self_attn.{q,k,v,o}_proj,mlp.{gate,up,down}_proj,"
    "input_layernorm,post_attention_layernorm}, model.norm, lm_head; low-rank updates as PEFT's lora_A and lora_B",
    inputs=_tokens,
)
