"""Rewrites a decoder's step from full caches to slots of a fixed number, which a policy keeps filled.

    c = index_copy(%keys [B, G, 4096, D], 2, i, k)      at = argmin(%positions)              a free slot of 513
    d = index_copy(%values, 2, i, v)                    c = cache_append(%keys [B, G, 513, D], k, at)
    o = sdpa(q, repeat(c), repeat(d), mask)        ->   o, mass = cached_attention(q, c, d, p, queries)
                                                        p = cache_evict(p, priority(mass, ...), budget=512)

The caches stay the arguments that they are, smaller; what the policy needs beside them, each slot's position and score,
becomes the new keyword argument `slots`, which the program writes into as well. With a budget of at least the length
nothing is lost, and the numbers are the full cache's.

Never does: change a program one of whose attentions over a cache it can not rewrite. A PassError then says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes, place, user_line
from compiled_attn.ir.program import PROVENANCE, Edit, Program
from compiled_attn.passes.evict_match import SDPA, CachedLayer, Unlike, cached_layer
from compiled_attn.passes.evict_policies import Policy, SinkAndRecent
from compiled_attn.passes.evict_step import Layer, New, Rule, decode, prompt
from compiled_attn.passes.evict_turn import Turn, turns_of, with_values

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

ARGUMENT = "slots"


@dataclass(frozen=True)
class EvictKV:
    """Caches of `budget` tokens under `policy`, in a captured prompt or decode step.

    budget: tokens that each key head keeps; a tuple gives one a layer, in the order of the layers (`pyramid`).
    positions: name of the integer argument [B, T] that holds the new tokens' positions, -1 for places that only fill a
        batch up; None: they count on from the number that the program counts its tokens with.
    The program must hold one token a call (a decode step, written in place), or any number (a prompt).
    """

    policy: Policy = field(default_factory=SinkAndRecent)
    budget: int | tuple[int, ...] = 512
    positions: str | None = None

    name: ClassVar[str] = "evict-kv"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.budget, int):
            object.__setattr__(self, "budget", tuple(self.budget))
        if min(self.budgets(1), default=0) < 1:
            raise PassError(
                f"budget {self.budget} keeps no token", facts="every layer keeps 1 or more", do="for example budget=512"
            )

    def budgets(self, layers: int) -> tuple[int, ...]:
        return self.budget if isinstance(self.budget, tuple) else (self.budget,) * layers

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        edit = program.edit()
        layers = self._layers(program, edit, notes)
        if not layers:
            return program
        budgets = self._checked_budgets(layers)
        state = _State(program, edit, layers, budgets, self.policy.remembers)
        for number, (layer, budget) in enumerate(zip(layers, budgets, strict=True)):
            capacity = layer.key_cache.meta["val"].shape[2]
            state.shrink(number)
            self._rewrite(edit, state, number, layer, budget)
            notes.did(
                layer.attention, self.name, f"{capacity} -> {budget} tokens", f"approximate, {self.policy!r}".strip()
            )
        return state.finish(self.name)

    def _layers(self, program: Program, edit: Edit, notes: Notes) -> list[CachedLayer]:
        found, lost = [], []
        for node in edit.graph.nodes:
            if node.op == "call_function" and node.target is SDPA:
                try:
                    found.append(cached_layer(program, edit.graph, node))
                except Unlike as unlike:
                    notes.miss(node, self.name, unlike.because)
                    lost.append((node, unlike.because))
        written = [n for n in edit.graph.nodes if n.target is torch.ops.aten.index_copy.default]
        if lost and (found or written):
            node, because = lost[0]
            raise PassError(
                f"{self.name} can not rewrite the attention of {place(node)}",
                where=user_line(node) or str(node.format_node()),
                facts=because,
                do="capture the step with static caches of full length as arguments, and no mask of your own "
                "(runtime.decoder.Step does, for decoders of transformers)",
            )
        if written and not found:
            raise PassError(
                f"{self.name} finds no attention over the caches that are written",
                where=user_line(written[0]) or str(written[0].format_node()),
                facts="none that reads them is scaled_dot_product_attention, nor was recognised as such "
                "(a soft cap on the scores is one reason)",
                do="load the decoder with attn_implementation='sdpa', where it has that form",
            )
        if not found:
            notes.miss("graph", self.name, "no attention reads a cache that is an argument and written back")
        return found

    def _checked_budgets(self, layers: Sequence[CachedLayer]) -> tuple[int, ...]:
        budgets = self.budgets(len(layers))
        if len(budgets) != len(layers):
            raise PassError(
                f"{self.name} is given {len(budgets)} budgets",
                where=place(layers[-1].attention),
                facts=f"the program has {len(layers)} layers with a cache",
                do="give one budget for all, or one a layer",
            )
        return budgets

    def _rewrite(self, edit: Edit, state: _State, number: int, layer: CachedLayer, budget: int) -> None:
        """Puts the traced step in the attention's place, and its new state in that of the cache writes."""
        rule = Rule(self.policy, budget, layer.scale, layer.window)
        queries: Any = layer.attention.args[0]
        keys = layer.keys
        turns: list[tuple[str, Turn]] = []
        free: list[fx.Node] = []
        if self.policy.turns_by_place:
            source, inputs = self._positions_argument(edit, layer), {n.name for n in edit.program.inputs}
            turn, queries, free = turns_of(queries, source, inputs)
            turns.append(("turn_query", turn))
            turn, keys, more = turns_of(keys, source, inputs)
            turns.append(("turn_key", turn))
            free = list(dict.fromkeys([*free, *more]))
        new, old = (queries, keys, layer.values, self._positions_node(edit, layer)), state.of(number)
        count = layer.keys.meta["val"].shape[2]
        step = decode if isinstance(count, int) and count == 1 else prompt

        def function(*values: Any) -> Any:
            tensors, rest = values[: 4 + len(old)], dict(zip(free, values[4 + len(old) :], strict=True))
            bound: dict[str, Any] = {name: with_values(turn, rest) for name, turn in turns}
            caches = Layer(*tensors[4:], *([None] * (8 - len(tensors))))
            out, after = step(caches, New(*tensors[:4]), replace(rule, **bound))
            return (out, *(t for t in after if t is not None))

        out, *after = insert(edit, layer.attention, function, [*new, *old, *free])
        edit.replace(layer.attention, out)
        state.set(number, after)

    def _positions_argument(self, edit: Edit, layer: CachedLayer) -> fx.Node:
        node = next((n for n in edit.graph.nodes if n.op == "placeholder" and n.name == self.positions), None)
        if node is None or node.meta["val"].dtype != torch.int64 or node.meta["val"].dim() != 2:
            names = [n.name for n in edit.program.inputs]
            raise PassError(
                f"{self.name} needs an argument with the positions of the new tokens",
                where=place(layer.attention),
                facts=f"positions={self.positions!r}, the arguments are {', '.join(names)}",
                do="name an int64 argument [B, T] that the model turns its queries and keys by",
            )
        return node

    def _positions_node(self, edit: Edit, layer: CachedLayer) -> fx.Node:
        """The new tokens' positions [B, T]."""
        if self.positions is not None:
            return self._positions_argument(edit, layer)

        def function(index: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor]:
            return (index.unsqueeze(0).expand(rows.shape[0], -1),)

        return insert(edit, layer.attention, function, [layer.index, layer.keys])[0]


