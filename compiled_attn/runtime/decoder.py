"""A decoder as a step whose caches are arguments: what `EvictKV` and generation start from.

    logits = Step(model, capacity)(tokens [B, T], positions [B, T], state)     state: {"keys", "values", "seen"}

Caches are full static ones, [B, G, capacity, D] a layer, and the step writes into them: no module keeps a conversation.
Decoders of transformers are taken as they are; others, the zoo's among them, are `Cached`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compiled_attn.ir.errors import CaptureError
from compiled_attn.ir.program import Program
from compiled_attn.runtime.capture import capture

State = dict[str, Any]


@runtime_checkable
class Cached(Protocol):
    """A decoder of one's own, over caches that are given to it."""

    def cache_shapes(self) -> list[tuple[int, int, int]]:
        """Key heads, key width and value width of every layer."""

    def cached(
        self, tokens: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor], seen: Tensor, last: bool
    ) -> Tensor:
        """Logits [B, T, vocabulary] of tokens [B, T] at positions [B, T], or those of the last alone, [B, 1, ...].

        keys and values: [B, G, capacity, D] a layer, whose slots from `seen` [] on it writes.
        """


class Step(nn.Module):
    """Tokens [B, T] at positions [B, T] (-1: none, a place filled up) to logits [B, T, vocabulary], or the last ones.

    state: keys and values, lists of [B, G, capacity, D] a layer, and `seen` [], how many tokens came before; all are
    written into. last: only the logits of the last token, [B, 1, vocabulary].
    """

    def __init__(self, model: nn.Module, capacity: int, *, last: bool = False) -> None:
        super().__init__()
        self.model = model
        self.capacity = capacity
        self.last = last
        self.shapes = cache_shapes(model)

    def forward(self, tokens: Tensor, positions: Tensor, state: State) -> Tensor:
        places = positions.clamp(min=0)
        if isinstance(self.model, Cached):
            logits = self.model.cached(tokens, places, state["keys"], state["values"], state["seen"], self.last)
        else:
            logits = self.model(
                input_ids=tokens,
                position_ids=places,
                past_key_values=self._cache(state),
                use_cache=True,
                logits_to_keep=1 if self.last else 0,
            ).logits
        state["seen"].add_(tokens.shape[1])
        return logits

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def fresh(self, batch: int) -> State:
        """Empty caches for `batch` conversations."""
        weight = next(self.model.parameters())

        def empty(width: int, heads: int) -> Tensor:
            return torch.zeros(batch, heads, self.capacity, width, dtype=weight.dtype, device=weight.device)

        return {
            "keys": [empty(key, heads) for heads, key, _ in self.shapes],
            "values": [empty(value, heads) for heads, _, value in self.shapes],
            "seen": torch.zeros((), dtype=torch.int64, device=weight.device),
        }

    def _cache(self, state: State) -> Any:
        """transformers' cache of full static layers, over the tensors of the state."""
        from transformers.cache_utils import Cache, StaticLayer

        layers: list[Any] = []
        for keys, values in zip(state["keys"], state["values"], strict=True):
            layer = StaticLayer(self.capacity)
            layer.keys, layer.values = keys, values
            layer.cumulative_length = state["seen"].clone()
            layer.dtype, layer.device = keys.dtype, keys.device
            layer.batch_size, layer.num_heads = keys.shape[:2]
            layer.k_head_dim, layer.v_head_dim = keys.shape[3], values.shape[3]
            layer.is_initialized = True
            layers.append(layer)
        return Cache(layers=layers)


def cache_shapes(model: nn.Module) -> list[tuple[int, int, int]]:
    """Key heads, key width and value width of every layer: by the decoder itself, or seen in the cache of one token."""
    if isinstance(model, Cached):
        return model.cache_shapes()
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_hidden_layers"):
        raise CaptureError(
            f"{type(model).__name__} is no decoder of transformers",
            facts="it has no config with num_hidden_layers, as transformers' decoders have",
            do="give it cache_shapes() and cached(...), as runtime.decoder.Cached says",
        )
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    training = model.training
    try:
        with torch.no_grad():
            cache = model.eval()(input_ids=token, use_cache=True).past_key_values
    finally:
        model.train(training)
    layers: Any = getattr(cache, "layers", ())
    found: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not found or any(k is None or v is None or k.dim() != 4 for k, v in found):
        raise CaptureError(
            f"{type(model).__name__} keeps no keys and values for every layer",
            facts=f"one token leaves a {type(cache).__name__} of {len(found)} layers, some without them",
            do="give it cache_shapes() and cached(...), as runtime.decoder.Cached says",
        )
    return [(k.shape[1], k.shape[3], v.shape[3]) for k, v in found]


def captured(model: nn.Module, capacity: int, *, prompt: bool, batch: int | None = None, last: bool = False) -> Program:
    """A decoder of transformers as a Program: of a prompt of 1 to `capacity` tokens, or of a step of one token.

    batch: texts at once, None: any number.  last: only the logits of the last token are given.
    """
    step = Step(model, capacity, last=last)
    args, shapes = step_inputs(step, prompt=prompt, batch=batch)
    return capture(step, args, dynamic_shapes=shapes)


def step_inputs(step: Step, *, prompt: bool, batch: int | None = None) -> tuple[tuple[Any, ...], Any]:
    """What `capture`, `compile` and `export` take: example arguments, and which of their dimensions vary."""
    texts, count = batch or 2, min(3, step.capacity) if prompt else 1
    tokens = torch.zeros(texts, count, dtype=torch.int64, device=step.device)
    positions = torch.arange(count, device=step.device).expand(texts, count).clone()
    first: dict[int, Any] = {} if batch else {0: "batch"}
    second: dict[int, Any] = {1: torch.export.Dim("tokens", min=1, max=step.capacity)} if prompt else {}
    caches = [first or None] * len(step.shapes)
    given = first | second or None
    shapes = {
        "tokens": given,
        "positions": given,
        "state": {"keys": list(caches), "values": list(caches), "seen": None},
    }
    return (tokens, positions, step.fresh(texts)), (shapes if given else None)
