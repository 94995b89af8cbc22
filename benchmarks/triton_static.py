"""Compile every Triton kernel for GPUs that need not be there: ``python -m benchmarks.triton_static``.

The one thing to know: it counts instructions and resources; it says nothing about speed.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kbitc.kernels.gpu.dequantize import columns_kernel, rows_kernel
from kbitc.kernels.gpu.gemv import gemv_kernel
from kbitc.kernels.gpu.launch import scales_a_chunk
from kbitc.kernels.gpu.matmul import matmul_kernel
from kbitc.kernels.gpu.tiles import TABLE

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
# Kernel, name of its tiles, and what else is fixed at compile time.
KERNELS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "gemv": (gemv_kernel, "gemv", {}),
    "matmul": (matmul_kernel, "matmul", {"IS_GROUPED": False}),
    "experts": (matmul_kernel, "matmul", {"IS_GROUPED": True}),
    "dequantize": (rows_kernel, "rows", {"HAS_IDS": False}),
    "embedding": (rows_kernel, "rows", {"HAS_IDS": True}),
    "any columns": (columns_kernel, "", {"HAS_IDS": True, "COLUMNS": 512}),
}
FORMS = ("plain", "zp", "dq")
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
    x: str
    target: str
    registers: int
    spills: int
    shared: int
    shared_limit: int
    matrix_ops: int
    wide_loads: int
    weight_bytes: int  # that one instruction loads of a row of the packed weight, by the kernel's layout


def compile_one(name: str, bits: int, form: str, target: str, x: str = "fp16") -> Figures:
    """Compile a kernel as it is launched for blocks of 64; ``form`` is one of ``FORMS``."""
    kernel, tiles_name, fixed = KERNELS[name]
    place, limit = TARGETS[target]
    constants: dict[str, Any] = {
        "BITS": bits, "BLOCK": 64, "HAS_ZEROS": form == "zp", "HAS_DQ": form == "dq", "KIND": x,
        "SCALES": scales_a_chunk(64), "IS_ALIGNED": True, **fixed,
    }  # fmt: skip
    options: dict[str, Any] = {}
    if tiles_name:
        tiles = TABLE[tiles_name]
        constants |= {**tiles.constants(), "TILE_M": tiles.m}
        options = tiles.options(place.warp_size)
    constants = {arg: value for arg, value in constants.items() if arg in kernel.arg_names}
    number = "*fp32" if x == "fp32" else "*i64"
    types = {
        "x": number, "out": {rows_kernel: number, columns_kernel: "*fp16"}.get(kernel, "*fp32"),
        "ids": "*i64", "planes": "*u8", "words": "*i32", "scales": "*u8" if form == "dq" else "*fp16",
        "zeros": "*fp16" if form == "zp" else "*fp32", "outlier_values": "*fp16", "outlier_index": "*i32",
        "offsets": "*i32",
        **dict.fromkeys(("codebook", "scale_codebook", "scale_absmax", "scale_mean"), "*fp32"),
    }  # fmt: skip
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if signature[arg].startswith("*") or arg in ("row_stride", "features", "count", "x_stride")
    }
    built = triton.compile(ASTSource(kernel, signature, constants, aligned), target=place, options=options)
    text = built.asm["ptx"] if place.backend == "cuda" else built.asm["amdgcn"]
    registers, spills = _registers(built, place.backend)
    return Figures(
        name, bits, form, x, target, registers, spills, built.metadata.shared, limit,
        len(MATRIX_OPS.findall(text)), len(WIDE_LOADS.findall(text)), _weight_bytes(built.asm["ttgir"]),
    )  # fmt: skip


def _weight_bytes(text: str) -> int:
    """The narrowest load of words of the weight; 0 without one."""
    layouts = set(re.findall(r"load [^\n]*tensor<\S+x!tt\.ptr<i32>, (#\w+)>", text))
    found = [re.search(rf"{name} = #ttg\.blocked<{{sizePerThread = \[\d+, (\d+)\]", text) for name in layouts]
    return min((4 * int(each[1]) for each in found if each and int(each[1]) > 1), default=0)


def _registers(built: Any, backend: str) -> tuple[int, int]:
    """Of a thread, and what was spilled."""
    if backend == "hip":
        text = built.asm["amdgcn"]
        used = re.findall(r"\.vgpr_count:\s*(\d+)", text)
        spilled = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)
        return max(map(int, used)), sum(map(int, spilled))
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    # Nothing here has local arrays, so whatever lies in local memory or on the stack was spilled.
    spilled = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    return max(map(int, re.findall(r"REG:(\d+)", usage))), sum(map(int, spilled))


def main() -> None:
    """Print the table; with --markdown, write it too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--x", nargs="*", default=["fp16"], help="fp16, bf16, fp32")
    parser.add_argument("--kernels", nargs="*", default=list(KERNELS))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--markdown", type=Path, help="file to write")
    chosen = parser.parse_args()
    names = [field.name for field in fields(Figures)]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    print("\n".join(lines), flush=True)
    for given in itertools.product(chosen.kernels, chosen.bits, chosen.forms, chosen.targets, chosen.x):
        lines.append("| " + " | ".join(str(value) for value in astuple(compile_one(*given))) + " |")
        print(lines[-1], flush=True)
    if chosen.markdown:
        title = "# Triton kernels, compiled ahead of time"
        note = f"triton {triton.__version__}; no GPU was there: nothing is said of speed."
        chosen.markdown.write_text("\n".join([title, "", note, "", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
