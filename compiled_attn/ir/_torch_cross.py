"""Patches under which AOTInductor builds for a GPU that is not there; only the child of runtime/cross applies them.

AOTInductor compiles for the GPU it runs on (pytorch issue 153697: "native compilation, not cross compilation"). What it
asks of the device are properties, streams and benchmarks; with those answered from a record, everything up to the
machine code works without one. Each patch is a record: what it replaces, why, where upstream stands, and a check that
says in words when it no longer fits. Nothing here has run on a device.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from compiled_attn.ir._torch import bounded_sizes

VERIFIED = ("2.13",)  # torch releases on which tests/runtime/test_cross.py has passed
THREADS_PER_MULTIPROCESSOR = {75: 1024, 80: 2048, 86: 1536, 87: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
REGISTERS_PER_MULTIPROCESSOR = 65536
OPTIONS = {
    "joint_graph_constant_folding": False,  # executes aten.full on the device
    "shape_padding": False,  # benchmarks on the device
    "fx_graph_cache": False,  # its key does not know what is patched
}


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel of the package: the configuration chosen among `candidates`, and what its machine code needs.

    registers a thread, spills in bytes a thread, shared in bytes a block.
    """

    name: str
    config: str
    candidates: int
    registers: int
    spills: int
    shared: int
    warps: int

    @property
    def needs(self) -> str:
        """Its machine code's figures as text."""
        return f"{self.registers} registers, {self.spills} B spilled, {self.shared / 1024:.1f} KiB shared"


@dataclass
class Cross:
    """One build under the patches. props: what the device would say of itself; real: the bytes behind fake weights.

    code: kernel -> "cubin" and "ptx" -> bytes, of the chosen configurations.
    """

    props: SimpleNamespace
    kernels: list[Kernel]
    real: dict[int, torch.Tensor]
    code: dict[str, dict[str, bytes]]


@dataclass(frozen=True)
class Patch:
    """names: dotted paths of what is replaced or relied on.  fits: further checks; None, or a sentence."""

    name: str
    reason: str
    upstream: str
    names: tuple[str, ...]
    apply: Callable[[contextlib.ExitStack, Cross], None]
    fits: Callable[[], str | None] = lambda: None

    def misfit(self) -> str | None:
        """None where this torch and triton still have what the patch replaces, else a sentence."""
        for name in self.names:
            try:
                _resolve(name)
            except (ImportError, AttributeError):
                return f"patch {self.name} replaces {name}, which this torch does not have"
        because = self.fits()
        return None if because is None else f"patch {self.name}: {because}"


def misfits() -> list[str]:
    """A sentence for every patch that does not fit the installed torch and triton."""
    return [because for patch in PATCHES if (because := patch.misfit()) is not None]


@contextlib.contextmanager
def patched(target: Any) -> Iterator[Cross]:
    """torch as if a GPU like `target` (ir.targets.Target) were there, for compiling; undone at the end of the block."""
    cross = Cross(properties(target), [], {}, {})
    with contextlib.ExitStack() as stack:
        for patch in PATCHES:
            patch.apply(stack, cross)
        _forget_answers()
        stack.callback(_forget_answers)
        yield cross


def properties(target: Any) -> SimpleNamespace:
    """What torch.cuda.get_device_properties would say of the target."""
    major, minor = divmod(target.sm, 10)
    return SimpleNamespace(
        name=target.name,
        major=major,
        minor=minor,
        multi_processor_count=target.multiprocessors,
        total_memory=int(target.memory_gib * 2**30),
        L2_cache_size=int(target.l2_mib * 2**20),
        regs_per_multiprocessor=REGISTERS_PER_MULTIPROCESSOR,
        max_threads_per_multi_processor=THREADS_PER_MULTIPROCESSOR[target.sm],
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=target.shared_bytes_per_block,
        shared_memory_per_multiprocessor=target.shared_bytes_per_block + 1024,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName=f"sm_{target.sm}",
        uuid="cross-compiled",
        clock_rate=1_400_000,
        memory_clock_rate=1_200_000,
        memory_bus_width=4096,
    )


