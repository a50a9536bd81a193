"""What a traced launch of a Triton kernel looks like to Inductor; used by the tests of the Triton templates."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from compiled_attn.ir import _torch


def launches(function, *args):
    """[(kernel's name, configuration, arguments)] of the kernels that `function` launches, sizes symbolic."""
    traced = make_fx(function, tracing_mode="symbolic")(*args)
    found = []
    for tuner, arguments in _torch.triton_launches(traced.graph):
        (config,) = tuner.configs
        found.append((tuner.base_fn.__name__, config, arguments))
    return found


def exported_targets(function, args, dynamic_shapes):
    """Names of the operators of torch.export's graph of `function`."""

    class Model(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    exported = torch.export.export(Model(), args, dynamic_shapes=dynamic_shapes)
    return [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
