"""Compile every Triton kernel for GPUs that need not be there: ``python -m benchmarks.triton_static``.

The one thing to know: it counts instructions and resources; it says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kbitc.kernels.gpu.dequantize import dequantize_kernel
from kbitc.kernels.gpu.gemm import gemm_kernel
from kbitc.kernels.gpu.gemv import gemv_kernel
from kbitc.kernels.gpu.launch import GEMV_ROWS, gemv_warps

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
KERNELS: dict[str, tuple[Any, dict[str, int]]] = {
    "gemv M=1": (gemv_kernel, {"M": 1, "ROWS": GEMV_ROWS}),
    "gemv M=16": (gemv_kernel, {"M": 16, "ROWS": GEMV_ROWS}),
    "gemm": (gemm_kernel, {"IS_GRAD": False, "TILE_M": 64, "TILE_N": 64, "TILE_K": 32}),
    "input_grad": (gemm_kernel, {"IS_GRAD": True, "TILE_M": 64, "TILE_N": 64, "TILE_K": 32}),
    "dequantize": (dequantize_kernel, {"HAS_IDS": False, "COLUMNS": 1024}),
    "embedding": (dequantize_kernel, {"HAS_IDS": True, "COLUMNS": 1024}),
}
MATRIX_OPS = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma)")
WIDE_LOADS = re.compile(
    r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|global_load_dwordx4|buffer_load_dwordx4"
)


@dataclass(frozen=True)
class Figures:
    """What one kernel compiled to; ``spills`` in bytes of spill stores and loads (registers on AMD)."""

    kernel: str
    bits: int
    form: str
    target: str
    spills: int
    shared: int
    shared_limit: int
    matrix_ops: int
    wide_loads: int
    weight_bytes: int  # that one thread reads of the widest plane at once, by the kernel's layout


def compile_one(name: str, bits: int, form: str, target: str) -> Figures:
    """Compile a kernel for fp16 inputs; ``form`` is "plain", "zp" or "dq"."""
    kernel, tiles = KERNELS[name]
    place, limit = TARGETS[target]
    constants: dict[str, Any] = {
        "BITS": bits, "BLOCK": 64, "HAS_ZEROS": form == "zp", "HAS_DQ": form == "dq", **tiles
    }  # fmt: skip
    types = {
        "x": "*fp16", "out": "*fp32" if "gemv" in name else "*fp16", "ids": "*i64", "planes": "*u8",
        "scales": "*u8" if form == "dq" else "*fp16", "zeros": "*fp16" if form == "zp" else "*fp32",
    }  # fmt: skip
    floats = {"codebook", "scale_codebook", "scale_absmax", "scale_mean"}
    signature = {
        arg: "constexpr" if arg in constants else types.get(arg, "*fp32" if arg in floats else "i32")
        for arg in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if signature[arg].startswith("*") or arg in ("row_stride", "features", "count")
    }
    source = ASTSource(kernel, signature, {k: constants[k] for k in constants}, aligned)
    options = {"num_warps": gemv_warps(bits, place.warp_size)} if "gemv" in name else {}
    built = triton.compile(source, target=place, options=options)
    text = built.asm["ptx"] if place.backend == "cuda" else built.asm["amdgcn"]
    return Figures(
        name, bits, form, target, _spills(built, place.backend), built.metadata.shared, limit,
        len(MATRIX_OPS.findall(text)), len(WIDE_LOADS.findall(text)),
        _weight_bytes(built.asm["ttgir"]),
    )  # fmt: skip


def _weight_bytes(text: str) -> int:
    """The widest run of bytes a thread holds among the loads of 8-bit integers."""
    layouts = set(re.findall(r"load [^\n]*x(?:!tt\.ptr<i8>|i8), (#\w+)>", text))
    sizes = [re.search(rf"{name} = #ttg\.blocked<{{sizePerThread = \[\d+, (\d+)\]", text) for name in layouts]
    return max((int(found[1]) for found in sizes if found), default=0)


def _spills(built: Any, backend: str) -> int:
    if backend == "hip":
        return sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", built.asm["amdgcn"]))
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    # Nothing here has local arrays, so whatever lies in local memory or on the stack was spilled.
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def main() -> None:
    """Print the table and write it to ``benchmarks/results/triton_static.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--forms", nargs="*", default=["plain", "zp", "dq"])
    chosen = parser.parse_args()
    found = []
    for name in KERNELS:
        for target in TARGETS:
            for bits in chosen.bits:
                for form in chosen.forms:
                    found.append(compile_one(name, bits, form, target))
                    print(*asdict(found[-1]).values(), sep="\t", flush=True)
    path = Path(__file__).parent / "results" / "triton_static.json"
    rows = [asdict(figures) for figures in found]
    path.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