def to_cuda(exported: torch.export.ExportedProgram, cross: Cross) -> torch.export.ExportedProgram:
    """The program, changed in place, on a fake cuda:0: weights become fake tensors whose bytes `cross` remembers."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.export.passes import move_to_device_pass
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    values = [leaf for n in exported.graph.nodes for leaf in torch.utils._pytree.tree_leaves(n.meta.get("val"))]
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    mode: Any = modes[0] if modes else FakeTensorMode(shape_env=ShapeEnv())
    before = _tensors(exported)
    with mode, torch.no_grad():
        moved = move_to_device_pass(exported, "cuda:0")
    for name, fake in _tensors(moved).items():
        given = before[name].detach()
        # Inductor writes the fake tensor's strides into the code, so the bytes must lie that way.
        kept = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype).copy_(given)
        cross.real[fake.untyped_storage()._cdata] = kept
    return moved


def compile_package(
    exported: torch.export.ExportedProgram, path: str, options: dict[str, Any], in_tree: str, out_tree: str
) -> str:
    """AOTInductor's package of a program of flat arguments; its pytree specs are written as in_tree and out_tree."""
    import torch._inductor.package as packaging
    from torch._export.utils import _compiling_state_context
    from torch._inductor.compile_fx import _aoti_flatten_inputs, compile_fx_aot

    args, kwargs = exported.example_inputs
    module = exported.module(check_guards=False)
    flat, found = _aoti_flatten_inputs(module, args, kwargs, options={**OPTIONS, **options})
    found["aot_inductor.package"] = True
    # Inductor reads a scalar's value, or keeps it as a tensor of the device: what is not here can not be read.
    found["always_keep_tensor_constants"] = any(value.dim() == 0 for value in _tensors(exported).values())
    found["aot_inductor.serialized_in_spec"], found["aot_inductor.serialized_out_spec"] = in_tree, out_tree
    with torch.no_grad(), _compiling_state_context(), bounded_sizes(exported):
        files: Any = compile_fx_aot(module, flat, config_patches=found)
    return str(packaging.package_aoti(path, files))  # type: ignore[attr-defined]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory (where spills live), a thread; by triton's bundled cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no register count: {text[-300:]}")
    return int(found[1]), int(found[2]) + int(found[3])


