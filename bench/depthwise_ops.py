"""One depthwise convolution with a bias, by kernel and map, against others and the roof; one thread, process time.

python -m bench.depthwise_ops            table on stdout
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m bench.depthwise_ops            the same without AVX-512

All read and write channels last but OpenVINO, whose plugin is handed and hands back channels first. onednn: the call
that Inductor's freezing makes, weights packed ahead. roof: the slower of the multiply-adds inside the map at the rate
of a large matrix product, and the bytes of map, weight and result at that of a copy. A case whose numbers are wrong
gets no time. Process time is given, medians of rounds taken in turn, since the machine may be shared. Held to AVX2, our
kernel is compiled for that, float32 alone is timed, and OpenVINO, which takes what it finds, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench import roof
from bench.timing import interleave
from compiled_attn.ir import _torch, machine
from compiled_attn.ops import depthwise_block
from compiled_attn.ops.templates import cpp_depthwise

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """A batch of one, as many positions out as in over the stride."""

    kernel: int
    dilation: int
    side: int
    channels: int
    stride: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel - 1) // 2

    @property
    def text(self) -> str:
        name = f"{self.kernel}x{self.kernel}" + (f" d{self.dilation}" if self.dilation > 1 else "")
        name += f" s{self.stride}" if self.stride > 1 else ""
        return f"{name:<9} {self.side}x{self.side}x{self.channels:<5} {str(self.dtype).removeprefix('torch.'):<9}"

    def places(self) -> int:
        """Multiply-adds of a channel, those beyond the border left out."""
        out = -(-self.side // self.stride)
        taps = range(-self.padding, self.padding + 1, self.dilation)
        along = sum(0 <= y * self.stride + t < self.side for y in range(out) for t in taps)
        return along**2


SHAPES = ((3, 1), (5, 1), (7, 1), (7, 3), (13, 1), (31, 1))
MAPS = ((56, 96), (14, 384))
CASES = [Case(k, d, *m, dtype=t) for t in TOLERANCE for m in MAPS for k, d in SHAPES]
CASES += [Case(3, 1, 112, 32), Case(3, 1, 112, 96, 2), Case(5, 1, 28, 240), Case(3, 1, 7, 960), Case(7, 1, 7, 768)]


def calls(case: Case) -> dict[str, Callable[[], torch.Tensor]]:
    """Peer -> one call; the first is the equation."""
    random = torch.Generator().manual_seed(0)
    shape = (1, case.channels, case.side, case.side)
    x = torch.randn(shape, generator=random).to(case.dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(case.kernel, case.kernel, case.channels, generator=random).to(case.dtype) / case.kernel
    bias = torch.randn(case.channels, generator=random).to(case.dtype)
    pairs = [[n, n] for n in (case.stride, case.padding, case.dilation)]
    kernel = weight.permute(2, 0, 1).unsqueeze(1).contiguous()
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        kernel, pairs[1], pairs[0], pairs[2], case.channels, list(shape)
    )

    def onednn() -> torch.Tensor:
        more = (pairs[1], pairs[0], pairs[2], case.channels, "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *more)

    options = {"stride": pairs[0], "padding": pairs[1], "dilation": pairs[2]}
    made = {
        "reference": lambda: depthwise_block.reference(x.double(), weight.double(), bias.double(), **options),
        "ours": ours(x, weight, bias, pairs),
        "eager": lambda: F.conv2d(x, kernel, bias, *pairs, case.channels),
        "onednn": onednn,
    }
    found = openvino(case, x, kernel, bias)
    return made if found is None else {**made, "openvino": found}


def held() -> bool:
    """Whether torch was told to do without AVX-512, which it has."""
    return "avx512f" in machine.here().flags and torch.backends.cpu.get_cpu_capability() == "AVX2"


def compiled_for() -> dict[str, Any]:
    """Inductor's options for our kernel: this machine's, or AVX2's where torch is held to them."""
    return _torch.cpu_options("x86-64-v3", 256) if held() else {}


def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, pairs: list[list[int]]) -> Any:
    """The template's kernel, compiled by itself."""
    function = _torch.cpp_function(cpp_depthwise.standalone(x.dtype, "none", False), compiled_for())
    shape = depthwise_block.shape(x, weight, bias, stride=pairs[0], padding=pairs[1], dilation=pairs[2])
    out = torch.empty_like(shape)
    numbers = torch.tensor(cpp_depthwise.numbers(x, None, None, out, weight.shape[:2], *pairs))
    tensors = torch.tensor([t.data_ptr() for t in (x, weight, bias)] + [0, 0, 0, 0, out.data_ptr()])

    def call() -> torch.Tensor:
        function(tensors.data_ptr(), numbers.data_ptr())
        return out

    call.keep = (x, weight, bias)  # type: ignore[attr-defined]
    return call


def openvino(case: Case, x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> Any:
    """OpenVINO's grouped convolution in the same precision; None where it is not installed, or all are held to AVX2."""
    if held():
        return None
    try:
        import openvino as ov
        from openvino import opset13 as ops
    except ImportError:
        return None
    dense = x.float().contiguous().numpy()
    given = ops.parameter(list(dense.shape), ov.Type.f32)
    filters = ops.constant(kernel.float().unsqueeze(1).numpy())
    border, steps, spread = ([n, n] for n in (case.padding, case.stride, case.dilation))
    product = ops.group_convolution(given, filters, steps, border, border, spread)
    total = ops.add(product, ops.constant(bias.float().view(1, -1, 1, 1).numpy()))
    hint = "bf16" if case.dtype == torch.bfloat16 else "f32"
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    request = ov.Core().compile_model(ov.Model([total], [given]), "CPU", options).create_infer_request()
    return lambda: torch.from_numpy(next(iter(request.infer([dense], share_inputs=True, share_outputs=True).values())))


def line(case: Case, rates: roof.Roof) -> str:
    """The case's row, microseconds of process time; a peer whose numbers are wrong stands as such."""
    made = calls(case)
    with torch.no_grad():
        wanted = made.pop("reference")()
        size = wanted.abs().max().item()
        good = {
            n: c for n, c in made.items() if (c().double() - wanted).abs().max().item() < TOLERANCE[case.dtype] * size
        }
        times = interleave(good, rounds=9, round_seconds=0.03)
    flops = 2 * case.channels * case.places()
    moved = 2 if case.dtype == torch.bfloat16 else 4
    traffic = moved * case.channels * (case.side**2 + case.kernel**2 + (-(-case.side // case.stride)) ** 2)
    least = max(flops / (rates.gflops_cpu * 1e9), traffic / (rates.copy_gb_per_s * 1e9)) * 1e6
    cells = [f"{times[n].cpu_median * 1e3:9.1f}" if n in times else "    wrong" for n in made]
    best = min(times[n].cpu_median for n in times if n != "ours")
    return f"{case.text} " + " ".join(cells) + f" {least:8.1f}   {best / times['ours'].cpu_median:5.2f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    rates = roof.measure("float32")
    print(
        f"roof: {rates.gflops_cpu:.0f} GF/s of a float32 product, {rates.copy_gb_per_s:.1f} GB/s of a copy; one thread"
    )
    heads = ("ours", "eager", "onednn") + (() if held() else ("openvino",))
    print(f"instructions: {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'kernel':<9} {'map':<11} {'':<9} " + " ".join(f"{h:>9}" for h in heads) + "     roof   best other / ours")
    for chosen in (c for c in CASES if c.dtype == torch.float32 or not held()):
        print(line(chosen, rates), flush=True)
