"""Turns depthwise convolutions and what surrounds them into the vocabulary's op, in channels last.

    c = conv2d(x, w, b, groups=96)                         d = depthwise_block(x, w', b, g, h, norm_eps=1e-6)
    y = layer_norm(permute(c, [0, 2, 3, 1]), g, h)   ->    y = permute(d, [0, 2, 3, 1])
    s = batch_norm(conv2d(x, w3) + conv2d(x, w1) + x)      t = depthwise_block(x, w', b', activation="gelu")
    t = gelu(s)

Branches, scales and norms that act channel by channel become one kernel (match/depthwise.py; float32 only). Behind it
go a layer norm over channels, an activation, a product and a sum with a map of the same shape, as far as each is read
once. The rest of the network stays in the layout that Inductor gives it, which on a CPU is channels last wherever it
holds a convolution; copies that made the map dense for the convolution go, views of the result become reshapes.

Zeros that were put around the map ahead become the op's padding, also where they differ from end to end (TensorFlow's
"same" at a stride). A convolution of a single row (conv1d) is one of a map of that row; a result cut to its source's
size makes a causal one. One that makes several results of a channel reads the map with its channels repeated.

Never touches a convolution whose weight is computed, nor, on a CPU, one that oneDNN was measured to serve better. On a
GPU nothing was measured yet: every chain that the Triton template accepts goes to it. Averages over windows stay: of
one and what surrounds it Inductor makes one pass, on a CPU measured ahead of the op (`slower_pool`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.ops.depthwise import depthwise_block
from compiled_attn.ops.templates import registry
from compiled_attn.passes.match.depthwise import CONVOLUTIONS, Form, Forms
from compiled_attn.passes.strides import follow_strides, reads_strides

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
RULE = "depthwise_block"
TO_LAST = ([0, 2, 1], [0, 2, 3, 1])
# Where oneDNN was measured ahead (Zen 5, AVX-512, one core, bench/depthwise_ops.py): kernels of few places on maps that
# leave the second-level cache, input and result of one picture together. Elsewhere the template was 1.05 to 6 times
# as fast. What saves a pass over the map (norm, gate, residual, merged branches) outweighs that, and so do zeros put
# around it at one end: at 3x3, stride 2, on 112x112x256 to 14x14x1536 the template was 1.14 to 1.46 times as fast as
# oneDNN behind a padded map.
FEW_PLACES, LARGE_BYTES = 9, 2_500_000
ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
}
POOLS = (aten.avg_pool2d.default,)


@dataclass
class Block:
    """A match. last: the node that the op's result stands for; in_last: it is that result with channels last."""

    root: fx.Node
    form: Form
    last: fx.Node
    activation: str = "none"
    gate: fx.Node | None = None
    residual: fx.Node | None = None
    norm: tuple[fx.Node | None, fx.Node | None, float] | None = None
    in_last: bool = False

    @property
    def text(self) -> str:
        (rows, columns), _, dilation = self.form.geometry()
        parts = [f"{rows}x{columns}" + (f" dilated {dilation[0]}x{dilation[1]}" if max(dilation) > 1 else "")]
        count = len(self.form.convolutions)
        parts += [f"of {count} convolutions"] if count > 1 else []
        parts += [f"{self.form.repeats} results of every channel"] if self.form.repeats > 1 else []
        parts += ["layer norm"] if self.norm else []
        parts += [self.activation] if self.activation != "none" else []
        parts += [name for name, node in (("gate", self.gate), ("residual", self.residual)) if node is not None]
        return ", ".join(parts)


def grow(root: fx.Node, form: Form, taken: set[fx.Node]) -> Block:
    """The root with as much of what follows it as the op computes; sums and products are noted in `taken`."""
    block = Block(root, form, root)
    user = _only_user(block.last)
    if user is not None and _to_last(user):
        norm = _only_user(user)
        found = _norm_over_channels(norm, user) if norm is not None else None
        if found is not None and norm is not None:
            block.norm, block.last, block.in_last = found, norm, True
        return block
    if user is not None and activation_of(user) is not None:
        block.activation, block.last = activation_of(user) or "none", user
    for field, target in (("gate", aten.mul.Tensor), ("residual", aten.add.Tensor)):
        user = _only_user(block.last)
        if user is None or user.target is not target or user in taken:
            continue
        other = _other(user, block.last)
        if other is not None:
            setattr(block, field, other)
            block.last = user
            taken.add(user)
    return block


