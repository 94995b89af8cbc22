"""The native CPU kernels: encoding, and what they refuse, for every kernel set that this machine runs."""

from __future__ import annotations

import pytest
import torch

from kbitc.backends.cpu import native_trace  # noqa: F401  # defines two ops
from kbitc.formats.encode import encode_rows
from kbitc.formats.scales import store_scales, to_16_bits
from kbitc.kernels import ops, reference, training_ops  # noqa: F401
from kbitc.kernels.cpu.build import find_compiler, load
from kbitc.quantizers import quantize
from kbitc.tensor.packing import draft

try:
    find_compiler()
except Exception as error:  # noqa: BLE001
    pytest.skip(f"the native kernels cannot be built: {error}", allow_module_level=True)


def packed(rows, features, spec, seed=0, experts=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, features) if experts is None else (experts, rows, features)
    return quantize(torch.randn(shape, generator=generator).to(dtype), spec)


def linear(x, weight, bias=None):
    return torch.ops.kbit.linear(x, *weight.operands(), bias)


@pytest.mark.parametrize("flags", ["", "+zp", "+dq", "+out2%"])
@pytest.mark.parametrize(
    "datatype", ["int4", "nf4", "fp3", "nf8", "dynamic8", "fp8e6", "quantile5", "bof2", "int8"]
)
@pytest.mark.parametrize(("features", "block"), [(1100, 64), (256, 48), (77, 7), (5, 64)])
def test_encode_gives_the_same_bytes(kernel_set, datatype, flags, features, block):
    if datatype == "bof2" and flags == "+zp":
        flags = ""
    weight = torch.randn(19, features)
    weight[3] = 0
    weight[4, :3] = 1e-39
    spec = f"{datatype}:{block}{flags}"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = draft(weight.to(dtype), spec)
        _, _, scales = store_scales(made.scales, made.spec, made.codebook)
        zeros = None if made.zeros is None else to_16_bits(made.zeros)
        operands = (scales, zeros, made.codebook, made.outlier_index, made.spec.bits, made.spec.block)
        assert torch.equal(encode_rows(made.rows, *operands), made.packed().planes)


@pytest.mark.parametrize("crowd", [1, 7, 100])
def test_encode_finds_levels_that_crowd(kernel_set, crowd):
    """Many boundaries in one cell of the grid over [-1, 1], at its ends too, and values at boundaries."""
    close = torch.arange(crowd) * 1e-7
    levels = (
        torch.cat([-1 + close, torch.tensor([-0.5]), 0.25 + close, torch.tensor([0.5, 1.0])]).sort().values
    )
    middles = (levels[1:] + levels[:-1]) / 2
    picked = torch.randint(0, len(middles), (5, 300))
    rows = torch.where(torch.rand(5, 300) < 0.5, middles[picked], levels[picked]) + 1e-7 * torch.randn(5, 300)
    rows[0, :3] = torch.tensor([-1.0, 1.0, 0.0])
    given = (rows, torch.ones(5, 5), None, levels, None, 8, 64)
    assert torch.equal(encode_rows(*given), torch.ops.kbit.encode(*given))


def test_encode_refuses_what_does_not_fit(kernel_set):
    rows, scales, book = torch.randn(3, 64), torch.ones(3, 1), torch.linspace(-1, 1, 16)
    encode = torch.ops.kbit.encode
    with pytest.raises(RuntimeError, match="scales have shape"):
        encode(rows, torch.ones(3, 2), None, book, None, 4, 64)
    with pytest.raises(RuntimeError, match="codebook"):
        encode(rows, scales, None, torch.linspace(-1, 1, 17), None, 4, 64)
    with pytest.raises(RuntimeError, match="2-D"):
        encode(rows[0], scales, None, book, None, 4, 64)
    with pytest.raises(IndexError):
        encode(rows, scales, None, book, torch.tensor([64], dtype=torch.int32), 4, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"planes": torch.zeros(5, 31, dtype=torch.uint8)}, "planes are"),
        ({"planes": torch.zeros(5, 32)}, "planes are"),
        ({"planes": torch.zeros(4, 32, dtype=torch.uint8)}, "scales have shape"),
        ({"scales": torch.zeros(5, 3)}, "scales have shape"),
        ({"scales": torch.zeros(5, 1, dtype=torch.int32)}, "expected float16"),
        ({"scales": torch.zeros(5, 1, dtype=torch.uint8)}, "scales are codes"),
        ({"codebook": torch.zeros(17)}, "codebook"),
        ({"codebook": torch.zeros(16, dtype=torch.float64)}, "codebook"),
        ({"zeros": torch.zeros(5, 2)}, "zeros have shape"),
        ({"bits": 9}, "9 bits"),
        ({"block": 0}, "block 0"),
        ({"in_features": 60}, "float input"),
        ({"outlier_values": torch.zeros(5, 1)}, "without their indices"),
        (
            {"outlier_values": torch.zeros(5, 1), "outlier_index": torch.tensor([64], dtype=torch.int32)},
            "outside",
        ),
        (
            {"outlier_values": torch.zeros(5, 2), "outlier_index": torch.tensor([1], dtype=torch.int32)},
            "outlier_values",
        ),
    ],
)
def test_wrong_operands_are_errors(kernel_set, fields, message):
    weight = packed(5, 64, "nf4:64")
    with pytest.raises((RuntimeError, IndexError), match=message):
        torch.ops.kbit.linear(torch.randn(1, 64), *weight.operands()._replace(**fields), None)


