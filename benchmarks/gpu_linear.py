"""Speed of F.linear with packed weights on a GPU, against torch and peers in the same run.

    python -m benchmarks.gpu_linear [--shapes 4096x4096,...] [--m 1,2,...] [--specs nf4:64,...]
        [--dtype bf16|fp16] [--no-peers] [--device cuda|cpu] [--markdown FILE]

The one thing to know: every call is part of a CUDA graph that rotates over copies of the weight which the
L2 cache does not hold together, as a model does with its layers; the contenders of one M take turns, and
a large copy on the device, whose bandwidth all are compared with, is one of them. ``--device cpu`` runs the
same code where there is no GPU, as a check of this script.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.gpu import DTYPES, Clock, Loop, NoDevice, bars_section, device_line, reason, refuse, verdict
from benchmarks.gpu_layers import PEER_PACKAGES, PEERS, Layer, dense_name, packed, packed_name, torch_dense
from benchmarks.tables import Section, markdown, print_section

Shape = tuple[int, int]  # rows, in_features
Row = dict[str, Any]

SHAPES: list[Shape] = [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192)]
COUNTS = [1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 4096]
SPEC = "nf4:64"
MORE_AT: Shape = (4096, 14336)
MORE_SPECS = ["nf2:64", "nf3:64", "int4:64", "int8:64", "nf4:64+dq"]
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}

BANDWIDTH_BAR = 60.0  # percent of the copy bandwidth, at M = 1 and MORE_AT
SPEED_BARS = {1: 2.5, 16: 2.0, 4096: 0.8}  # by M, times torch
FASTER = [("nf3:64", "nf4:64"), ("nf2:64", "nf3:64")]  # the first than the second, at M = 1 and MORE_AT

COLUMNS = (
    ("count", "M", "d"),
    ("name", "weight", ""),
    ("us", "µs", ".2f"),
    ("gb_s", "GB/s of stored bytes", ".0f"),
    ("copy_percent", "% of copy", ".1f"),
    ("speedup", "x torch", ".2f"),
    ("error", "error", ".1e"),
    ("megabytes", "MB", ".2f"),
    ("reason", "", ""),
)
LEGEND = (
    "µs: median of a call in a CUDA graph, weights cold. % of copy: stored bytes a second over the bytes "
    "that a device-to-device copy of 1 GiB reads and writes a second, timed in turn with them. x torch: "
    "times as fast as F.linear with the dense weight of the same dtype. error: relative, of the product "
    "against float64 with the dequantized weight."
)


@dataclass(frozen=True)
class Bench:
    """What all shapes share.

    Attributes:
        copy: the large copy, ready to be timed.
        copy_bytes: that it reads and writes.
    """

    clock: Clock
    dtype: torch.dtype
    counts: Sequence[int]
    specs: Sequence[str] | None
    has_peers: bool
    copy: Loop
    copy_bytes: int

    def specs_at(self, shape: Shape) -> list[str]:
        """Those that were asked for, or the default of a shape."""
        if self.specs is not None:
            return list(self.specs)
        return [SPEC, *MORE_SPECS] if shape == MORE_AT else [SPEC]


def make_bench(options: argparse.Namespace) -> Bench:
    """Open the device."""
    clock = Clock(options.device)
    half = COPY_BYTES[options.device]
    source = torch.zeros(half, dtype=torch.uint8, device=clock.device)
    copy = clock.prepare([partial(torch.empty_like(source).copy_, source)])
    dtype = DTYPES[options.dtype]
    return Bench(clock, dtype, options.m, options.specs, options.peers, copy, 2 * half)


def shape_section(bench: Bench, shape: Shape) -> Section:
    """Everyone at one shape of the weight, over M."""
    rows, features = shape
    generator = torch.Generator(bench.clock.device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=bench.clock.device, dtype=bench.dtype)
    weight = normal(rows, features) * 0.02
    layers, found = make_layers(bench, shape, weight)
    del weight
    for count in bench.counts:
        found += race(bench, layers, normal(count, features))
    for row in found:
        row["shape"] = shape
    return Section(f"{rows} x {features} (rows x in_features)", COLUMNS, found)


def make_layers(bench: Bench, shape: Shape, weight: Tensor) -> tuple[list[Layer], list[Row]]:
    """Everyone who can be built, torch first, and a row with the reason for everyone else."""
    steps: dict[str, Callable[[], Layer]] = {
        packed_name(spec): partial(packed, weight, bench.clock, spec) for spec in bench.specs_at(shape)
    }
    if bench.has_peers:
        steps |= {name: partial(build, weight, bench.clock) for name, build in PEERS.items()}
    layers, failed = [torch_dense(weight, bench.clock)], []
    for name, step in steps.items():
        try:
            layers.append(step())
        except Exception as error:  # noqa: BLE001  # whatever it is becomes the row's reason
            failed.append({"name": name, "reason": reason(error)})
    return layers, failed


def race(bench: Bench, layers: Sequence[Layer], x: Tensor) -> list[Row]:
    """One row for each layer with this input."""
    rows, loops, raced = [], [bench.copy], []
    for layer in layers:
        row: Row = {"count": len(x), "name": layer.name, "megabytes": layer.nbytes / 1e6}
        rows.append(row)
        try:
            row["error"] = layer.error(x)
            loops.append(bench.clock.prepare([partial(product, x) for product in layer.products]))
        except Exception as error:  # noqa: BLE001  # whatever it is becomes the row's reason
            row["reason"] = reason(error)
            continue
        raced.append((row, layer))
    copied, *times = bench.clock.race(loops)
    bandwidth = bench.copy_bytes / copied
    for (row, layer), seconds in zip(raced, times, strict=True):
        row["us"] = 1e6 * seconds
        row["gb_s"] = layer.nbytes / seconds / 1e9
        row["copy_percent"] = 100 * layer.nbytes / seconds / bandwidth
        row["copy_gb_s"] = bandwidth / 1e9
    dense = rows[0]
    for row in rows:
        if "us" in row and "us" in dense:
            row["speedup"] = dense["us"] / row["us"]
    return rows


def find_bars(rows: Sequence[Row]) -> list[Row]:
    """The bars of the kernels, each with its figure; what was not measured says so."""
    kbit = packed_name(SPEC)
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    bars = [
        _bar(f"{kbit}, M = 1, {name_of(MORE_AT)}", "% of copy", BANDWIDTH_BAR)
        | _figure(_find(rows, MORE_AT, 1, kbit), "copy_percent")
    ]
    bars += [
        _bar(f"{kbit}, M = {count}, {name_of(shape)}", "x torch", least)
        | _figure(_find(rows, shape, count, kbit), "speedup")
        for count, least in SPEED_BARS.items()
        for shape in shapes
    ]
    for fast, slow in FASTER:
        fast_row, slow_row = (_find(rows, MORE_AT, 1, packed_name(spec)) for spec in (fast, slow))
        is_known = "us" in fast_row and "us" in slow_row
        figure = slow_row["us"] / fast_row["us"] if is_known else None
        name = f"{fast} faster than {slow}, M = 1, {name_of(MORE_AT)}"
        bars.append(_bar(name, f"x {slow}", 1.0) | {"figure": figure})
    for bar in bars:
        figure = bar["figure"]
        bar["met"] = verdict(None if figure is None else figure >= bar["least"])
    return bars


def _bar(name: str, unit: str, least: float) -> Row:
    return {"name": name, "wanted": f">= {least:g} {unit}", "least": least}


def _find(rows: Sequence[Row], shape: Shape, count: int, name: str) -> Row:
    """The row, or an empty one."""
    wanted = (shape, count, name)
    return next((row for row in rows if (row["shape"], row.get("count"), row["name"]) == wanted), {})


def _figure(row: Row, key: str) -> Row:
    return {"figure": row.get(key)}


def name_of(shape: Shape) -> str:
    """As the command line has it."""
    return f"{shape[0]}x{shape[1]}"


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = ",".join(map(name_of, SHAPES))
    parser.add_argument("--shapes", type=_shapes, default=SHAPES, help=f"rows x in_features [{shapes}]")
    parser.add_argument("--m", type=_counts, default=COUNTS, help="rows of the input [1,2,4,...,4096]")
    more = ",".join(MORE_SPECS)
    parser.add_argument(
        "--specs", type=_names, help=f"at all shapes [{SPEC}; at {name_of(MORE_AT)} also {more}]"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here too")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    return text.split(",")


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _shapes(text: str) -> list[Shape]:
    pairs = [[int(size) for size in part.split("x")] for part in text.split(",")]
    return [(rows, features) for rows, features in pairs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 2 without the device."""
    options = parse_options(arguments)
    try:
        bench = make_bench(options)
    except NoDevice as error:
        return refuse(error)
    console = Console(width=None if sys.stdout.isatty() else 160)
    head = device_line(bench.clock, PEER_PACKAGES)
    console.print(head, LEGEND, sep="\n", highlight=False)
    sections = []
    with torch.inference_mode():
        for shape in options.shapes:
            section = shape_section(bench, shape)
            copied = [row["copy_gb_s"] for row in section.rows if "copy_gb_s" in row]
            section.notes.append(f"copy: {min(copied):.0f} to {max(copied):.0f} GB/s read and written")
            sections.append(section)
            print_section(console, section)
            gc.collect()
    bars = find_bars([row for section in sections for row in section.rows])
    sections.append(bars_section(bars, is_judged=bench.clock.is_cuda))
    print_section(console, sections[-1])
    if options.markdown:
        title = f"# F.linear with packed weights on a GPU, against {dense_name(bench.dtype)}"
        options.markdown.write_text(markdown((title, head, LEGEND), sections), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
