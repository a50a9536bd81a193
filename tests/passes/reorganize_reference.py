"""The rule of token reorganization in plain eager PyTorch, on stock Vision Transformers of timm and transformers.

Nothing here knows the compiler. `reorganized` runs a model's own modules block by block, with the probabilities written
out; `masked` runs a model untouched, hiding from later attention the patches that were left out, which is the same for
what the class token says where nothing is fused.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Seen:
    """What an attention computed: q, k [B, H, N, D], probabilities [B, H, N, N], bias or None."""

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    bias: torch.Tensor | None
    probabilities: torch.Tensor


def reorganized(model, pictures, *, keep_rate=0.7, at=(3, 6, 9), fuse=True, score="class"):
    """(outputs as a list of tensors, kept patches of each stage: ascending, [B, K])."""
    kind = next(k for k in (Timm, Dinov3, Huggingface) if k.accepts(model))(model, pictures)
    x = kind.tokens
    batch, count, _ = x.shape
    prefix = kind.prefix
    rates = keep_rate if isinstance(keep_rate, tuple) else (keep_rate,) * len(at)
    n = count - prefix
    positions = torch.arange(count).expand(batch, -1)  # in the original sequence; `count` for a fused token
    kept = []
    for i, block in enumerate(kind.blocks):
        x, seen = kind.attend(block, x, positions)
        rate = dict(zip(at, rates, strict=True)).get(i, 1)
        left = x.shape[1] - prefix
        keep = math.ceil(rate * left)
        if rate < 1 and keep < left:
            ranks = SCORES[score](seen, x)[:, prefix:].float()
            ranks = ranks / ranks.sum(1, keepdim=True) if score.endswith("norm") else ranks
            x, positions = select(x, positions, ranks, keep, prefix, fuse, count)
            own = positions[:, prefix : prefix + keep] - prefix
            kept.append(own.clamp(max=n).sort(1).values)
        x = kind.feed(block, x)
    return kind.finish(x), kept


def mean_query(seen, _):
    logits = seen.q.mean(2, keepdim=True) @ seen.k.transpose(-2, -1) * seen.scale
    logits = logits if seen.bias is None else logits + seen.bias.mean(-2, keepdim=True)
    return logits.softmax(-1)[:, :, 0].mean(1)


SCORES = {
    "class": lambda seen, _: seen.probabilities[:, :, 0].mean(1),
    "mean-query": mean_query,
    "key-norm": lambda seen, _: seen.k.norm(dim=-1).mean(1),
    "token-norm": lambda _, x: x.norm(dim=-1),
}


def select(x, positions, score, keep, prefix, fuse, count):
    index = score.topk(keep, 1).indices
    rest = x[:, prefix:]
    parts = [x[:, :prefix], rest.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))]
    places = [positions[:, :prefix], positions[:, prefix:].gather(1, index)]
    if fuse:
        dropped = torch.ones_like(score).scatter(1, index, 0.0)
        parts.append(((score * dropped).unsqueeze(2) * rest.float()).sum(1, keepdim=True).to(x.dtype))
        places.append(torch.full((x.shape[0], 1), count))
    return torch.cat(parts, 1), torch.cat(places, 1)


def softmax_attention(q, k, v, scale, bias=None):
    scores = q @ k.transpose(-2, -1) * scale
    probabilities = (scores if bias is None else scores + bias).softmax(-1)
    return (probabilities @ v).transpose(1, 2).flatten(2), Seen(q, k, scale, bias, probabilities)


def turn(x):
    """timm's interleaved quarter turn: (a, b) -> (-b, a)."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)