def activation_of(node: fx.Node) -> str | None:
    """The op's name of an activation."""
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    if node.target is aten.hardtanh.default:
        return "relu6" if tuple(node.args[1:]) == (0.0, 6.0) else None
    return ACTIVATIONS.get(node.target)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _to_last(user: fx.Node) -> bool:
    """Whether it brings the channels of a map to the end."""
    args: Any = user.args
    if user.target is aten.transpose.int:
        return args[0].meta["val"].dim() == 3 and {d % 3 for d in args[1:]} == {1, 2}
    return user.target is aten.permute.default and args[1] in TO_LAST


def _norm_over_channels(norm: fx.Node, x: fx.Node) -> tuple[fx.Node | None, fx.Node | None, float] | None:
    if norm.target is not aten.layer_norm.default or norm.args[0] is not x:
        return None
    given: Any = (*norm.args, *(None, None, 1e-5)[len(norm.args) - 2 :])
    _, shape, weight, bias, eps = given[:5]
    channels = x.meta["val"].shape[-1]
    parts = [n for n in (weight, bias) if n is not None]
    alike = all(n.meta["val"].dtype == x.meta["val"].dtype for n in parts)
    return (weight, bias, eps) if list(shape) == [channels] and alike else None


def _other(user: fx.Node, current: fx.Node) -> fx.Node | None:
    """The other operand of a product or sum, if it is a map of the same shape and type."""
    others = [a for a in user.args if a is not current]
    if len(others) != 1 or user.kwargs.get("alpha", 1) != 1 or not isinstance(others[0], fx.Node):
        return None
    a, b = (n.meta.get("val") for n in (others[0], current))
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.dim() != b.dim():
        return None
    return others[0] if all(_torch.statically_true(m == n) for m, n in zip(a.shape, b.shape, strict=True)) else None


def source_of(block: Block) -> fx.Node:
    """The map that the convolution reads, without the copies that made it dense."""
    x: Any = block.form.source
    while x.target in (aten.clone.default, aten.contiguous.default):
        x = x.args[0]
    return x


def write(edit: Edit, program: Program, block: Block) -> tuple[fx.Node, bool]:
    """Puts the op in the chain's place; returns its result, and whether that lies otherwise in memory than before."""
    form, dtype = block.form, block.root.meta["val"].dtype
    _, padding, dilation = form.geometry()
    made_from = tuple(o for name in form.made_from for o in program.origin.get(name, (name,)))
    name = form.made_from[0]
    weight = edit.constant(f"{name}.last", form.kernel().to(dtype).contiguous(), made_from=made_from)
    bias = None
    if form.bias is not None:
        bias = edit.constant(f"{name}.shift", form.bias.to(dtype).contiguous(), made_from=made_from)
    norm_weight, norm_bias, eps = block.norm or (None, None, None)
    norms = [None if n is None else edit.node_of[n] for n in (norm_weight, norm_bias)]
    options: dict[str, Any] = {
        "stride": list(form.stride),
        "padding": list(padding),
        "dilation": list(dilation),
        "activation": block.activation,
        "norm_eps": eps,
    }
    old, like = edit.node_of[block.last], edit.node_of[block.root]
    flat = form.source.meta["val"].dim() == 3
    with edit.graph.inserting_before(old):
        x, gate, residual = (
            _map(edit, None if n is None else edit.node_of[n], flat, like)
            for n in (source_of(block), block.gate, block.residual)
        )
        x = repeated(edit, x, form.repeats, like) if form.repeats > 1 else x
        args = (x, weight, bias, gate, residual, *norms)
        new = edit.call(depthwise_block.overload, args, options, like=like)
        new = edit.call(aten.squeeze.dim, (new, 2), like=like) if flat else new
        new = edit.call(aten.permute.default, (new, TO_LAST[0 if flat else 1]), like=old) if block.in_last else new
    moved = str(new.meta["val"].stride()) != str(old.meta["val"].stride())
    edit.node_of[block.last] = new
    edit.replace(old, new)
    return new, moved


def _map(edit: Edit, x: fx.Node | None, flat: bool, like: fx.Node) -> Any:
    """A map for the op: [B, C, X] as one of a single row."""
    return edit.call(aten.unsqueeze.default, (x, 2), like=like) if flat and x is not None else x


