"""What is mended in Inductor for the whole process, plain torch.compile included, and not around a build: backward
graphs are compiled when they are first run. Each mend is free to ask for again.

Contract tests in tests/ir/test_torch.py and tests/runtime/test_threads.py hold each to what it promises.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import fx


def mend() -> None:
    """All of them."""
    keep_sums_within_their_buffers()
    keep_axes_of_attention()
    divide_by_places_inside()
    start_threads_for_work_only()
    know_strides_of_plain_indices()
    ask_views_for_sizes()


def keep_sums_within_their_buffers() -> None:
    """Inductor moves the index of an atomic sum in a 2-d tile on by the tile's row twice (torch 2.11 to 2.13).

    Such code, as that of `col2im` on several threads, writes beyond its buffer. Here the index is moved once.
    """
    from torch._inductor import config
    from torch._inductor.codegen.cpp import CppTile2DKernel, CppVecKernel

    store = CppTile2DKernel.store
    if getattr(store, "moves_once", False):
        return

    def once(self: Any, name: str, index: Any, value: Any, mode: Any = None) -> None:
        atomic = mode == "atomic_add" and (config.cpp.dynamic_threads or self.num_threads != 1)
        if not atomic or self.need_vec_transpose(self.rename_indexing(index)):
            return store(self, name, index, value, mode)
        return CppVecKernel.store(self, name, index, value if value.is_vec else self.broadcast(value), mode)

    once.moves_once = True  # type: ignore[attr-defined]
    CppTile2DKernel.store = once  # type: ignore[method-assign]


def keep_axes_of_attention() -> None:
    """Inductor's patterns of attention take any permutation of a query, key or value for the usual one of tokens and
    heads, and a softmax over any axis for one over the keys (torch 2.11 to 2.13).

    Attention among channels became attention among tokens. A match that has other axes is let be.
    """
    from torch._inductor.pattern_matcher import ReplacementPatternEntry

    apply = ReplacementPatternEntry.apply
    if getattr(apply, "keeps_axes", False):
        return

    def checked(self: Any, match: Any, graph: fx.Graph, node: fx.Node) -> None:
        made = getattr(match.replacement_graph, "graph", match.replacement_graph)
        attends = any("scaled_dot_product" in str(n.target) for n in made.nodes)
        if not attends or _over_usual_axes(match.nodes):
            apply(self, match, graph, node)

    checked.keeps_axes = True  # type: ignore[attr-defined]
    ReplacementPatternEntry.apply = checked  # type: ignore[method-assign]


def _over_usual_axes(nodes: Sequence[fx.Node]) -> bool:
    """Whether attention written in those nodes permutes nothing but tokens and heads, and the key's last two axes, and
    whether its softmax is over the last axis."""
    aten = torch.ops.aten

    def permutations(node: Any) -> list[tuple[int, ...]]:
        """Of an operand of a product, from the operand back to where the nodes begin."""
        found = []
        while node in nodes:
            if node.target is aten.permute.default:
                found.append(tuple(d % len(node.args[1]) for d in node.args[1]))
            node = next(iter(node.all_input_nodes), None)
        return found

    for n in nodes:
        if n.target in (aten.amax.default, aten.sum.dim_IntList, aten._softmax.default):
            last = n.all_input_nodes[0].meta["val"].dim() - 1
            if n.args[1] not in (-1, last, [-1], [last]):
                return False
    products = [n for n in nodes if n.target in (aten.bmm.default, aten.mm.default)]
    if len(products) != 2:
        return False
    scores, out = sorted(products)
    query, key, value = (permutations(n) for n in (scores.args[0], scores.args[1], out.args[1]))
    transposed = key[:1] in ([(0, 2, 1)], [(0, 1, 3, 2)])
    return transposed and all(p == (0, 2, 1, 3) for p in (*query, *key[1:], *value))


def divide_by_places_inside() -> None:
    """Inductor's gradient of average pooling divides by the whole window where the last one, in `ceil_mode`, hangs over
    the end; the pooling itself divides by the part of it that lies on the map or its padding (torch 2.11 to 2.13).

    Without padding that part is what is counted where padding does not count; with padding ATen's operator is called.
    """
    from torch._inductor import lowering

    target = torch.ops.aten.avg_pool2d_backward.default
    given = lowering.lowerings[target]
    if getattr(given, "divides_by_places_inside", False):
        return

    def divided(
        grad: Any, x: Any, kernel: Any, stride: Any, padding: Any, ceil: bool, padded: bool, divisor: Any = None
    ) -> Any:
        hangs = ceil and padded and divisor is None
        if hangs and any(padding):
            return lowering.fallback_avg_pool2d_backward(grad, x, kernel, stride, padding, ceil, padded, divisor)
        return given(grad, x, kernel, stride, padding, ceil, padded and not hangs, divisor)

    divided.divides_by_places_inside = True  # type: ignore[attr-defined]
    lowering.lowerings[target] = divided


WORTH_THREADS = 16 * 1024  # iterations of a loop from which a parallel region pays


def start_threads_for_work_only() -> None:
    """Has Inductor open parallel regions only for loops that pay for them, in code of `cpp.dynamic_threads`.

    There it opens one for every loop, however short, as it does not know the threads (torch 2.11 to 2.13). A region
    costs 5 to 10 us, and, where other processes have the cores, the wait for a thread that is not running. An iteration
    moves some 10 bytes, so that WORTH_THREADS of them take about 10 us, of which a second thread saves half. Loops of
    fewer are left to one thread; where sizes are symbolic, the region asks for them when it is entered.
    """
    from torch._inductor import config
    from torch._inductor.codegen import cpp
    from torch._inductor.utils import DelayReplaceLine, sympy_product

    if hasattr(cpp.WorkSharing, "begun"):
        return
    decided, written = cpp.CppKernel.decide_parallel_depth, cpp.CppKernel.codegen_loops_impl

    def decide(self: Any, most: Any, threads: int) -> Any:
        found = decided(self, most, threads)
        work = sympy_product(self.call_ranges)
        if config.cpp.dynamic_threads and work.is_number and work < WORTH_THREADS:
            return type(found)(parallel_depth=0, start_depth=found.start_depth)
        return found

    def write(self: Any, nest: Any, code: Any, sharing: Any) -> None:
        outer = isinstance(nest.kernel, cpp.OuterLoopFusedKernel)
        kernels = [inner.get_kernel() for inner in nest.kernel.inner] if outer else [self]
        sharing.begun = tuple(sympy_product(kernel.ranges) for kernel in kernels)
        written(self, nest, code, sharing)

    class Sharing(cpp.WorkSharing):
        """begun: iterations of the loops that are being written.  shared: of all in the region that is open."""

        begun: tuple[Any, ...] = ()
        shared: list[Any]

        def parallel(self, threads: int) -> None:
            if not self.in_parallel:
                self.shared = []
            shared, line = self.shared, self.code.writeline
            shared += self.begun
            if self.in_parallel or not config.cpp.dynamic_threads:
                return super().parallel(threads)

            def asking(text: Any) -> None:
                pragma = text.startswith("#pragma omp parallel")
                line(DelayReplaceLine("$work", lambda: _work_asked(shared), f"{text}$work") if pragma else text)

            with patch.object(self.code, "writeline", asking):
                return super().parallel(threads)

    cpp.CppKernel.decide_parallel_depth = decide  # type: ignore[method-assign]
    cpp.CppKernel.codegen_loops_impl = write  # type: ignore[method-assign]
    cpp.WorkSharing = Sharing  # type: ignore[misc]


def know_strides_of_plain_indices() -> None:
    """Inductor has sympy simplify every index for every loop variable, to learn what a step of a vector is (torch 2.11
    to 2.13), and keeps the last 128 answers: a third of the time that it takes over a deep network.

    Most indices are sums of products, whose difference tells. Of the others more answers are kept.
    """
    import sympy
    from sympy.core.function import Application
    from torch._inductor.codegen import cpp

    module: Any = cpp
    asked = module.stride_at_vec_range
    if hasattr(asked, "asked"):
        return

    @lru_cache(2**16)
    def stride(index: Any, var: Any, vec_length: int | None = None) -> Any:
        if not var.is_Symbol or index.has(Application, sympy.Rel):
            return asked(index, var, vec_length)
        return sympy.expand(index.xreplace({var: var + 1}) - index)

    stride.asked = asked  # type: ignore[attr-defined]
    module.stride_at_vec_range = stride


def _work_asked(iterations: list[Any]) -> str:
    """The clause with which a region over loops of so many iterations asks for its work; none where that is known."""
    from torch._inductor.codegen.cpp_utils import cexpr_index

    if any(work.is_number and work >= WORTH_THREADS for work in iterations):
        return ""
    open_ones = dict.fromkeys(work for work in iterations if not work.is_number)
    return f" if ({' || '.join(f'{cexpr_index(work)} >= {WORTH_THREADS}' for work in open_ones)})" if open_ones else ""


def ask_views_for_sizes() -> None:
    """Inductor's FlexAttention on a CPU asks the buffer below a query or key for its sizes, where a view of a linear's
    result has others than the buffer, and stops (torch 2.13). Here the view itself is asked.
    """
    from torch._inductor.codegen.cpp_flex_attention_template import CppFlexAttentionTemplate

    choose = getattr(CppFlexAttentionTemplate, "choose_flex_template", None)
    if choose is None or getattr(choose, "asks_views", False):
        return

    def sized(value: Any) -> Any:
        layout = SimpleNamespace(layout=SimpleNamespace(size=list(value.get_size())))
        return SimpleNamespace(data=SimpleNamespace(data=layout))

    def asked(self: Any, query: Any, key: Any, num_threads: Any) -> Any:
        return choose(self, sized(query), sized(key), num_threads)

    asked.asks_views = True  # type: ignore[attr-defined]
    CppFlexAttentionTemplate.choose_flex_template = asked  # type: ignore[method-assign]
