"""A CUDA device for Inductor's generated code, on CPU tensors: memory, kernel launches and the operators it calls.

Import under TRITON_INTERPRET=1. Kernels run in Triton's interpreter, one program after the other, with the arguments,
constants and grid of a real launch; of an autotuned kernel's candidates the one with the fewest programs runs, or all
of them. What is emulated and what is not:

* Fresh memory is NaN, so that an element which no kernel wrote shows. A load or store of a kernel outside the tensors
  that it was given raises.
* A launch whose arguments contradict what its machine code was specialised on (sizes taken as 1, divisible by 16, or 32
  bits wide) raises.
* Fused attention is its equation in float32; a convolution's result lies in memory as cuDNN lays it; every other
  operator is ATen's for the CPU.
* `libdevice` functions are torch's. `tl.dot` of bfloat16 multiplies bit patterns in the interpreter of Triton 3.7 to
  3.9; here its operands are cast to float32 first.
* Not emulated: races, shared memory, tf32, and the order of sums.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner, GridExpr
from torch._inductor.select_algorithm import extern_kernels
from torch._prims_common import suggest_memory_format
from triton.language.extra import libdevice
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

UNWRITTEN = 0xFF  # a NaN in every floating-point type

SAME_NAME = (
    "abs acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh erf erfc erfinv exp exp2 expm1 floor fmod hypot "
    "isinf isnan lgamma log log10 log1p log2 nextafter pow rsqrt signbit sin sinh sqrt tan tanh trunc"
)
LIBDEVICE: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in SAME_NAME.split()},
    "nearbyint": torch.round,
    "rint": torch.round,
    "fast_tanhf": torch.tanh,
}


class DeviceFault(Exception):
    """What a GPU would have answered with wrong numbers or a crash."""


class Device:
    """Runs one generated wrapper. kernels: name -> [launches, programs]; every: run all candidates of each kernel."""

    def __init__(self, *, every: bool = False) -> None:
        self.every = every
        self.kernels: dict[str, list[int]] = {}

    def run(self, code: str, inputs: list[Tensor]) -> list[Any]:
        """The outputs of the wrapper `code` on `inputs`, which lie in this device's memory."""
        scope: dict[str, Any] = {"__name__": "emulated", "__file__": __file__, "device_emulator": self}
        with torch.no_grad(), self._launches():
            exec(compile(on_cpu(code), "<wrapper>", "exec"), scope)
            return list(scope["call"](list(inputs)))

    def empty(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of that layout in which nothing is written yet."""
        count = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        memory = torch.full((count * dtype.itemsize,), UNWRITTEN, dtype=torch.uint8)
        return memory.view(dtype).as_strided(size, stride)

    def upload(self, values: Tensor, stride: tuple[int, ...]) -> Tensor:
        """The values in this device's memory, with that stride."""
        return self.empty(tuple(values.shape), stride, values.dtype).copy_(values)

    @contextlib.contextmanager
    def _launches(self) -> Iterator[None]:
        before = CachingAutotuner.run
        CachingAutotuner.run = lambda tuner, *args, **_: self._launch(tuner, args)  # type: ignore[method-assign]
        try:
            yield
        finally:
            CachingAutotuner.run = before  # type: ignore[method-assign]

    def _launch(self, tuner: Any, args: tuple[Any, ...]) -> None:
        if not self.every:
            self._launch_one(tuner, min(tuner.configs, key=lambda config: np.prod(_grid(tuner, config, args)[1])), args)
            return
        held = [(a, a.clone()) for a in args if isinstance(a, Tensor)]
        for config in tuner.configs:
            for tensor, value in held:
                tensor.copy_(value)
            self._launch_one(tuner, config, args)

    def _launch_one(self, tuner: Any, config: Any, args: tuple[Any, ...]) -> None:
        given, grid = _grid(tuner, config, args)
        constants = tuner.triton_meta["constants"]
        wanted = [n for n, kind in tuner.triton_meta["signature"].items() if n not in given and kind != "constexpr"]
        if wanted:
            raise DeviceFault(f"{tuner.inductor_meta['kernel_name']} is launched without {', '.join(wanted)}")
        _hold_to_specialisation(tuner, given)
        tally = self.kernels.setdefault(tuner.fn.__name__, [0, 0])
        tally[0] += 1
        tally[1] += int(np.prod(grid))
        known = {n: v for n, v in {**constants, **config.kwargs}.items() if n in tuner.fn.arg_names}
        Reach.allow([a for a in args if isinstance(a, Tensor)])
        tuner.fn[grid](**{**given, **known})


def _grid(tuner: Any, config: Any, args: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A launch's arguments by name, and its grid."""
    meta, constants = tuner.inductor_meta, {*config.kwargs, *tuner.inductor_meta.get("declared_constexpr_names", ())}
    names = [n for n in tuner.triton_meta["signature"] if n not in constants]
    extra = meta.get("extra_launcher_args", [])
    given = dict(zip([*names, *extra], args, strict=True))
    grid = tuple(GridExpr.from_meta(meta, config, mode="python").eval_slow(given))
    return {n: given[n] for n in names}, grid


def _hold_to_specialisation(tuner: Any, given: dict[str, Any]) -> None:
    """Raises where an argument is not what the kernel was compiled for."""
    kernel, meta = tuner.inductor_meta["kernel_name"], tuner.triton_meta
    names = list(meta["signature"])
    for name, value in given.items():
        if name in meta["constants"] and meta["constants"][name] != value:
            raise DeviceFault(f"{kernel} is compiled for {name}={meta['constants'][name]} and launched with {value}")
        if meta["signature"][name] == "i32" and not -(2**31) <= value < 2**31:
            raise DeviceFault(f"{kernel} takes {name} in 32 bits, it is launched with {value}")
    for (position,), hints in meta["configs"][0].items():
        value = given.get(names[position])
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if ["tt.divisibility", 16] in hints and number is not None and number % 16:
            raise DeviceFault(
                f"{kernel} is compiled for a {names[position]} divisible by 16 and launched with {number}"
            )


REPLACED = (
    (r"torch\.cuda\._DeviceGuard\(0\)", "__import__('contextlib').nullcontext()"),
    (r"torch\.cuda\.set_device\(0\)", "pass"),
    (r"from torch\._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = lambda device: 0"),
    (r"empty_strided_cuda = .*", "empty_strided_cuda = device_emulator.empty"),
    (r"(?<=')cuda:0(?=')", "cpu"),
    (r"device\(type='cuda', index=0\)", "device(type='cpu')"),
)


def on_cpu(code: str) -> str:
    """The wrapper with its calls of the device replaced. Raises DeviceFault where one is left that is not emulated."""
    code = re.split(r"^def (?:get_args|benchmark_compiled_module)\(", code, flags=re.MULTILINE)[0]
    parts = re.split(r"(async_compile\.triton\('[^']*', '''.*?''', device_str='cuda'\))", code, flags=re.DOTALL)
    for i in range(0, len(parts), 2):  # between kernels, whose own text stays
        for pattern, instead in REPLACED:
            parts[i] = re.sub(pattern, instead, parts[i])
        for line in parts[i].splitlines():
            text = line.split("#")[0].replace("empty_strided_cuda", "")
            if "cuda" in text:
                raise DeviceFault(f"the wrapper asks the device for something that is not emulated: {line.strip()}")
    return "".join(parts)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    """softmax(q k^T scale + bias) v in float32, in memory [B, N, H, Dv], as the fused operators leave it."""
    for name, value in (("q", q), ("k", k), ("v", v), ("bias", bias)):
        if value is not None and value.stride(-1) != 1:
            raise DeviceFault(f"fused attention is given a {name} whose last dimension has stride {value.stride(-1)}")
    logits = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.float()
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    out = (logits.softmax(-1).nan_to_num(0.0) @ v.float()).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    _hold_to_inference(compute_log_sumexp, dropout_p)
    if attn_bias is not None and attn_bias.shape != (*q.shape[:3], k.shape[2]):
        raise DeviceFault(f"efficient attention is given a bias {tuple(attn_bias.shape)} that is not expanded")
    none = q.new_empty(0)
    return attend(q, k, v, attn_bias, scale, is_causal), q.new_empty(*q.shape[:2], 0), none.long(), none.long()


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _hold_to_inference(return_debug_mask, dropout_p)
    none = q.new_empty(0)
    out = attend(q, k, v, None, scale, is_causal)
    return out, q.new_empty(q.shape[:3]).float(), none, none, q.shape[2], k.shape[2], none, none, none


def _hold_to_inference(extra: bool, dropout: float) -> None:
    if extra or dropout:
        raise DeviceFault("fused attention is emulated without its second outputs and without dropout")


def _convolution(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As cuDNN lays the result: channels last where either operand is."""
    order = ("bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
    out = torch.convolution(x, weight, *args, *(kwargs[name] for name in order[len(args) :]))
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    is_last = last is not None and x.dtype != torch.float64 and last in map(suggest_memory_format, (x, weight))
    return out.contiguous(memory_format=last if is_last and last else torch.contiguous_format)


def _by_torch(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A function of Triton tensors in the interpreter that computes by torch."""

    def call(*args: Any) -> Any:
        first = next(a for a in args if isinstance(a, tl.tensor))
        plain = [torch.from_numpy(np.ascontiguousarray(a.handle.data)) if isinstance(a, tl.tensor) else a for a in args]
        out = function(*plain).numpy()
        kind = tl.int1 if out.dtype == bool else first.dtype
        return tl.tensor(TensorHandle(out, kind), tl.block_type(kind, first.shape) if first.type.is_block() else kind)

    return call


class Reach:
    """The memory that the running kernel may touch: where each range of addresses begins, and where it ends."""

    begins = np.zeros(0, np.uint64)
    ends = np.zeros(0, np.uint64)

    @classmethod
    def allow(cls, tensors: list[Tensor]) -> None:
        """The tensors' memory, and nothing else."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        cls.begins = np.array(sorted(storages), np.uint64)
        cls.ends = np.array([begin + storages[begin] for begin in sorted(storages)], np.uint64)

    @classmethod
    def hold(cls, what: str, pointers: Any, mask: Any) -> None:
        """Raises where an element that the mask lets through lies in none of the ranges."""
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.uint64)
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        found = np.searchsorted(cls.begins, at, side="right") - 1
        beside = (found < 0) | (at + size > cls.ends[found])
        if beside.any():
            raise DeviceFault(f"{beside.sum()} elements are {what} beside the tensors that the kernel was given")


def _load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
    Reach.hold("read", pointers, mask)
    return _INTERPRETERS_LOAD(self, pointers, mask, *rest)


def _store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    Reach.hold("written", pointers, mask)
    return _INTERPRETERS_STORE(self, pointers, value, mask, *rest)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    return _INTERPRETERS_DOT(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


def _widened(handle: Any) -> Any:
    """bfloat16, which the interpreter keeps as its bits, in float32; others as they are."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


_INTERPRETERS_DOT = InterpreterBuilder.create_dot
_INTERPRETERS_LOAD = InterpreterBuilder.create_masked_load
_INTERPRETERS_STORE = InterpreterBuilder.create_masked_store
_LIBRARY = torch.library.Library("aten", "IMPL")


def install() -> None:
    """Puts the emulated parts in place, once in a process."""
    if not triton.knobs.runtime.interpret:
        raise DeviceFault("the emulated device needs TRITON_INTERPRET=1 from before triton was imported")
    triton_helpers.set_driver_to_gpu = lambda: None
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_masked_load = _load
    InterpreterBuilder.create_masked_store = _store
    for name, function in LIBDEVICE.items():
        setattr(libdevice, name, _by_torch(function))
    extern_kernels.convolution = _convolution
    _LIBRARY.impl("_scaled_dot_product_efficient_attention", _efficient, "CPU")
    _LIBRARY.impl("_scaled_dot_product_flash_attention", _flash, "CPU")
