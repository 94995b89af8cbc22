"""Compile every Triton kernel for GPUs that need not be there: ``python -m benchmarks.triton_static``.

The one thing to know: it counts instructions and resources; it says nothing about speed.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from benchmarks.tables import Section, markdown, print_section
from kbitc.kernels.gpu.dequantize import columns_kernel, rows_kernel
from kbitc.kernels.gpu.encode import encode_kernel
from kbitc.kernels.gpu.gemv import gemv_kernel
from kbitc.kernels.gpu.int8 import int8_kernel
from kbitc.kernels.gpu.launch import INT8_TILE, scales_a_chunk
from kbitc.kernels.gpu.matmul import matmul_kernel
from kbitc.kernels.gpu.tiles import TABLE, Tiles

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
    "encode": (encode_kernel, "encode", {}),
    "int8": (int8_kernel, "", INT8_TILE),
}
FORMS = ("plain", "zp", "dq", "out")
EVEN = ("row_stride", "row_words", "features", "count", "x_stride")  # multiples of 16, as in most models
LEAST = ("matrix_ops", "wide_loads", "weight_bytes")
COLUMNS = (
    ("kernel", "kernel", ""),
    ("tiles", "tiles", ""),
    ("bits", "k", ""),
    ("form", "form", ""),
    ("x", "x", ""),
    ("target", "target", ""),
    ("registers", "registers", "d"),
    ("spills", "spills", "d"),
    ("shared", "shared", "d"),
    ("shared_limit", "of", "d"),
    ("matrix_ops", "matrix ops", "d"),
    ("wide_loads", "wide loads", "d"),
    ("weight_bytes", "load", "d"),
)
MATRIX_OPS = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma)")
WIDE_LOADS = re.compile(
    r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|global_load_dwordx4|buffer_load_dwordx4"
)


@dataclass(frozen=True)
class Figures:
    """What one kernel compiled to; ``spills`` in bytes of spill stores and loads (registers on AMD)."""

    kernel: str
    tiles: str  # rows x chunks of the weight, a program
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


def is_there(name: str, bits: int, form: str, x: str) -> bool:
    """Whether a kernel has such a form: LLM.int8() takes plain bytes, outlier columns concern products."""
    if (form == "out" and name not in {"gemv", "matmul", "experts"}) or (
        x == "fp32" and name in {"matmul", "experts"}
    ):
        return False
    return {"int8": (bits, form) == (8, "plain"), "encode": form != "dq"}.get(name, True)


def tiles_of(name: str) -> tuple[Tiles | None, ...]:
    """Those of a kernel: shipped first, then what it is measured against; None where they are fixed."""
    return tuple(TABLE.get(KERNELS[name][1], (None,)))


def compile_one(
    name: str, bits: int, form: str, target: str, x: str = "fp16", *, tiles: Tiles | None = None
) -> Figures:
    """Compile a kernel as it is launched for blocks of 64, with the shipped tiles or the given ones.

    ``form`` is one of ``FORMS``.
    """
    kernel, _, fixed = KERNELS[name]
    kernel = kernel.fn if isinstance(kernel, Autotuner) else kernel
    place, limit = TARGETS[target]
    tiles = tiles or tiles_of(name)[0]
    constants: dict[str, Any] = {
        "BITS": bits, "BLOCK": 64, "HAS_ZEROS": form == "zp", "HAS_DQ": form == "dq",
        "HAS_OUTLIERS": form == "out", "KIND": x,
        "SCALES": scales_a_chunk(64), "IS_ALIGNED": True, **fixed,
    }  # fmt: skip
    options: dict[str, Any] = {}
    if tiles:
        config = tiles.config(place.warp_size)
        constants |= config.kwargs
        options = {arg: value for arg, value in config.all_kwargs().items() if arg not in config.kwargs}
    constants = {arg: value for arg, value in constants.items() if arg in kernel.arg_names}
    number = "*fp32" if x == "fp32" else "*i64"
    outputs = {"dequantize": number, "embedding": number, "any columns": "*fp16", "encode": "*i32"}
    types = {
        "x": number if name != "int8" else "*i8",
        "out": (outputs | {"int8": "*i32"}).get(name, "*fp32"),
        "values": "*fp32" if x == "fp32" else f"*{x}", "inverses": "*fp32", "bounds": "*fp32",
        "ids": "*i64", "planes": "*u8", "words": "*i32", "scales": "*u8" if form == "dq" else "*fp16",
        "zeros": "*fp16" if form == "zp" else "*fp32", "offsets": "*i32" if name == "experts" else "*fp32",
        "outlier_values": "*fp16" if form == "out" else "*fp32",
        "outlier_index": "*i32" if form == "out" else "*fp32",  # what is not there is the codebook
        **dict.fromkeys(("codebook", "scale_codebook", "scale_absmax", "scale_mean"), "*fp32"),
    }  # fmt: skip
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if signature[arg].startswith("*") or arg in EVEN
    }
    built = triton.compile(ASTSource(kernel, signature, constants, aligned), target=place, options=options)
    text = built.asm["ptx"] if place.backend == "cuda" else built.asm["amdgcn"]
    registers, spills = _registers(built, place.backend)
    shape = f"{tiles.rows} x {tiles.chunks}" if tiles else "-"
    return Figures(
        name, shape, bits, form, x, target, registers, spills, built.metadata.shared, limit,
        len(MATRIX_OPS.findall(text)), len(WIDE_LOADS.findall(text)), _weight_bytes(built.asm["ttgir"]),
    )  # fmt: skip


def _weight_bytes(text: str) -> int:
    """The narrowest load of words of the weight; 0 without one."""
    layouts = set(re.findall(r"load [^\n]*tensor<\S+x!tt\.ptr<i32>, (#\w+)>", text))
    found = [re.search(rf"{name} = #ttg\.blocked<{{sizePerThread = \[(\d+)\]", text) for name in layouts]
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


NOTE = (
    "For blocks of 64. Over the given k: the most registers a thread, bytes spilled and bytes of shared "
    "memory; the fewest matrix and 16-byte load instructions, and the narrowest load of packed words in "
    "bytes. `any columns` reads bytes: it is for short last chunks and blocks that are no multiple of 4."
)
Given = tuple[str, int, str, str, str, Tiles | None]


def _compile(given: Given) -> Figures:
    *what, tiles = given
    return compile_one(*what, tiles=tiles)  # type: ignore[arg-type]


def summary(found: Sequence[Figures]) -> Section:
    """A line a kernel, form and target: the worst over the bits."""
    rows = []
    same = attrgetter("kernel", "tiles", "form", "x", "target")
    for _, group in itertools.groupby(sorted(found, key=same), same):
        each = list(group)
        row = asdict(each[0]) | {"bits": " ".join(str(one.bits) for one in each)}
        row |= {name: max(getattr(one, name) for one in each) for name in ("registers", "spills", "shared")}
        rows.append(row | {name: min(getattr(one, name) for one in each) for name in LEAST})
    title = f"triton {triton.__version__}, no GPU: nothing is said of speed"
    return Section(title, COLUMNS, rows, [NOTE])


def main() -> None:
    """Print the figures as they come and their summary; with --markdown, write that."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--x", nargs="*", default=["fp16"], help="fp16, bf16, fp32")
    parser.add_argument("--kernels", nargs="*", default=list(KERNELS))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--candidates", action="store_true", help="what KBITC_AUTOTUNE=1 tries, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--markdown", type=Path, help="file to write")
    chosen = parser.parse_args()
    given: list[Given] = [
        (*each, tiles)
        for each in itertools.product(chosen.kernels, chosen.bits, chosen.forms, chosen.targets, chosen.x)
        if is_there(*each[:3], each[4])
        for tiles in tiles_of(each[0])[: None if chosen.candidates else 1]
    ]
    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
        found = list(track(pool.map(_compile, given), "compiling", len(given)))
    section = summary(found)
    print_section(Console(width=None if sys.stdout.isatty() else 160), section)
    if chosen.markdown:
        head = ["# Triton kernels, compiled ahead of time"]
        chosen.markdown.write_text(markdown(head, [section]), encoding="utf-8")


if __name__ == "__main__":
    main()
