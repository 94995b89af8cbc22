"""The table of all classes and its summary against the bars."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]

LEAST = 110  # classes
COMPILE, PACK, WITH_BITS = 0.98, 0.95, 0.90
ERROR = 4e-4  # of the largest output


def tried(records: Sequence[Record]) -> list[Record]:
    """Those whose tiny dense model runs; of the others the harness, not kbitc, knows too little."""
    return [record for record in records if "inputs" in record]


def is_packed(record: Record) -> bool:
    """Whether every matmul weight is."""
    return bool(record.get("compiles")) and record.get("unpacked_count") == 0


def is_close(record: Record) -> bool:
    """Whether the loaded artifact's outputs are those of the dequantized dense model."""
    return record.get("error", float("inf")) <= ERROR


def is_honest(record: Record) -> bool:
    """Whether --strict passes exactly where every matmul weight is packed."""
    return bool(record.get("strict")) == is_packed(record)


def bars(records: Sequence[Record]) -> list[tuple[str, int, int, bool]]:
    """Each bar: its words, how many meet it, of how many, and whether that is enough."""
    known = tried(records)
    compiled = [record for record in known if record.get("compiles")]
    packed = [record for record in known if is_packed(record)]
    rows = [
        ("compile", len(compiled), len(known), COMPILE),
        ("have every matmul weight packed", len(packed), len(known), PACK),
        (f"of those give outputs within {ERROR:g}", sum(map(is_close, packed)), len(packed), 1.0),
        ("of those are bit-equal with KBITC_CPU=off", _count(packed, "bit_equal"), len(packed), 1.0),
        ("compile with bits=4 at default calibration", _count(known, "bits"), len(known), WITH_BITS),
        ("pass --strict exactly where packed", sum(map(is_honest, compiled)), len(compiled), 1.0),
    ]
    least = (
        f"classes whose tiny model runs (at least {LEAST})",
        len(known),
        len(records),
        len(known) >= LEAST,
    )
    return [least, *((words, met, of, met >= share * of) for words, met, of, share in rows)]


def _count(records: Sequence[Record], key: str) -> int:
    return sum(bool(record.get(key)) for record in records)


def summary(records: Sequence[Record]) -> tuple[str, bool]:
    """Lines for a terminal, and whether every bar is met."""
    lines = [
        f"{'ok  ' if is_met else 'MISS'} {met:>4} of {of:<4} {100 * met / max(of, 1):5.1f} %  {words}"
        for words, met, of, is_met in bars(records)
    ]
    raw = Counter(stage for record in records for stage in record.get("raw", ()))
    if raw:
        lines.append(f"exceptions that are no KbitcError: {dict(raw)}")
    return "\n".join(lines), all(is_met for *_, is_met in bars(records))


def page(records: Sequence[Record], spec: str) -> str:
    """The page of the documentation; ``spec``: of the weights whose outputs were compared."""
    import torch
    import transformers

    from kbitc.version import VERSION

    lines = [
        "# Architectures",
        "",
        "Tiny models with random weights of the model classes of transformers, each compiled from a folder,",
        f"loaded, and compared at {spec} with the dense model that has its dequantized weights.",
        f"`python -m benchmarks.architectures` wrote this page with kbitc {VERSION}, transformers",
        f"{transformers.__version__} and torch {torch.__version__}.",
        "",
        "| | classes | of | share |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {words} | {met} | {of} | {100 * met / max(of, 1):.1f} % |"
            for words, met, of, _ in bars(records)
        ),
        "",
        "*Packed* is the share of parameters of matmul weights: those of `nn.Linear` and its kind, and what",
        "the dense model hands to a matmul (convolutions whose kernels do not overlap included). *Error* is",
        "the largest difference of an output in its largest value; *=*: 0 with the reference kernels;",
        "*selects*: of a model that goes on with the largest of many scores, which differences in the last",
        "bits may order otherwise. The error is then that with the dense model's choice held, or what the",
        "scores of both choices differ by, if that is more; the last column says what it is without.",
        "",
    ]
    kinds: dict[str, list[Record]] = {}
    for record in tried(records):
        kinds.setdefault(record["kind"], []).append(record)
    for kind, rows in kinds.items():
        lines += [f"## {kind.capitalize()}", "", "| class | inputs | packed | strict | error | bits=4 | |"]
        lines += ["| --- | --- | ---: | --- | ---: | --- | --- |"]
        lines += [_row(row) for row in sorted(rows, key=lambda row: row["class"])]
        lines.append("")
    left = sorted({record["class"] for record in records} - {record["class"] for record in tried(records)})
    if left:
        lines += ["## Not tried", "", "No tiny model or no inputs of these are known to the campaign:", ""]
        lines += [", ".join(f"`{name}`" for name in left) + ".", ""]
    return "\n".join(lines)


def _row(record: Record) -> str:
    packed = f"{100 * record['packed_share']:.1f} %" if "packed_share" in record else ""
    error = f"{record['error']:.1e}{' =' if record.get('bit_equal') else ''}" if "error" in record else ""
    said = [text for text in (*(record.get("errors") or {}).values(), record.get("message")) if text]
    if not said and record.get("unpacked"):
        said = [f"{record['unpacked_count']} unpacked: {record['unpacked'][0]}"]
    selects = record.get("selects")
    if selects:
        error += " selects"
        said = [*said, f"{selects['error']:.1e} with its own choice"]
    note = _plain((said or [""])[0])
    cells = (
        f"`{record['class']}`",
        record["inputs"],
        packed,
        _yes(record.get("strict")) if record.get("compiles") else "",
        error,
        _yes(record.get("bits")),
        note,
    )
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    """What an error says, shortened, as it is: no Markdown, and no folder of the campaign's."""
    text = re.sub(r"/\S*/kbitc-architecture-\w+/", "", text)[:160].replace("`", "'").replace("\n", " ")
    return re.sub(r"[|<\[\]*_]", lambda found: "&lt;" if found[0] == "<" else f"\\{found[0]}", text)


def _yes(value: Any) -> str:
    return "yes" if value else "no"
