"""Speed of F.linear with packed weights on the CPU, against torch and peers in the same run.

    python -m benchmarks.cpu_linear [--quick] [--json] [--threads 2] [--size 4096]
        [--peers PYTHON] [--isa portable|avx2|avx512] [--markdown FILE]

The one thing to know: what is compared is measured in the same rounds, one slice of each contender
after the other, so that a busy machine slows all alike; the bandwidth of the memory is one contender
of every comparison. *Cold* rotates over copies of the weight that no cache holds together, as a model
does with its layers; *warm* reads one weight again and again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import IO, Any

from benchmarks.peers import (
    BITSANDBYTES,
    BITSANDBYTES_PLAIN,
    COLD_BYTES,
    ERROR_ROWS,
    ORT_BNB4,
    ORT_INT8,
    Sample,
    copies_of,
    environment,
    last_line,
    time_calls,
)
from benchmarks.tables import Section, markdown, print_section
from kbitc.formats import datatypes
from kbitc.kernels.cpu.build import load

if "--isa" in sys.argv[:-1] and __name__ == "__main__":  # before the kernels load
    os.environ["KBITC_CPU"] = sys.argv[sys.argv.index("--isa") + 1]

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import kbitc
from kbitc.errors import UsageError
from kbitc.tensor.kbit_tensor import KbitTensor

DRAM_BYTES = 512 << 20
READ_BYTES = 16 << 20  # of one read: a short one may pass undisturbed
EXTRA = 3  # at most so many times the rounds
ENOUGH = 3  # undisturbed samples for a median
FP32, BF16 = "torch fp32", "torch bf16"
PEER_SPECS = ("nf4:64", "nf4:32", "int4:64", "int4:32", "nf3:64", "int8:64")
CODEBOOKS = ("nf", "dynamic", "quantile")
FAMILIES = ("int", "fp", *CODEBOOKS)
FLAGS = ("", "+zp", "+dq", "+out1%")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_ROWS = (1, 8, 128, 512)
BANDWIDTH_BARS = (("int and fp, any k; codebooks k <= 5", 1.6), ("codebooks k = 6", 2.5))
FLAG_BAR = 15.0
# bitsandbytes: 80 is for the path of machines without AVX-512 BF16, where it has no kernel of its own.
PEER_BARS = {FP32: 7.0, ORT_INT8: 1.0, ORT_BNB4: 20.0, BITSANDBYTES: 1.0, BITSANDBYTES_PLAIN: 80.0}
ROW_BARS = {8: 5.0, 128: 1.3, 512: 1.0}

Timer = Callable[[float], list[Sample]]


@dataclass
class Contender:
    """One row: how to time it, and what is known of it before.

    Attributes:
        timers: by mode, seconds of a slice to its samples.
        facts: other cells of its row.
    """

    name: str
    timers: dict[str, Timer]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Times:
    """Samples of one contender, by mode."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def middle(self, mode: str = "cold") -> float:
        """Median seconds a call."""
        return undisturbed(self.samples[mode])

    def least(self, mode: str = "cold") -> float:
        """Least seconds a call."""
        return min(seconds for seconds, _ in self.samples[mode])

    def is_clean(self, mode: str = "cold") -> bool:
        """Whether the median is of undisturbed samples."""
        return sum(is_clean for _, is_clean in self.samples.get(mode, [])) >= ENOUGH

    def clean_share(self) -> float:
        """Share of samples in which no other process took a core."""
        flags = [is_clean for samples in self.samples.values() for _, is_clean in samples]
        return sum(flags) / len(flags)


def undisturbed(samples: Sequence[Sample]) -> float:
    """Median seconds of the samples that nobody disturbed; of all if those are too few."""
    clean = [seconds for seconds, is_clean in samples if is_clean]
    return median(clean if len(clean) >= ENOUGH else [seconds for seconds, _ in samples])