class Timm:
    """VisionTransformer, Beit, and Eva of timm."""

    @staticmethod
    def accepts(model):
        return type(model).__module__.startswith("timm.")

    def __init__(self, model, pictures):
        self.model = model
        x = model.patch_embed(pictures)
        name = type(model).__name__
        self.table = None  # rotary table [n, 2 D]: sines, cosines
        if name == "Beit":
            x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x], 1)
            x = x if model.pos_embed is None else x + model.pos_embed
        elif name == "Eva":
            x, self.table = model._pos_embed(x)
        else:
            x = model.norm_pre(model._pos_embed(x))
        self.tokens, self.blocks = x, model.blocks
        self.prefix = getattr(model, "num_prefix_tokens", 1)
        self.name = name

    def attend(self, block, x, positions):
        attn, h = block.attn, block.norm1(x)
        batch, count, _ = h.shape
        bias = attn.qkv.bias
        if bias is None and getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        qkv = F.linear(h, attn.qkv.weight, bias)
        q, k, v = qkv.view(batch, count, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        if getattr(attn, "q_norm", None) is not None:
            q, k = attn.q_norm(q), attn.k_norm(k)
        if self.table is not None:
            q, k = (self.rotate(a, positions, v) for a in (q, k))
        out, seen = softmax_attention(q, k, v, attn.scale, self.bias(attn, positions))
        out = attn.proj(attn.norm(out) if getattr(attn, "norm", None) is not None else out)
        for scale in ("ls1", "gamma_1"):
            factor = getattr(block, scale, None)
            if factor is not None:
                out = factor(out) if callable(factor) else factor * out
        return x + out, seen

    def rotate(self, a, positions, like):
        sine, cosine = self.table.chunk(2, -1)
        sine = torch.cat([sine, torch.zeros_like(sine[:1])])  # a fused token is not rotated
        cosine = torch.cat([cosine, torch.ones_like(cosine[:1])])
        where = positions[:, self.prefix :] - self.prefix
        rows = a[:, :, self.prefix :]
        rows = rows * cosine[where].unsqueeze(1) + turn(rows) * sine[where].unsqueeze(1)
        return torch.cat([a[:, :, : self.prefix], rows], 2).type_as(like)

    def bias(self, attn, positions):
        if getattr(attn, "relative_position_bias_table", None) is None:
            return None
        table = F.pad(attn._get_rel_pos_bias()[0], (0, 1, 0, 1))  # [H, N + 1, N + 1]: nothing added for a fused token
        return table[:, positions.unsqueeze(2), positions.unsqueeze(1)].transpose(0, 1)

    def feed(self, block, x):
        out = block.mlp(block.norm2(x))
        for scale in ("ls2", "gamma_2"):
            factor = getattr(block, scale, None)
            if factor is not None:
                out = factor(out) if callable(factor) else factor * out
        return x + out

    def finish(self, x):
        return [self.model.forward_head(self.model.norm(x))]


class Huggingface:
    """ViTModel, DeiTModel, Dinov2Model of transformers: last hidden state and pooled output."""

    @staticmethod
    def accepts(model):
        return type(model).__module__.startswith("transformers.")

    def __init__(self, model, pictures):
        self.model = model
        self.tokens = model.embeddings(pictures)
        self.blocks = model.encoder.layer if hasattr(model, "encoder") else model.layers
        self.prefix = 2 if hasattr(model.embeddings, "distillation_token") else 1

    def attend(self, block, x, positions):
        norm = block.norm1 if hasattr(block, "norm1") else block.layernorm_before
        attn, h = block.attention, norm(x)
        batch, count, width = h.shape
        heads = self.model.config.num_attention_heads
        q, k, v = (p(h).view(batch, count, heads, -1).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = (self.rotate(a, positions) for a in (q, k))
        out, seen = softmax_attention(q, k, v, (width // heads) ** -0.5)
        out = attn.o_proj(out)
        return x + (block.layer_scale1(out) if hasattr(block, "layer_scale1") else out), seen

    def rotate(self, a, _):
        return a

    def feed(self, block, x):
        if hasattr(block, "norm2"):
            return x + block.layer_scale2(block.mlp(block.norm2(x)))
        return x + block.mlp(block.layernorm_after(x))

    def finish(self, x):
        x = self.model.layernorm(x)
        pooler = getattr(self.model, "pooler", None)
        return [x, x[:, 0] if pooler is None else pooler(x)]


class Dinov3(Huggingface):
    """DINOv3ViTModel: registers, and rotary tables [n, D] for the patches alone."""

    @staticmethod
    def accepts(model):
        return type(model).__name__ == "DINOv3ViTModel"

    def __init__(self, model, pictures):
        self.model = model
        self.tokens = model.embeddings(pictures)
        self.blocks = model.model.layer
        self.prefix = 1 + model.config.num_register_tokens
        cosine, sine = model.rope_embeddings(pictures)
        self.cosine = torch.cat([cosine, torch.ones_like(cosine[:1])])
        self.sine = torch.cat([sine, torch.zeros_like(sine[:1])])

    def rotate(self, a, positions):
        where = positions[:, self.prefix :] - self.prefix
        rows = a[:, :, self.prefix :]
        first, second = rows.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        rows = rows * self.cosine[where].unsqueeze(1) + turned * self.sine[where].unsqueeze(1)
        return torch.cat([a[:, :, : self.prefix], rows], 2)

    def finish(self, x):
        x = self.model.norm(x)
        return [x, x[:, 0]]


def masked(model, pictures, *, keep_rate=0.7, at=(3, 6, 9), prefix=1):
    """A model's own output where later attention does not see the patches that were left out (nothing fused).

    Serves any model that calls F.scaled_dot_product_attention once a block; only what the class token says is right.
    """
    real = F.scaled_dot_product_attention
    state = {"block": 0, "gone": None}

    def attention(q, k, v, attn_mask=None, scale=None, **_):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        scores = q @ k.transpose(-2, -1) * scale
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        if state["gone"] is not None:
            scores = scores.masked_fill(state["gone"][:, None, None], -math.inf)
        probabilities = scores.softmax(-1)
        if state["block"] in at and q.shape[-2] == k.shape[-2]:
            gone = state["gone"]
            gone = torch.zeros(q.shape[0], k.shape[-2], dtype=torch.bool) if gone is None else gone
            score = probabilities[:, :, 0].mean(1).masked_fill(gone, -1)[:, prefix:]
            left = int((~gone[0]).sum()) - prefix
            keep = score.topk(math.ceil(keep_rate * left), 1).indices + prefix
            gone = torch.ones_like(gone).scatter(1, keep, False)
            gone[:, :prefix] = False
            state["gone"] = gone
        state["block"] += 1
        return probabilities @ v

    F.scaled_dot_product_attention = attention
    try:
        with torch.no_grad():
            return model(pictures)
    finally:
        F.scaled_dot_product_attention = real
