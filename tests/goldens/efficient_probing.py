"""Runs a golden case of efficient probing: a ViT with its probe, or probes alone on given tokens."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from compiled_attn import zoo
from compiled_attn.zoo import efficient_probing as ep

BUILDERS = {
    "vit_tiny_patch16": ep.TI, "vit_small_patch16": ep.S, "vit_base_patch16": ep.B,
    "vit_large_patch16": ep.L, "vit_huge_patch14": ep.H,
}  # fmt: skip
LINEAR = {"cls": "cls", "gap": "mean", "pos": "mean"}


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits, pooled and tokens of a model; logits_<name> and pooled_<name> of each probe in a dictionary of them."""
    given = case["config"]
    tokens = next(iter(inputs.values()))
    if tokens.ndim == 4:
        model = vit(given, weights, tokens)
        load(model, weights)
        seen = model.tokens(tokens)
        return {"logits": model.head(seen), "pooled": model.head[0](seen), "tokens": seen}
    width, classes = tokens.shape[2], given.get("nb_classes", 1000)
    names = list(dict.fromkeys(key.partition(".")[0] for key in weights))
    kind = {name: given["cls_features"] if name == "head" else name for name in names}
    side = round((tokens.shape[1] - (given.get("abmilp_content") != "patch")) ** 0.5)
    probes = nn.ModuleDict(
        {n: ep.probe(width, classes, head(given, kind[n], weights, f"{n}.", side)) for n in names}
    ).eval()
    load(probes, weights)
    outputs: dict[str, Tensor] = {}
    for name, probe in probes.items():
        pooled = probe[0](tokens)
        suffix = "" if name == "head" else f"_{name}"
        outputs |= {f"pooled{suffix}": pooled, f"logits{suffix}": probe[1:](pooled)}
    return outputs


def vit(given: Mapping[str, Any], weights: Mapping[str, Tensor], pictures: Tensor) -> ep.ProbedViT:
    base = BUILDERS[given.get("builder", given.get("model", "vit_base_patch16"))]
    features = given.get("cls_features", "cls")
    size = given.get("img_size", 224)
    side = size // base.patch_size
    config = replace(
        base,
        img_size=size,
        in_chans=pictures.shape[1],
        classes=given.get("nb_classes", 1000),
        head=head(given, "linear" if features in LINEAR else features, weights, "head.", side),
        tokens=LINEAR.get(features, "all" if features.endswith("_all") else "patches"),
    )
    return ep.ProbedViT(config).eval()


def head(given: Mapping[str, Any], features: str, weights: Mapping[str, Tensor], prefix: str, side: int) -> ep.Head:
    positions = weights.get(f"{prefix}0.pos_embed")
    return ep.Head(
        pooling=features.removesuffix("_all"),
        queries=given.get("ep_queries", 32),
        d_out=given.get("d_out", 1),
        heads=given.get("num_heads", 16),
        tokens=196 if positions is None else positions.shape[0] - 1,
        attended=given.get("abmilp_sa", "both"),
        activation=given.get("abmilp_act", "tanh"),
        depth=given.get("abmilp_depth", 2),
        positions=side if given.get("abmilp_cond") == "pe" else 0,
        patches_only=given.get("abmilp_content", "all") == "patch",
    )


def load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    counts = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    zoo.load_checkpoint(model, {**counts, **weights})