def insert(edit: Edit, before: fx.Node, function: Any, nodes: Sequence[Any]) -> list[fx.Node]:
    """The ATen graph of `function` on the nodes' values, in front of `before`; the nodes of the tuple that it gives."""
    traced = _torch.trace(function, tuple(n.meta["val"] for n in nodes), edit.program.fake_mode)
    table: dict[fx.Node, Any] = dict(zip([n for n in traced.graph.nodes if n.op == "placeholder"], nodes, strict=True))
    with edit.graph.inserting_before(before):
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                new = edit.graph.node_copy(inner, lambda n: table[n])
                new.meta = {key: before.meta[key] for key in PROVENANCE if key in before.meta}
                new.meta["val"] = inner.meta["val"]
                table[inner] = new
            elif inner.op == "get_attr":
                table[inner] = edit.constant(f"{before.name}_{inner.target}", getattr(traced, inner.target))
    given: Any = traced.graph.output_node().args[0]
    return [table[n] for n in given]


class _State:
    """The arguments that the step writes into: caches that shrink, positions and scores that are new."""

    def __init__(
        self, program: Program, edit: Edit, layers: list[CachedLayer], budgets: tuple[int, ...], scored: bool
    ) -> None:
        self.program, self.edit, self.layers, self.scored = program, edit, layers, scored
        self.slots = [b + 1 for b in budgets]
        self.new: dict[str, list[fx.Node]] = {"positions": []}
        if scored:
            self.new["scores"] = []
        last = [n for n in edit.graph.nodes if n.op == "placeholder"][-1]
        for name, made in self.new.items():
            for number, layer in enumerate(layers):
                with edit.graph.inserting_after(last):
                    last = edit.graph.placeholder(f"{ARGUMENT}_{name}_{number}")
                dtype = torch.int64 if name == "positions" else torch.float32
                rows = layer.key_cache.meta["val"]
                with program.fake_mode:
                    shape = (*rows.shape[:2], self.slots[number])
                    last.meta["val"] = torch.empty(shape, dtype=dtype, device=rows.device)
                made.append(last)
        self.after: dict[fx.Node, fx.Node] = {}

    def shrink(self, number: int) -> None:
        """Gives the layer's caches their number of slots."""
        layer = self.layers[number]
        for cache in (layer.key_cache, layer.value_cache):
            rows = cache.meta["val"]
            with self.program.fake_mode:
                shape = (*rows.shape[:2], self.slots[number], rows.shape[3])
                cache.meta["val"] = torch.empty(shape, dtype=rows.dtype, device=rows.device)

    def of(self, number: int) -> list[fx.Node]:
        """Keys, values, positions, and scores where there are any, of a layer."""
        layer = self.layers[number]
        return [layer.key_cache, layer.value_cache, *(made[number] for made in self.new.values())]

    def set(self, number: int, after: list[fx.Node]) -> None:
        self.after.update(zip(self.of(number), after, strict=True))

    def finish(self, name: str) -> Program:
        program, edit = self.program, self.edit
        added = [n for made in self.new.values() for n in made]
        output = next(n for n in edit.graph.nodes if n.op == "output")
        specs = list(program.signature.output_specs)
        kind = OutputKind.USER_INPUT_MUTATION
        mutations = sum(s.kind in (OutputKind.BUFFER_MUTATION, kind) for s in specs)
        renamed = {n.name: n for n in self.after}
        given: Any = output.args[0]
        values = [
            self.after[renamed[s.target]] if s.target in renamed and s.kind == kind else value
            for s, value in zip(specs, given, strict=True)
        ]
        values[mutations:mutations] = [self.after[n] for n in added]
        specs[mutations:mutations] = [OutputSpec(kind, TensorArgument(self.after[n].name), n.name) for n in added]
        output.args = (tuple(values),)
        inputs = [InputSpec(InputKind.USER_INPUT, TensorArgument(n.name), None) for n in added]
        signature = replace(
            program.signature, input_specs=[*program.signature.input_specs, *inputs], output_specs=specs
        )
        edit.program = replace(program, signature=signature, call_graph=self._called(added))
        made = edit.finish(name)
        return replace(made, example_inputs=self._examples())

    def _called(self, added: list[fx.Node]) -> tuple[Any, ...]:
        """torch.export's record of the call, with the new keyword argument."""
        entry = self.program.call_graph[0]
        args, kwargs = pytree.tree_unflatten([0] * self.program.in_spec.num_leaves, self.program.in_spec)
        if ARGUMENT in kwargs:
            raise PassError(
                f"the program takes an argument {ARGUMENT!r} already",
                facts="its caches are slots, or it uses the name",
                do="run EvictKV once, or rename the argument",
            )
        spec = pytree.tree_structure((args, {**kwargs, ARGUMENT: {k: [0] * len(v) for k, v in self.new.items()}}))
        old = entry.signature
        given = [*old.inputs, *(TensorArgument(n.name) for n in added)] if old.inputs else []
        names = [*old.forward_arg_names, ARGUMENT] if old.forward_arg_names else None
        called = replace(old, inputs=given, in_spec=spec, forward_arg_names=names)
        return (replace(entry, signature=called), *self.program.call_graph[1:])

    def _examples(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example inputs, with empty caches of the new size."""
        leaves, spec = pytree.tree_flatten(self.program.example_inputs)
        at = {n.name: i for i, n in enumerate(self.program.inputs)}
        fresh: dict[str, list[torch.Tensor]] = {k: [] for k in self.new}
        for layer, slots in zip(self.layers, self.slots, strict=True):
            for cache in (layer.key_cache, layer.value_cache):
                full = leaves[at[cache.name]]
                leaves[at[cache.name]] = full.new_zeros((*full.shape[:2], slots, full.shape[3]))
            fresh["positions"].append(full.new_full((*full.shape[:2], slots), -1, dtype=torch.int64))
            if self.scored:
                fresh["scores"].append(full.new_zeros((*full.shape[:2], slots), dtype=torch.float32))
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return args, {**kwargs, ARGUMENT: fresh}