def repeated(edit: Edit, x: fx.Node, times: int, like: fx.Node) -> fx.Node:
    """A map [B, C, Y, X] with every channel `times` times, side by side."""
    shape = x.meta["val"].shape
    sizes = [n if isinstance(n, int) else edit.call(aten.sym_size.int, (x, d), like=like) for d, n in enumerate(shape)]
    apart = edit.call(aten.unsqueeze.default, (x, 2), like=like)
    wide = edit.call(aten.expand.default, (apart, [-1, -1, times, -1, -1]), like=like)
    return edit.call(aten.reshape.default, (wide, [sizes[0], shape[1] * times, *sizes[2:]]), like=like)


@dataclass(frozen=True)
class FuseDepthwise:
    """Depthwise convolutions with what surrounds them become depthwise_block where a template serves them."""

    name: ClassVar[str] = "fuse-depthwise"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        if program.mode != "inference":
            return program
        if not any(n.target in (*CONVOLUTIONS, *POOLS) for n in program.graph.nodes):
            return program
        forms = Forms(program)
        for node, because in forms.why.items():
            notes.miss(node, RULE, because)
        for node in program.graph.nodes:
            stays = slower_pool(node) if node.target in POOLS else None
            if stays is not None:
                notes.miss(node, RULE, stays)
        hindrance = reads_strides(program.graph)
        edit: Edit | None = None
        moved: set[fx.Node] = set()
        taken: set[fx.Node] = set()
        for root in forms.roots():
            block = grow(root, forms.of[root], taken)
            if hindrance is not None:
                notes.miss(root, RULE, f"{hindrance.name} reads the strides of the map, which would change")
                continue
            refused = refuses(block, target)
            if refused is not None:
                notes.miss(root, RULE, refused)
                continue
            edit = edit or program.edit()
            new, changed = write(edit, program, block)
            moved |= {new} if changed else set()
            notes.did(root, RULE, block.text)
        if edit is None:
            return program
        follow_strides(edit, moved)
        return edit.finish(self.name)


def refuses(block: Block, target: Target) -> str | None:
    """Because of what the template does not serve the block."""
    x = block.form.source.meta["val"]
    if block.root.meta["val"].dtype != x.dtype:
        return f"its result is {block.root.meta['val'].dtype} and its input {x.dtype}"
    slower = behind_onednn(block) if target.kind == "cpu" else None
    if slower is not None:
        return slower
    weight = x.new_empty((*block.form.geometry()[0], x.shape[1] * block.form.repeats))
    x = x.unsqueeze(2) if x.dim() == 3 else x
    template, misses = registry.choose(RULE, (x, weight), {}, target)
    return None if template is not None else "; ".join(because for _, because in misses)


def behind_onednn(block: Block) -> str | None:
    """Whether the block is of the kind that oneDNN serves better: the sentence, or None."""
    if block.form.repeats > 1 or block.form.source.meta["val"].dim() == 3:
        return None
    saves = block.norm or block.gate is not None or block.residual is not None or len(block.form.nodes) > 1
    kernel, _, dilation = block.form.geometry()
    return None if saves else slower(kernel, dilation, [block.form.source.meta["val"], block.root.meta["val"]])


def slower(kernel: Sequence[int], dilation: Sequence[int], maps: Sequence[torch.Tensor]) -> str | None:
    """Whether oneDNN was measured ahead for a lone convolution on these maps, in and out: the sentence, or None."""
    rows, columns = kernel
    sizes = [n for value in maps for n in value.shape[1:]]
    if rows * columns > FEW_PLACES or max(dilation) > 1 or not all(isinstance(n, int) for n in sizes):
        return None
    moved = sum(math.prod(value.shape[1:]) * value.element_size() for value in maps)
    if moved <= LARGE_BYTES:
        return None
    return f"oneDNN is faster at {rows}x{columns} on maps of {moved / 1e6:.1f} MB a picture, in and out"


def slower_pool(node: fx.Node) -> str | None:
    """Why an average over windows that move by one stays, though it is a convolution with equal numbers.

    PoolFormer's block (norm, average of 3x3 less the map, residual) took Inductor 0.23 ms at 56x56x64 and 3.0 ms at a
    batch of 8, with the op 0.36 and 3.5 ms; the average alone 0.09 ms, the op 0.14 ms (Zen 5, AVX-512, one core).
    """
    stride: Any = node.args[2] if len(node.args) > 2 else []
    if list(stride) not in ([1], [1, 1]):
        return None
    return "Inductor's one pass over an average and what surrounds it was measured 1.2 to 1.5 times as fast"
