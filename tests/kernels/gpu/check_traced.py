"""What a compiler sees of the ops on a GPU: traced with fake tensors, no GPU needed.

In a process of its own, because Triton must believe that there is one.
"""

import sys

import torch
import triton
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from triton.backends.compiler import GPUTarget

from kbitc.kernels import ops  # noqa: F401  # registers torch.ops.kbit
from kbitc.quantizers import quantize_weight

kbit = torch.ops.kbit
WRAPPER = "triton_kernel_wrapper_functional"


class Driver:
    """Of a GPU that is not there; what becomes of it is not asked."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def graph_of(function, *given, dynamic=False):
    """The graph that a compiler gets of a function, its tensors on a GPU; the rows of the first symbolic."""
    env = ShapeEnv()
    seen = []

    def keep(graph, inputs):
        del inputs
        seen.append(graph.graph)
        return graph

    graph = fx.Graph()
    fakes = []
    with FakeTensorMode(shape_env=env):
        for i, value in enumerate(given):
            if isinstance(value, torch.Tensor):
                rows = value.shape[0] if i or not dynamic else symbol(env, value.shape[0])
                fakes.append(torch.empty(rows, *value.shape[1:], dtype=value.dtype, device="cuda"))
        inputs = iter([graph.placeholder(f"input_{i}") for i in range(len(fakes))])
        args = tuple(next(inputs) if isinstance(value, torch.Tensor) else value for value in given)
        graph.output((graph.call_function(function, args),))
        aot_module_simplified(fx.GraphModule({}, graph), fakes, fw_compiler=keep)
    return seen[0]


def symbol(env, hint):
    """A size that is not known while tracing."""
    found = env.create_symbol(hint, ConstantSource("rows"), DimDynamic.DYNAMIC)
    return env.create_symintnode(found, hint=hint, source=ConstantSource("rows"))


def check(name, kernels, function, *given):
    """Of an op: so many kernels, each of which writes to its result only, and no op of ours."""
    nodes = list(graph_of(function, *given).nodes)
    found = [node for node in nodes if WRAPPER in str(node.target)]
    assert len(found) == kernels, f"{name}: {len(found)} kernels"
    for node in found:
        assert node.kwargs["tensors_to_clone"] == ["out"], f"{name}: {node.kwargs['tensors_to_clone']}"
    assert not [node for node in nodes if str(node.target).startswith("kbit")], name


def main():
    triton.runtime.driver.set_active(Driver())
    operands = quantize_weight(torch.randn(128, 1031), "nf4:64+zp+dq+out1%").operands()
    half = torch.randn(70, 1031).half()
    bias = torch.randn(128)
    check("linear", 1, kbit.linear, half[:1], *operands, bias)
    check("linear", 1, kbit.linear, half[:7], *operands, None)
    check("linear", 2, kbit.linear, half[:7].float(), *operands, None)  # whole chunks, then the short one
    check("linear", 1, kbit.linear, half, *operands, None)  # 1031 columns are no whole int64 words
    check("input_grad", 1, kbit.input_grad, half[:, :128], *operands)
    check("embedding", 1, kbit.embedding, torch.zeros(2, 3, dtype=torch.long), *operands, torch.float16)
    check("dequantize", 2, lambda _, *rest: kbit.dequantize(*rest, torch.float32), half, *operands)
    even = quantize_weight(torch.randn(128, 1024), "nf4:64").operands()  # written four numbers at a time
    check("linear", 1, kbit.linear, torch.randn(70, 1024).half(), *even, bias)
    check("embedding", 1, kbit.embedding, torch.zeros(2, 3, dtype=torch.long), *even, torch.bfloat16)
    eight = quantize_weight(torch.randn(128, 1031), "int8:1031+out1%").operands()
    check("linear_int8", 1, kbit.linear_int8, half, *eight, None)
    experts = quantize_weight(torch.randn(3, 128, 512), "int3:64").operands()
    offsets = torch.tensor([20, 50, 70], dtype=torch.int32)
    check("grouped_linear", 1, kbit.grouped_linear, half[:, :512], *experts, offsets)
    check("grouped_input_grad", 3, kbit.grouped_input_grad, half[:, :128], *experts, offsets)
    tensors, numbers = operands.tensors, list(operands.numbers)
    present = [tensor for tensor in tensors if tensor is not None]

    def two(x, *parts):
        rest = iter(parts)
        each = [None if tensor is None else next(rest) for tensor in tensors]
        return kbit.linears(x, each * 2, numbers * 2, [None, None])

    check("linears", 2, two, half[:1], *present)
    graph = graph_of(kbit.linear, half, *operands, None, dynamic=True)
    assert any(node.target is kbit.linear.default for node in graph.nodes)  # its kernels are not known yet
    sys.stdout.write("all seen\n")


if __name__ == "__main__":
    main()