def resident_warps(kernel: Kernel, props: SimpleNamespace) -> int:
    """Warps of a kernel that one multiprocessor holds at once, by registers, shared memory and threads."""
    per_warp = -(-max(kernel.registers, 1) * 32 // 256) * 256  # registers are given out by 256 a warp
    blocks = min(
        props.regs_per_multiprocessor // (per_warp * kernel.warps),
        props.shared_memory_per_multiprocessor // (kernel.shared + 1024),
        props.max_threads_per_multi_processor // (32 * kernel.warps),
    )
    return blocks * kernel.warps


def choose(kernels: list[Kernel], props: SimpleNamespace) -> int:
    """Which candidate is taken without a measurement: no spills, then most warps in flight; the first among equals."""
    order = range(len(kernels))
    return min(order, key=lambda i: (kernels[i].spills, -min(resident_warps(kernels[i], props), 32), i))


def _tensors(exported: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    named = {**exported.state_dict, **exported.constants}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def _resolve(name: str) -> Any:
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = __import__(".".join(parts[:split]), fromlist=["_"])
        except ImportError:
            continue
        return functools.reduce(getattr, parts[split:], found)
    raise ImportError(name)


def _always(value: Any) -> Callable[..., Any]:
    """A function that answers every question alike."""
    return lambda *_, **__: value


def _set(stack: contextlib.ExitStack, owner: Any, **values: Any) -> None:
    for name, value in values.items():
        stack.enter_context(mock.patch.object(owner, name, value, create=True))


def _forget_answers() -> None:
    """Empties the caches in which torch keeps what it has learnt about devices."""
    import torch._inductor.runtime.hints as hints
    import torch._inductor.utils as inductor_utils
    from torch.utils import _triton as triton_utils

    for module in (triton_utils, inductor_utils):
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    hints.DeviceProperties.create.cache_clear()


def _torch_cuda(stack: contextlib.ExitStack, cross: Cross) -> None:
    props = cross.props
    _set(
        stack,
        torch.cuda,
        is_available=_always(True),
        device_count=_always(1),
        current_device=_always(0),
        synchronize=_always(None),
        get_device_properties=_always(props),
        get_device_capability=_always((props.major, props.minor)),
        _exchange_device=_always(0),
        _maybe_exchange_device=_always(0),
        get_rng_state=_always(torch.zeros(16, dtype=torch.uint8)),
        set_rng_state=_always(None),
    )
    _set(stack, torch._C, _cuda_getCurrentRawStream=_always(0))


def _fake_tensors(stack: contextlib.ExitStack, cross: Cross) -> None:
    import torch._subclasses.fake_tensor as fake_tensor

    del cross
    if hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        torch._C._ensureCUDADeviceGuardSet()
    _set(stack, fake_tensor.FakeTensorMode, avoid_device_init=True)
    _set(stack, fake_tensor, init_gpu_context=_always(None))


def _device_interface(stack: contextlib.ExitStack, cross: Cross) -> None:
    import torch._dynamo.device_interface as interfaces

    props = cross.props

    class CrossInterface(interfaces.CudaInterface):
        class Worker(interfaces.CudaInterface.Worker):
            current_device = staticmethod(_always(0))
            get_device_properties = staticmethod(_always(props))

        current_device = staticmethod(_always(0))
        device_count = staticmethod(_always(1))
        is_available = staticmethod(_always(True))
        synchronize = staticmethod(_always(None))
        get_device_properties = staticmethod(_always(props))
        get_raw_stream = staticmethod(_always(0))
        exchange_device = maybe_exchange_device = staticmethod(_always(0))
        get_compute_capability = staticmethod(_always(props.major * 10 + props.minor))
        is_bf16_supported = staticmethod(_always(props.major >= 8))
        is_triton_capable = staticmethod(_always(True))
        raise_if_triton_unavailable = staticmethod(_always(None))

    interfaces.get_interface_for_device("cpu")  # fills the registry
    table = {**interfaces.device_interfaces, "cuda": CrossInterface, "cuda:0": CrossInterface}
    _set(stack, interfaces, device_interfaces=table)


def _triton_driver(stack: contextlib.ExitStack, cross: Cross) -> None:
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    props = cross.props

    class Utils:
        def get_device_properties(self, device: int) -> dict[str, int]:
            del device
            return {
                "max_shared_mem": props.shared_memory_per_block_optin,
                "max_num_regs": props.regs_per_multiprocessor,
                "multiprocessor_count": props.multi_processor_count,
                "warpSize": 32,
                "sm_clock_rate": props.clock_rate,
                "mem_clock_rate": props.memory_clock_rate,
                "mem_bus_width": props.memory_bus_width,
            }

        def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
            del name, shared, device
            registers, spilled = resources(kernel)
            threads = props.regs_per_multiprocessor // max(registers, 1) // 32 * 32
            return 1, 1, registers, spilled // 4, min(1024, threads)

    class CrossDriver(CudaDriver):
        def __init__(self) -> None:  # the parent's would build a C module that needs libcuda
            self.utils = Utils()
            self.launcher_cls = _always(_always(None))
            self.get_current_device = _always(0)
            self.set_current_device = _always(None)
            self.get_current_stream = _always(0)
            self.get_device_capability = _always((props.major, props.minor))

        @staticmethod
        def is_active() -> bool:
            return True

        def get_benchmarker(self) -> Any:
            raise RuntimeError("there is no device: nothing can be benchmarked")

    driver = triton.runtime.driver
    stack.callback(setattr, driver, "_active", driver._active)
    driver.set_active(CrossDriver())


def _autotuning(stack: contextlib.ExitStack, cross: Cross) -> None:
    from torch._inductor import config
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    def compile_and_choose(self: Any) -> None:
        self.kernel_autotune_defs.splice("\nasync_compile.wait(globals())\ndel async_compile\n")
        scope: dict[str, Any] = {}
        exec(self.kernel_autotune_defs.getvalue(), scope)
        for tuner in [value for value in scope.values() if isinstance(value, CachingAutotuner)]:
            if not tuner.launchers:
                tuner.precompile()
            found = [_kernel_of(tuner, launcher) for launcher in tuner.launchers]
            index = choose(found, cross.props)
            cross.kernels.append(found[index])
            assembly = tuner.launchers[index].bin.asm
            cross.code[found[index].name] = {"cubin": assembly["cubin"], "ptx": assembly["ptx"].encode()}
            if tuner.launchers[index].store_cubin:
                # Where only sources are packaged, Inductor names a cubin by its function: two specialisations of one
                # kernel would be one file. Named by their content they stay two.
                with config.patch("aot_inductor.package_cpp_only", False):
                    tuner.save_gpu_kernel("stream0", tuner.launchers[index])

    _set(stack, PythonWrapperCodegen, generate_and_run_autotune_block=compile_and_choose)


def _kernel_of(tuner: Any, launcher: Any) -> Kernel:
    config = launcher.config
    text = " ".join([*(f"{k}={v}" for k, v in sorted(config.kwargs.items())), f"stages={config.num_stages}"])
    return Kernel(
        name=str(tuner.inductor_meta.get("kernel_name")),
        config=text,
        candidates=len(tuner.launchers),
        registers=int(launcher.n_regs),
        spills=4 * int(launcher.n_spills),
        shared=int(launcher.shared),
        warps=int(config.num_warps),
    )


def _autotuning_fits() -> str | None:
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    source = inspect.getsource(PythonWrapperCodegen.generate_and_run_autotune_block)
    if "kernel_autotune_defs" not in source or "async_compile.wait" not in source:
        return "the block that autotunes at compile time no longer ends its definitions with async_compile.wait"
    return None


def _weights(stack: contextlib.ExitStack, cross: Cross) -> None:
    import torch._inductor.graph as graph
    from torch._subclasses.fake_tensor import FakeTensor

    same_before = graph.is_same_tensor  # type: ignore[attr-defined]
    value_before = graph.GraphLowering.get_original_value_of_constant

    class OnCuda(torch.Tensor):
        """Bytes in memory that answer as if they lay on the device (only alignment is asked for)."""

        is_cuda = True

    def identity(t: torch.Tensor) -> tuple[Any, ...]:
        return t.size(), t.stride(), t.dtype, t.storage_offset(), t.untyped_storage()._cdata

    def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
        if isinstance(a, FakeTensor) or isinstance(b, FakeTensor):
            return identity(a) == identity(b)
        return bool(same_before(a, b))

    def original_value(self: Any, name: str) -> torch.Tensor:
        found = value_before(self, name)
        if not isinstance(found, FakeTensor):
            return found
        for fake in (found, self.constants[name]):
            real = cross.real.get(fake.untyped_storage()._cdata)
            if real is not None:
                return torch.as_strided(real, fake.size(), fake.stride(), fake.storage_offset()).as_subclass(OnCuda)
        raise RuntimeError(f"constant {name} was made while compiling and has no bytes without a device")

    _set(stack, graph, is_same_tensor=is_same)
    _set(stack, graph.GraphLowering, get_original_value_of_constant=original_value)


def _weights_fit() -> str | None:
    taken = list(inspect.signature(_resolve("torch._inductor.graph.is_same_tensor")).parameters)
    return None if len(taken) == 2 else f"is_same_tensor now takes {', '.join(taken)}"


def _convolutions(stack: contextlib.ExitStack, cross: Cross) -> None:
    from torch._prims_common import suggest_memory_format

    del cross
    format_before = torch._C._conv_determine_backend_memory_format

    def format_of(x: torch.Tensor, weight: torch.Tensor, backend: Any) -> torch.memory_format:
        """Where cuDNN's result lies: channels last if either operand does, but for float64."""
        if x.device.type != "cuda":
            return format_before(x, weight, backend)
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        if last is None or torch.float64 in (x.dtype, weight.dtype):
            return torch.contiguous_format
        found = {suggest_memory_format(x), suggest_memory_format(weight)}
        return last if last in found else torch.contiguous_format

    _set(stack, torch._C, _conv_determine_backend_memory_format=format_of)


_CUDA = (
    "is_available device_count current_device synchronize get_device_properties get_device_capability "
    "_exchange_device _maybe_exchange_device get_rng_state set_rng_state"
)
_FORGOTTEN = ("torch._inductor.runtime.hints.DeviceProperties.create.cache_clear",)

PATCHES = (
    Patch(
        "torch-cuda",
        "Inductor asks torch.cuda what the device is; the answers come from targets.toml",
        "no hook upstream; pytorch PR 185328 (2.15) retargets the architecture alone, and still measures on a device",
        (*(f"torch.cuda.{name}" for name in _CUDA.split()), *_FORGOTTEN),
        _torch_cuda,
    ),
    Patch(
        "fake-tensors",
        "with is_available() true a fake cuda tensor would initialise the device",
        "fake cuda without a device is supported on the CUDA build: pytorch PRs 160431 and 163187",
        ("torch._subclasses.fake_tensor.FakeTensorMode.avoid_device_init",),
        _fake_tensors,
    ),
    Patch(
        "device-interface",
        "Inductor's view of devices; registering an interface is a supported extension",
        "torch._dynamo.device_interface, register_interface_for_device",
        (
            "torch._dynamo.device_interface.CudaInterface.Worker",
            "torch._dynamo.device_interface.device_interfaces",
            "torch._dynamo.device_interface.get_interface_for_device",
        ),
        _device_interface,
    ),
    Patch(
        "triton-driver",
        "Triton compiles for the active driver's target; registers and spills are read from the cubin",
        "public: triton.runtime.driver.set_active",
        ("triton.runtime.driver", "triton.backends.nvidia.driver.CudaDriver"),
        _triton_driver,
    ),
    Patch(
        "autotuning",
        "the block that measures candidates on the device compiles them all and takes one by the cost model",
        "no hook upstream; CachingAutotunerPlugin (2.13) has no registration point",
        (
            "torch._inductor.codegen.wrapper.PythonWrapperCodegen.generate_and_run_autotune_block",
            "torch._inductor.runtime.triton_heuristics.CachingAutotuner.precompile",
            "torch._inductor.runtime.triton_heuristics.CachingAutotuner.save_gpu_kernel",
        ),
        _autotuning,
        _autotuning_fits,
    ),
    Patch(
        "weights",
        "weights on a fake device have no address to compare and no bytes to write; both are remembered",
        "pytorch issue 153697",
        (
            "torch._inductor.graph.is_same_tensor",
            "torch._inductor.graph.GraphLowering.get_original_value_of_constant",
            "torch._inductor.compile_fx._aoti_flatten_inputs",
            "torch._inductor.compile_fx.compile_fx_aot",
            "torch._inductor.package.package_aoti",
        ),
        _weights,
        _weights_fit,
    ),
    Patch(
        "convolutions",
        "torch's CPU build has no cuDNN, so it says that a convolution's result is contiguous where cuDNN's is in "
        "channels last; code built on that reads the wrong elements",
        "at::cudnn_conv_suggest_memory_format, which the CUDA build asks",
        ("torch._C._conv_determine_backend_memory_format", "torch._prims_common.suggest_memory_format"),
        _convolutions,
    ),
)
