"""The rule of token pruning in plain eager PyTorch, picture by picture, on stock Vision Transformers.

Nothing here knows the compiler: a model's own modules run block by block on the tokens of one picture that are left.
"""

import torch
from reorganize_reference import SCORES, Dinov3, Huggingface, Timm


def pruned(model, pictures, **options):
    """(outputs as a list of tensors, [B, N] masks of each stage); outputs [B, N, C] have zeros at what was left out."""
    each = [pruned_one(model, picture.unsqueeze(0), **options) for picture in pictures]
    outputs = [torch.cat(parts) for parts in zip(*(outs for outs, _ in each), strict=True)]
    return outputs, [torch.stack(masks) for masks in zip(*(masks for _, masks in each), strict=True)]


def pruned_one(model, picture, *, at, threshold=None, mass=None, keep_at_least=1, keep_at_most=None, score="class"):
    kind = next(k for k in (Timm, Dinov3, Huggingface) if k.accepts(model))(model, picture)
    x, prefix = kind.tokens, kind.prefix
    count = x.shape[1]
    positions = torch.arange(count).unsqueeze(0)
    limit = threshold if mass is None else mass
    limits = dict(zip(at, limit if isinstance(limit, tuple) else (limit,) * len(at), strict=True))
    masks = []
    for i, block in enumerate(kind.blocks):
        x, seen = kind.attend(block, x, positions)
        if i in limits:
            ranks = SCORES[score](seen, x)[0, prefix:].float()
            ranks = ranks / ranks.sum() if score.endswith("norm") else ranks
            rule = by_threshold if mass is None else by_mass
            stay = chosen(ranks, rule(ranks, limits[i]), keep_at_least, keep_at_most)
            stay = torch.cat([torch.ones(prefix, dtype=torch.bool), stay])
            x, positions = x[:, stay], positions[:, stay]
            masks.append(torch.zeros(count, dtype=torch.bool).index_fill(0, positions[0], True))
        x = kind.feed(block, x)
    outputs = kind.finish(x)
    return [spread(out, positions[0], count) if out.dim() == 3 else out for out in outputs], masks


def by_threshold(scores, limit):
    return scores >= limit


def by_mass(scores, limit):
    order = scores.argsort(descending=True, stable=True)
    stay = torch.zeros(len(scores), dtype=torch.bool)
    reached = 0.0
    for j in order.tolist():
        if reached >= limit * scores.sum():
            break
        stay[j] = True
        reached += scores[j]
    return stay


def chosen(scores, stay, least, most):
    order = scores.argsort(descending=True, stable=True)
    stay[order[:least]] = True
    if most is not None:
        stay[order[most:]] = False
    return stay


def spread(out, positions, count):
    return torch.zeros(1, count, out.shape[2]).index_copy(1, positions, out)
