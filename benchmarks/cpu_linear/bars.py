"""The figures that this project wants to reach, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cpu_linear.contenders import FP32
from benchmarks.peers import BITSANDBYTES, BITSANDBYTES_PLAIN, ORT_BNB4, ORT_INT8
from benchmarks.tables import Section

CODEBOOKS = ("nf", "dynamic", "quantile")
BANDWIDTH_BARS = (("int and fp, any k; codebooks k <= 5", 1.6), ("codebooks k = 6", 2.5))
FLAG_BAR = 15.0
# bitsandbytes: 80 is for the path of machines without AVX-512 BF16, where it has no kernel of its own.
PEER_BARS = {FP32: 7.0, ORT_INT8: 1.0, ORT_BNB4: 20.0, BITSANDBYTES: 1.0, BITSANDBYTES_PLAIN: 80.0}
ROW_BARS = {8: 5.0, 128: 1.3, 512: 1.0}


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
    rows = [asdict(bar) | {"met": verdict(bar.is_met, bar.is_clean)} for bar in bars]
    return Section("Bars", columns, rows)


def _limit(row: dict[str, Any]) -> float | None:
    """The most that a spec may take, in times of reading its bytes; None: compared with torch fp32."""
    if row["family"] not in CODEBOOKS or row["bits"] <= 5:
        return BANDWIDTH_BARS[0][1]
    return BANDWIDTH_BARS[1][1] if row["bits"] == 6 else None


def verdict(is_met: bool, is_clean: bool) -> str:
    """One word: whether a figure reaches its bar, if nobody disturbed it."""
    return ("yes" if is_met else "NO") if is_clean else "disturbed"


def meets_bar(row: dict[str, Any]) -> bool:
    """Whether one spec is as fast as its bar wants."""
    limit = _limit(row)
    met = row["speedup"] >= 1 if limit is None else row["ratio"] <= limit
    return bool(met)