@dataclass(frozen=True)
class Bar:
    """A figure that this project wants to reach, the worst of some rows.

    Attributes:
        best: the same figure of the fastest samples.
        skipped: rows that other processes disturbed; they are not judged, unless all are like that.
        is_clean: the row that is judged was not.
    """

    name: str
    wanted: str
    figure: float
    best: float
    where: str
    is_met: bool
    is_clean: bool
    skipped: int


# Contenders.


def _rotation(calls: Sequence[Callable[[], Any]]) -> dict[str, Timer]:
    return {"cold": partial(time_calls, calls), "warm": partial(time_calls, calls[:1])}


def _linears(x: Tensor, weights: Sequence[Tensor]) -> dict[str, Timer]:
    return _rotation([partial(F.linear, x, weight) for weight in weights])


def _clones(weight: Tensor) -> list[Tensor]:
    return [weight, *(weight.clone() for _ in range(copies_of(weight.nbytes) - 1))]


def dense_contender(x: Tensor, weight: Tensor, dtype: torch.dtype, name: str) -> Contender:
    """F.linear of torch itself."""
    weights = _clones(weight.to(dtype))
    return Contender(name, _linears(x.to(dtype), weights), {"bytes": weights[0].nbytes})


def int4pack_contender(x: Tensor, weight: Tensor) -> Contender:
    """Int4 weights of torch in groups of 64; all codes are zero here, which costs the same."""
    rows, features = weight.shape
    codes = torch.full((rows, features), 8, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales = torch.ones(features // 64, rows, 2, dtype=torch.bfloat16)
    nbytes = packed.nbytes + scales.nbytes
    pairs = [(packed.clone(), scales.clone()) for _ in range(copies_of(nbytes))]
    x = x.to(torch.bfloat16)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    timers = _rotation([partial(product, x, part, 64, scale) for part, scale in pairs])
    return Contender("torch int4pack :64, bf16 input", timers, {"bytes": nbytes})


def packed_contender(x: Tensor, weight: Tensor, spec: str, name: str | None = None) -> Contender:
    """A packed weight: its timers, bytes and error against float64."""
    first = kbitc.quantize(weight, spec)
    nbytes = first.packed.nbytes()
    copies = [KbitTensor(first.packed.map(torch.clone), first.dtype) for _ in range(copies_of(nbytes))]
    facts = {"spec": spec, "bytes": nbytes, "error": relative_error(x, first)}
    return Contender(name or f"kbitc {spec}", _linears(x, copies), facts)


def relative_error(x: Tensor, weight: KbitTensor) -> float:
    """Of the first rows of a product, against float64 with the dequantized weight."""
    dense = weight.dequantize(torch.float32)[:ERROR_ROWS].double()
    exact = x.double() @ dense.T
    found = F.linear(x, weight)[..., :ERROR_ROWS].double()
    return float((found - exact).norm() / exact.norm())


class Memory:
    """Reading memory, as a contender: the reductions of torch that read fastest, a large buffer."""

    def __init__(self) -> None:
        self._parts = torch.ones(DRAM_BYTES // 4).split(READ_BYTES // 4)

    def contenders(self) -> list[Contender]:
        """One for each reduction."""
        return [
            Contender(name, {"cold": partial(time_calls, [_readers(part)[name] for part in self._parts])})
            for name in _readers(self._parts[0])
        ]

    @classmethod
    def bandwidth(cls, times: dict[str, Times]) -> float:
        """Bytes a second of the reduction whose median was the fastest."""
        return READ_BYTES / min(found.middle() for found in cls._reads(times))

    @classmethod
    def best_bandwidth(cls, times: dict[str, Times]) -> float:
        """Bytes a second of the fastest read of all."""
        return READ_BYTES / min(found.least() for found in cls._reads(times))

    @classmethod
    def is_clean(cls, times: dict[str, Times]) -> bool:
        """Whether the bandwidth is one of undisturbed reads."""
        return all(found.is_clean() for found in cls._reads(times))

    @staticmethod
    def _reads(times: dict[str, Times]) -> list[Times]:
        return [found for name, found in times.items() if name.startswith("read ")]


def _readers(buffer: Tensor) -> dict[str, Callable[[], Any]]:
    return {
        "read sum": buffer.sum,
        "read amax": buffer.amax,
        "read int64 sum": buffer.view(torch.int64).sum,
    }


def cache_bandwidth(nbytes: int) -> float:
    """Bytes a second of reading a buffer of this size again and again."""
    buffer = torch.ones(nbytes // 8 * 2)
    fastest = min(undisturbed(time_calls([call], 0.1)) for call in _readers(buffer).values())
    return buffer.nbytes / fastest


class PeerProcess:
    """Peers in an environment of their own: one process that times a slice when asked."""

    def __init__(self, python: Path, size: int, threads: int) -> None:
        script = Path(__file__).with_name("peers.py")
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [str(python), str(script), "linear", str(size), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.summary = self._read()

    def contenders(self) -> list[Contender]:
        """One for each peer that this environment can run; for the others a row with the reason."""
        return [
            Contender(name, {} if "reason" in facts else self._timers(name), facts)
            for name, facts in self.summary["peers"].items()
        ]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _timers(self, name: str) -> dict[str, Timer]:
        return {mode: partial(self._time, name, mode) for mode in ("cold", "warm")}

    def _time(self, name: str, mode: str, seconds: float) -> list[float]:
        line = json.dumps({"name": name, "mode": mode, "seconds": seconds})
        _pipe(self._process.stdin).write(line + "\n")
        _pipe(self._process.stdin).flush()
        samples: list[Sample] = self._read()["samples"]
        return samples

    def _read(self) -> Any:
        line = _pipe(self._process.stdout).readline()
        if not line:
            self.close()
            self._errors.seek(0)
            raise RuntimeError((self._errors.read().strip().splitlines() or ["it ended"])[-1])
        return json.loads(line)


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


# Measuring.


@dataclass
class Bench:
    """What all sections share.

    Attributes:
        dense: torch fp32 at M = 1, a contender of every comparison.
    """

    size: int
    threads: int
    is_quick: bool
    weight: Tensor
    x: Tensor
    memory: Memory
    dense: Contender

    @property
    def rounds(self) -> int:
        """Slices of each contender."""
        return 5 if self.is_quick else 15

    @property
    def seconds(self) -> float:
        """Length of a slice."""
        return 0.01 if self.is_quick else 0.02

    def race(self, contenders: Iterable[Contender], rounds: int | None = None) -> dict[str, Times]:
        """Time contenders in turn, and memory and torch fp32 with them.

        Those that other processes disturbed in every round get some more.
        """
        everyone = [*self.memory.contenders(), self.dense, *contenders]
        times = {contender.name: Times() for contender in everyone}
        rounds = rounds or self.rounds
        for number in range(EXTRA * rounds):
            # Each comes after another one every time.
            turn = everyone[number % len(everyone) :] + everyone[: number % len(everyone)]
            if number >= rounds:
                turn = [one for one in turn if one.timers and not times[one.name].is_clean()]
            for contender in turn:
                for mode, timer in contender.timers.items():
                    samples = times[contender.name].samples.setdefault(mode, [])
                    samples.extend(timer(self.seconds))
        return times


def make_bench(options: argparse.Namespace) -> Bench:
    """The weight, the input and what everything is compared with."""
    torch.manual_seed(0)
    weight = torch.randn(options.size, options.size) * 0.02
    x = torch.randn(1, options.size)
    dense = dense_contender(x, weight, torch.float32, FP32)
    return Bench(options.size, options.threads, options.quick, weight, x, Memory(), dense)


def _row(contender: Contender, times: dict[str, Times], bandwidth: float) -> dict[str, Any]:
    """One contender of a race as a row."""
    row = {"name": contender.name, **contender.facts}
    if not contender.timers:
        return row | {"reason": f"not available: {contender.facts['reason']}"}
    found = times[contender.name]
    ideal = row["bytes"] / bandwidth
    row |= {
        "cold_ms": 1e3 * found.middle(),
        "cold_least_ms": 1e3 * found.least(),
        "warm_ms": 1e3 * found.middle("warm"),
        "warm_least_ms": 1e3 * found.least("warm"),
        "bytes_mb": row["bytes"] / 1e6,
        "ideal_ms": 1e3 * ideal,
        "clean_percent": 100 * found.clean_share(),
        "is_clean": found.is_clean() and Memory.is_clean(times) and times[FP32].is_clean(),
        "ratio": found.middle() / ideal,
        "best_ratio": found.least() * Memory.best_bandwidth(times) / row["bytes"],
        "speedup": times[FP32].middle() / found.middle(),
        "best_speedup": times[FP32].least() / found.least(),
    }
    return row


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
    rows = [_row(contender, times, bandwidth) for contender in (bench.dense, *contenders)]
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
            row = _row(contender, times, bandwidth)
            row["is_met"] = _meets_bar(row)
            row["met"] = _verdict(row["is_met"], row["is_clean"])
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


def _limit(row: dict[str, Any]) -> float | None:
    """The most that a spec may take, in times of reading its bytes; None: compared with torch fp32."""
    if row["family"] not in CODEBOOKS or row["bits"] <= 5:
        return BANDWIDTH_BARS[0][1]
    return BANDWIDTH_BARS[1][1] if row["bits"] == 6 else None


def _verdict(is_met: bool, is_clean: bool) -> str:
    return ("yes" if is_met else "NO") if is_clean else "disturbed"


def _meets_bar(row: dict[str, Any]) -> bool:
    limit = _limit(row)
    met = row["speedup"] >= 1 if limit is None else row["ratio"] <= limit
    return bool(met)


def flags_section(bench: Bench) -> Section:
    """What +zp, +dq and +out cost."""
    rows = []
    for base in ("nf4:64", "int4:64"):
        contenders = [packed_contender(bench.x, bench.weight, base + flag) for flag in FLAGS]
        times = bench.race(contenders)
        plain = times[contenders[0].name]
        for contender in contenders:
            row = _row(contender, times, Memory.bandwidth(times))
            found = times[contender.name]
            row["cost"] = 100 * (found.middle() / plain.middle() - 1)
            row["best_cost"] = 100 * (found.least() / plain.least() - 1)
            row["is_clean"] = row["is_clean"] and plain.is_clean()
            row["warm_cost"] = 100 * (found.middle("warm") / plain.middle("warm") - 1)
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
    dense, half = _clones(bench.weight), _clones(bench.weight.to(torch.bfloat16))
    rows = []
    for count in QUICK_ROWS if bench.is_quick else ROWS:
        x = torch.randn(count, bench.size)
        at = [
            Contender(name, {"cold": _linears(value, weights)["cold"]})
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


# Bars.


def find_bars(everyone: Section, specs: Section, flags: Section, over_rows: Section) -> list[Bar]:
    """Every bar with the worst figure of those that it is about."""
    bars = list(_peer_bars(everyone.rows))
    for name, limit in BANDWIDTH_BARS:
        rows = [row for row in specs.rows if _limit(row) == limit]
        bars.append(_bar(name, f"<= {limit} x memory", rows, "ratio", limit))
    rows = [row for row in specs.rows if _limit(row) is None]
    bars.append(_bar("codebooks k = 7, 8", ">= 1 x torch fp32", rows, "speedup", 1.0))
    for base in ("nf4:64", "int4:64"):
        rows = [row for row in flags.rows if row["spec"].startswith(base + "+")]
        bars.append(_bar(f"flags on {base}", f"<= {FLAG_BAR:g} %", rows, "cost", FLAG_BAR))
    for row in over_rows.rows:
        count = row["count"]
        if count in ROW_BARS:
            least = ROW_BARS[count]
            wanted = f">= {least} x torch fp32"
            bars.append(_bar(f"M = {count}", wanted, [row | {"spec": "nf4:64"}], "speedup", least))
    return bars


def _peer_bars(rows: list[dict[str, Any]]) -> Iterator[Bar]:
    """nf4:64 against those that are there, cold."""
    by_name = {row["name"]: row for row in rows if "cold_ms" in row}
    ours = by_name["kbitc nf4:64"]
    for name, least in PEER_BARS.items():
        if name in by_name:
            peer = by_name[name]
            is_clean = ours["is_clean"] and peer["is_clean"]
            ratio, best = (peer[key] / ours[key] for key in ("cold_ms", "cold_least_ms"))
            wanted = f">= {least:g} x {name}"
            yield Bar("M = 1", wanted, ratio, best, "nf4:64", ratio >= least, is_clean, int(not is_clean))


def _bar(name: str, wanted: str, rows: list[dict[str, Any]], key: str, limit: float) -> Bar:
    clean = [row for row in rows if row["is_clean"]]
    is_lower_bound = key == "speedup"
    worst = (min if is_lower_bound else max)(clean or rows, key=lambda row: row[key])
    is_met = worst[key] >= limit if is_lower_bound else worst[key] <= limit
    skipped = len(rows) - len(clean)
    return Bar(name, wanted, worst[key], worst[f"best_{key}"], worst["spec"], is_met, bool(clean), skipped)


def bars_section(bars: list[Bar]) -> Section:
    """The bars as a table."""
    columns = (
        ("name", "bar", ""),
        ("wanted", "wanted", ""),
        ("where", "worst", ""),
        ("figure", "median", ".2f"),
        ("best", "least times", ".2f"),
        ("skipped", "disturbed rows", "d"),
        ("met", "met", ""),
    )
    rows = [asdict(bar) | {"met": _verdict(bar.is_met, bar.is_clean)} for bar in bars]
    return Section("Bars", columns, rows)


# Machine and output.


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


def cpu_name() -> str:
    """The processor as the operating system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    name = values.get("model name", platform.machine())
    return f"{name} (family {values.get('cpu family', '?')}, model {values.get('model', '?')})"


def kernel_set() -> str:
    """The kernel set that runs."""
    if not load():
        return "reference"
    return str(torch.ops.kbit.cpu_kernels())


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


def open_peers(options: argparse.Namespace) -> tuple[PeerProcess | None, str | None]:
    """The process of the peers, or why there is none."""
    try:
        python = environment(options.peers, torch.__version__)
        return PeerProcess(python, options.size, options.threads), None
    except (OSError, RuntimeError, ValueError) as error:
        return None, last_line(error)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and values of M")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=4096, help="rows and input features of the weight")
    parser.add_argument("--peers", type=Path, help="a Python that has the peers [default: made in the cache]")
    parser.add_argument("--isa", choices=("portable", "avx2", "avx512"), help="kernel set to use")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here too")
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 160)
    with torch.inference_mode():
        bench = make_bench(options)
        facts = machine(bench)
        console.print(machine_line(facts), legend(bench), sep="\n", highlight=False)
        peers, reason = open_peers(options)
        sections = []
        found = peers.contenders() if peers else []
        steps = (
            partial(peers_section, peers=found, reason=reason),
            specs_section,
            flags_section,
            rows_section,
        )
        for step in steps:
            sections.append(step(bench))
            print_section(console, sections[-1])
            if peers and len(sections) == 1:
                facts["peers"] = peers.summary["versions"]
                peers.close()
    bars = find_bars(*sections)
    sections.append(bars_section(bars))
    print_section(console, sections[-1])
    if options.json:
        tables = [{"title": section.title, "rows": section.rows} for section in sections]
        print(json.dumps({"machine": facts, "tables": tables}, indent=1))
    if options.markdown:
        head = ("# F.linear with packed weights on a CPU", machine_line(facts), legend(bench))
        options.markdown.write_text(markdown(head, sections), encoding="utf-8")


if __name__ == "__main__":
    main()
