"""The machine, and how to read the tables."""

from __future__ import annotations

import os
from typing import Any

import torch

import kbitc
from benchmarks.cpu import cpu_name, kernel_set
from benchmarks.cpu_linear.bench import Bench
from benchmarks.cpu_linear.memory import Memory, cache_bandwidth
from benchmarks.cpu_linear.times import ENOUGH
from benchmarks.peers import COLD_BYTES


def machine(bench: Bench) -> dict[str, Any]:
    """What the figures are of."""
    times = bench.race([], bench.rounds)
    nf4 = bench.size * bench.size * 17 // 32
    return {
        "cpu": cpu_name(),
        "threads": bench.threads,
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "kbitc": kbitc.__version__,
        "kbitc_isa": kernel_set(),
        "load": os.getloadavg()[0],
        "dram_gb_s": Memory.bandwidth(times) / 1e9,
        "dram_best_gb_s": Memory.best_bandwidth(times) / 1e9,
        "cache_gb_s": cache_bandwidth(nf4) / 1e9,
        "cache_mb": nf4 / 1e6,
    }


def machine_line(facts: dict[str, Any]) -> str:
    """The facts in words."""
    return (
        f"{facts['cpu']}, {facts['threads']} threads, load {facts['load']:.1f} before; "
        f"torch {facts['torch']} ({facts['torch_isa']}), kbitc {facts['kbitc']} ({facts['kbitc_isa']}). "
        f"Memory reads at {facts['dram_gb_s']:.1f} GB/s (best {facts['dram_best_gb_s']:.1f}), "
        f"{facts['cache_mb']:.1f} MB again and again at {facts['cache_gb_s']:.1f} GB/s."
    )


def legend(bench: Bench) -> str:
    """How to read the tables."""
    return (
        "Milliseconds a call: median of the samples in which no other process took a core "
        f"(clean %; of all samples if those are fewer than {ENOUGH}), and least. "
        f"Cold: rotating over copies of {COLD_BYTES >> 20} MiB in all. "
        f"x memory: cold time over the time to read the stored bytes at the bandwidth of the same "
        f"{bench.rounds} rounds. error: of the product against float64 with the dequantized weight."
    )
