"""Runs a golden case of SinkLoRA: its two grouped attentions, and the caches that drop."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compiled_attn import zoo
from compiled_attn.zoo.layers.eviction import HeavyHitters, MaskedHeavyHitters, SinkAndRecent, SnapKV
from compiled_attn.zoo.sinklora import Config, SinkLoRA


def run(case: Mapping[str, Any], weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    given = case["config"]
    if "max_capacity_prompt" in given:
        return snapped(given, inputs)
    pattern = "full"
    if "group_size_ratio" in given or "group_size" in given or "s2attn" in case.get("variant", ""):
        noflash = "noflash" in case.get("source", "") + case.get("variant", "")
        pattern = "shifted" if noflash else "segments"
    model = SinkLoRA(
        Config(
            vocabulary=given["vocab_size"],
            width=given["hidden_size"],
            hidden=given["intermediate_size"],
            depth=given["num_hidden_layers"],
            heads=given["num_attention_heads"],
            groups=given.get("num_key_value_heads") or 0,
            epsilon=given.get("rms_norm_eps", 1e-6),
            theta=given.get("rope_theta", 10000.0),
            rope_factor=(given.get("rope_scaling") or {}).get("factor", 1.0),
            pattern=pattern,
            ratio=given.get("group_size_ratio", 0.25),
        )
    ).eval()
    zoo.load_checkpoint(model, weights)
    tokens = inputs["tokens"]
    with torch.no_grad():
        if pattern != "full":
            return grouped(model, tokens)
        if "heavy_ratio" in given or "heavy_budget" in given:
            return masked(model, tokens, given)
        if "start_size" in given:
            return streamed(model, tokens, given)
        return dropped(model, tokens, given)


def grouped(model: SinkLoRA, tokens: Tensor) -> dict[str, Tensor]:
    """Logits, and the stream behind layer i (`hidden_after_layer<i>`)."""
    outputs: dict[str, Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _layer, _given, out, i=i: outputs.update({f"hidden_after_layer{i}": out}))
    outputs["logits"] = model(tokens)
    return outputs


def dropped(model: SinkLoRA, tokens: Tensor, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """H2O: a prompt at once, then token by token; without a batch dimension but for the prompt's logits."""
    policy = HeavyHitters(given["hh_size"], given["recent_size"], rolling=given.get("rolling_positions", False))
    prompt = given["prefill"]
    first, caches = model.extend(tokens[:, :prompt], model.caches(1), policy, 0)
    outputs, logits = {"prefill_logits": first}, [first[0, -1]]
    outputs |= {"kept_after_prefill": stacked(caches, "positions"), "score_after_prefill": stacked(caches, "scores")}
    for at in range(prompt, tokens.shape[1]):
        out, caches = model.extend(tokens[:, at : at + 1], caches, policy, at)
        logits.append(out[0, -1])
    finals = {"kept": "positions", "score": "scores", "k_cache": "keys", "v_cache": "values"}
    outputs |= {f"{name}_final": stacked(caches, field) for name, field in finals.items()}
    return outputs | {"logits": torch.stack(logits)}


def streamed(model: SinkLoRA, tokens: Tensor, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """StreamingLLM: one token at a time."""
    policy = SinkAndRecent(given["start_size"], given["recent_size"])
    caches, logits = model.caches(1), []
    for at in range(tokens.shape[1]):
        out, caches = model.extend(tokens[:, at : at + 1], caches, policy, at)
        logits.append(out[0, -1])
    finals = {"kept": "positions", "k_cache": "keys", "v_cache": "values"}
    return {"logits": torch.stack(logits)} | {f"{k}_final": stacked(caches, field) for k, field in finals.items()}


def masked(model: SinkLoRA, tokens: Tensor, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """H2O's simulation: masks [layer, head, keys + 1] for the step to come."""
    policy, prompt = MaskedHeavyHitters(given["heavy_ratio"], given["recent_ratio"]), given["prefill"]
    nothing = [None] * len(model.model.layers)
    out, caches, masks = model.extend_masked(tokens[:, :prompt], model.caches(1), nothing, policy, prompt)
    outputs, logits = {"prefill_logits": out, "mask_after_prefill": torch.stack(masks)[:, 0]}, [out[0, -1]]
    outputs["score_after_prefill"] = stacked(caches, "scores")
    for at in range(prompt, tokens.shape[1]):
        out, caches, masks = model.extend_masked(tokens[:, at : at + 1], caches, masks, policy, prompt)
        logits.append(out[0, -1])
    outputs |= {"mask_final": torch.stack(masks)[:, 0], "score_final": stacked(caches, "scores")}
    return outputs | {"logits": torch.stack(logits)}


def snapped(given: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SnapKV of given queries, keys and values: no network."""
    policy = SnapKV(given["window_size"], given["max_capacity_prompt"], given["kernel_size"], given["pooling"])
    q, k, v = inputs["query"] * given.get("query_multiplier", 1.0), inputs["key"], inputs["value"]
    index = policy.keep(q, k)
    if index is None:
        index = torch.arange(k.shape[2]).expand(*k.shape[:2], -1)
    wide = index[..., None].expand(*index.shape, k.shape[3])
    return {"k": k.gather(2, wide), "v": v.gather(2, wide), "positions": index, "pooled_score": policy.scores(q, k)}


def stacked(caches: list[Any], field: str) -> Tensor:
    return torch.stack([getattr(cache, field)[0] for cache in caches])