def test_wrong_inputs_are_errors(kernel_set):
    weight = packed(5, 64, "nf4:64")
    for x in (torch.randn(2, 63), torch.ones(2, 64, dtype=torch.long), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="expected a float input"):
            linear(x, weight)
    with pytest.raises(RuntimeError, match="bias of shape"):
        linear(torch.randn(1, 64), weight, torch.randn(6))
    grouped = packed(5, 64, "nf4:64", experts=3)
    for offsets in ([1, 2], [2, 1, 3], [1, 2, 9], [-1, 1, 2]):
        with pytest.raises(RuntimeError, match="offsets"):
            torch.ops.kbit.grouped_linear(torch.randn(4, 64), *grouped.operands(), torch.tensor(offsets))


def test_damaged_codes_stay_in_bounds(kernel_set):
    """int4 has 15 levels: code 15 means nothing, and must read nothing but zero."""
    weight = packed(5, 100, "int4:64")
    planes = torch.full_like(weight.packed.planes, 255)
    operands = weight.operands()._replace(planes=planes)
    assert torch.ops.kbit.dequantize(*operands, torch.float32).abs().max() == 0
    assert torch.ops.kbit.linear(torch.randn(4, 100), *operands, None).isfinite().all()


OPS = [
    "linear", "linears", "embedding", "dequantize", "input_grad", "grouped_linear", "grouped_input_grad", "encode",
]  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_opcheck(kernel_set, op):
    weight, experts = packed(6, 70, "nf4:64+zp"), packed(6, 70, "int3:32+dq", experts=2)
    operands = weight.operands()
    x = torch.randn(3, 70, requires_grad=True)
    offsets = torch.tensor([1, 3], dtype=torch.int32)
    scales, zeros, codebook = operands.scales.float(), operands.zeros.float(), operands.codebook
    arguments = {
        "linear": (x, *operands, torch.randn(6, requires_grad=True)),
        "linears": (x, [*operands.tensors], [*operands.numbers], [None]),
        "embedding": (torch.tensor([1, 5]), *operands, torch.float32),
        "dequantize": (*experts.operands(), torch.float16),
        "input_grad": (torch.randn(3, 6), *operands),
        "grouped_linear": (x, *experts.operands(), offsets),
        "grouped_input_grad": (torch.randn(3, 6), *experts.operands(), offsets),
        "encode": (torch.randn(6, 70), scales, zeros, codebook, None, 4, 64),
    }[op]
    torch.library.opcheck(getattr(torch.ops.kbit, op).default, arguments)


def test_every_op_is_checked():
    assert load()
    names = torch._C._dispatch_get_all_op_names()
    defined = {name.split("::")[1].split(".")[0] for name in names if name.startswith("kbit::")}
    # test_reference.py, test_scale_search.py, test_int8.py, test_rounding.py
    elsewhere = {"select", "search_scales", "linear_int8", "feed_back_strip", "descend_strip"}
    # test_training.py
    elsewhere |= {"optimizer_step", "update_squares", "round_tensor"}
    # backends/test_cpu_native.py
    elsewhere |= {"attend", "cached", "build_step", "run_step", "step_spent", "free_step"}
    assert defined == {*OPS, *elsewhere, "cpu_kernels", "use_cpu_kernels", "work_alone"}
