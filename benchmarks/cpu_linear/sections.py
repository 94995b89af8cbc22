"""The tables: everyone at M = 1, all specs, what flags cost, and nf4:64 over M."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import kbitc
from benchmarks.cpu_linear.bars import CODEBOOKS, meets_bar, verdict
from benchmarks.cpu_linear.bench import Bench
from benchmarks.cpu_linear.contenders import (
    BF16,
    FP32,
    Contender,
    clones,
    dense_contender,
    int4pack_contender,
    linears,
    packed_contender,
    relative_error,
)
from benchmarks.cpu_linear.memory import Memory
from benchmarks.cpu_linear.times import Times
from benchmarks.peers import copies_of, last_line
from benchmarks.tables import Section
from kbitc.errors import UsageError
from kbitc.formats import datatypes
from kbitc.tensor.kbit_tensor import KbitTensor

PEER_SPECS = ("nf4:64", "nf4:32", "int4:64", "int4:32", "nf3:64", "int8:64")
FAMILIES = ("int", "fp", *CODEBOOKS)
FLAGS = ("", "+zp", "+dq", "+out1%")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_ROWS = (1, 8, 128, 512)
TIME_COLUMNS = (
    ("cold_ms", "cold ms", ".3f"),
    ("cold_least_ms", "least", ".3f"),
    ("warm_ms", "warm ms", ".3f"),
    ("warm_least_ms", "least", ".3f"),
    ("bytes_mb", "MB", ".2f"),
    ("ratio", "x memory", ".2f"),
    ("speedup", "x fp32", ".2f"),
    ("error", "error", ".1e"),
    ("clean_percent", "clean %", ".0f"),
)


def row_of(contender: Contender, times: dict[str, Times], bandwidth: float) -> dict[str, Any]:
    """One contender of a race as a row."""
    row = {"name": contender.name, **contender.facts}
    if not contender.timers:
        return row | {"reason": f"not available: {contender.facts['reason']}"}
    own = times[contender.name]
    ideal = row["bytes"] / bandwidth
    row |= {
        "cold_ms": 1e3 * own.middle(),
        "cold_least_ms": 1e3 * own.least(),
        "warm_ms": 1e3 * own.middle("warm"),
        "warm_least_ms": 1e3 * own.least("warm"),
        "bytes_mb": row["bytes"] / 1e6,
        "ideal_ms": 1e3 * ideal,
        "clean_percent": 100 * own.clean_share(),
        "is_clean": own.is_clean() and Memory.is_clean(times) and times[FP32].is_clean(),
        "ratio": own.middle() / ideal,
        "best_ratio": own.least() * Memory.best_bandwidth(times) / row["bytes"],
        "speedup": times[FP32].middle() / own.middle(),
        "best_speedup": times[FP32].least() / own.least(),
    }
    return row


def peers_section(bench: Bench, peers: list[Contender], reason: str | None) -> Section:
    """Everyone at M = 1."""
    bf16 = bench.x.to(torch.bfloat16)
    contenders = [dense_contender(bench.x, bench.weight, torch.bfloat16, BF16)]
    try:
        contenders.append(int4pack_contender(bench.x, bench.weight))
    except RuntimeError as error:
        contenders.append(Contender("torch int4pack :64", {}, {"reason": last_line(error)}))
    contenders += [packed_contender(bench.x, bench.weight, spec) for spec in PEER_SPECS]
    contenders.append(packed_contender(bf16, bench.weight, "nf4:64", "kbitc nf4:64, bf16 input"))
    contenders += peers
    times = bench.race(contenders)
    bandwidth = Memory.bandwidth(times)
    rows = [row_of(contender, times, bandwidth) for contender in (bench.dense, *contenders)]
    notes = [f"memory read in these rounds: {bandwidth / 1e9:.1f} GB/s"]
    if reason is not None:
        rows.append({"name": "ONNX Runtime, bitsandbytes", "reason": f"not available: {reason}"})
    columns = (("name", "M = 1", ""), *TIME_COLUMNS, ("reason", "", ""))
    return Section(f"Everyone, {bench.size} x {bench.size}", columns, rows, notes)


def specs_section(bench: Bench) -> Section:
    """All specs at M = 1, a family at a time: the copies of all of them would fill the memory."""
    rows, notes = [], []
    for family in FAMILIES:
        contenders = list(_family_contenders(bench, family))
        times = bench.race(contenders)
        bandwidth = Memory.bandwidth(times)
        notes.append(f"{family}: memory {bandwidth / 1e9:.1f} GB/s, torch fp32 {_ms(times[FP32])} ms")
        for contender in contenders:
            row = row_of(contender, times, bandwidth)
            row["is_met"] = meets_bar(row)
            row["met"] = verdict(row["is_met"], row["is_clean"])
            rows.append(row)
    columns = (("spec", "M = 1", ""), *TIME_COLUMNS, ("ideal_ms", "memory ms", ".3f"), ("met", "bar met", ""))
    return Section("All specs", columns, rows, notes)


def _family_contenders(bench: Bench, family: str) -> Iterable[Contender]:
    for bits in range(datatypes.MIN_BITS, datatypes.MAX_BITS + 1):
        try:
            contender = packed_contender(bench.x, bench.weight, f"{family}{bits}:64")
        except UsageError:
            continue  # the family has no such width
        contender.facts |= {"family": family, "bits": bits}
        yield contender


def _ms(times: Times) -> str:
    return f"{1e3 * times.middle():.3f}"


def flags_section(bench: Bench) -> Section:
    """What +zp, +dq and +out cost."""
    rows = []
    for base in ("nf4:64", "int4:64"):
        contenders = [packed_contender(bench.x, bench.weight, base + flag) for flag in FLAGS]
        times = bench.race(contenders)
        plain = times[contenders[0].name]
        for contender in contenders:
            row = row_of(contender, times, Memory.bandwidth(times))
            own = times[contender.name]
            row["cost"] = 100 * (own.middle() / plain.middle() - 1)
            row["best_cost"] = 100 * (own.least() / plain.least() - 1)
            row["is_clean"] = row["is_clean"] and plain.is_clean()
            row["warm_cost"] = 100 * (own.middle("warm") / plain.middle("warm") - 1)
            rows.append(row)
    costs = (("cost", "cold cost %", "+.1f"), ("warm_cost", "warm cost %", "+.1f"))
    return Section("Cost of the flags", (("spec", "M = 1", ""), *TIME_COLUMNS, *costs), rows)


def rows_section(bench: Bench) -> Section:
    """nf4:64 against torch over M, weights cold."""
    packed = kbitc.quantize(bench.weight, "nf4:64")
    copies: list[Tensor] = [
        KbitTensor(packed.packed.map(torch.clone), packed.dtype)
        for _ in range(copies_of(packed.packed.nbytes()))
    ]
    dense, half = clones(bench.weight), clones(bench.weight.to(torch.bfloat16))
    rows = []
    for count in QUICK_ROWS if bench.is_quick else ROWS:
        x = torch.randn(count, bench.size)
        at = [
            Contender(name, {"cold": linears(value, weights)["cold"]})
            for name, value, weights in (
                ("packed", x, copies),
                ("fp32", x, dense),
                ("bf16", x.to(torch.bfloat16), half),
            )
        ]
        times = bench.race(at, bench.rounds if count <= 64 else min(bench.rounds, 7))
        least = {name: times[name].least() for name in ("packed", "fp32")}
        middle = {name: times[name].middle() for name in ("packed", "fp32", "bf16")}
        row: dict[str, Any] = {
            "count": count,
            **{f"{name}_ms": 1e3 * value for name, value in middle.items()},
        }
        row["speedup"] = middle["fp32"] / middle["packed"]
        row["best_speedup"] = least["fp32"] / least["packed"]
        row["bf16_speedup"] = middle["bf16"] / middle["packed"]
        row["error"] = relative_error(x, packed)
        row["is_clean"] = times["packed"].is_clean() and times["fp32"].is_clean()
        rows.append(row)
    columns = (
        ("count", "M", "d"),
        ("packed_ms", "nf4:64 ms", ".3f"),
        ("fp32_ms", "torch fp32 ms", ".3f"),
        ("bf16_ms", "torch bf16 ms", ".3f"),
        ("speedup", "x fp32", ".2f"),
        ("best_speedup", "x fp32, least times", ".2f"),
        ("bf16_speedup", "x bf16", ".2f"),
        ("error", "error", ".1e"),
    )
    return Section("nf4:64 over M, cold", columns, rows)
