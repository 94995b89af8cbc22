"""Every model class of transformers, tiny and random, through compile, load and a comparison of outputs.

Each class runs in a process of its own with a limit on time and memory; one JSON line each is appended to the
--jsonl file, and what stands there is not run again.

    python -m benchmarks.architectures --limit 40 --jsonl arch.jsonl
    python -m benchmarks.architectures --only llama --only WhisperForConditionalGeneration
    python -m benchmarks.architectures --jobs 2 --jsonl arch.jsonl --markdown docs/architectures.md
    python -m benchmarks.architectures --limit 0 --jsonl arch.jsonl --markdown docs/architectures.md

The last one runs nothing: it only writes the table.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny models, and processes that fork

import argparse
import fnmatch
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.architectures.classes import ModelClass, model_classes, spread
from benchmarks.architectures.report import page, summary
from benchmarks.processes import Job, own_cache, run_jobs

JSONL = Path("architectures.jsonl")


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write; 1 where a bar is missed."""
    options = _options(arguments)
    known = _read(options.jsonl)
    chosen = model_classes(every_head=options.every_head)
    if options.only:
        chosen = [each for each in chosen if any(_is_named(each, name) for name in options.only)]
        if not chosen:
            print(f"no model class or type is named {', '.join(options.only)}", file=sys.stderr)
            return 2
    chosen = spread(chosen, options.limit)
    again = [each for each in chosen if (each.name, each.model_type) not in known or options.again]
    print(f"{len(chosen)} classes, {len(again)} to run", flush=True)
    started, done = time.time(), 0
    with options.jsonl.open("a", encoding="utf-8") as log:
        for record in run_jobs([_job(each, options) for each in again], options.jobs):
            done += 1
            known[record["class"], record["model_type"]] = record
            log.write(json.dumps(record) + "\n")
            log.flush()
            print(f"[{done}/{len(again)} {time.time() - started:.0f} s] {line(record)}", flush=True)
    records = list(known.values())
    text, is_met = summary(records)
    print(f"\n{text}")
    if options.markdown:
        options.markdown.write_text(page(records, options.spec), encoding="utf-8")
    return 0 if is_met else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.architectures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a class or model type; * stands for any"
    )
    parser.add_argument("--limit", type=int, help="so many classes, spread over all kinds")
    parser.add_argument("--every-head", action="store_true", help="every head of every type, not one a type")
    parser.add_argument("--again", action="store_true", help="run classes that the --jsonl file has")
    parser.add_argument("--jobs", type=int, default=1, help="classes at one time [1]")
    parser.add_argument("--timeout", type=float, default=180, metavar="S", help="seconds of a class [180]")
    parser.add_argument("--memory", type=float, default=6, metavar="GB", help="of a class [6]")
    parser.add_argument("--spec", default="int8:32", help="format of the comparison [int8:32]")
    parser.add_argument(
        "--bits", type=float, default=4, help="budget of the calibrated compile; 0 for none [4]"
    )
    parser.add_argument("--jsonl", type=Path, default=JSONL, help=f"results, to go on from [{JSONL}]")
    parser.add_argument("--markdown", type=Path, help="write the table of all results here")
    return parser.parse_args(arguments)


def _is_named(each: ModelClass, name: str) -> bool:
    return any(fnmatch.fnmatchcase(text.lower(), name.lower()) for text in (each.name, each.model_type))


def _read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Results so far; of a class that ran twice, the last."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(text) for text in lines if text.endswith("}")]
    return {(record["class"], record["model_type"]): record for record in records}


def _job(each: ModelClass, options: argparse.Namespace) -> Job:
    def work(tell: Any) -> None:
        from benchmarks.architectures.measure import measure  # imports torch: after OMP_NUM_THREADS

        with tempfile.TemporaryDirectory(prefix="kbitc-cache-") as cache, own_cache(Path(cache)):
            measure(each, tell, spec=options.spec, bits=options.bits or None)

    start = {"class": each.name, "model_type": each.model_type, "kind": each.kind, "stage": "start"}
    return Job(work, start, options.timeout, int(options.memory * 10**9))


def line(record: dict[str, Any]) -> str:
    """One result on one line."""
    parts = [f"{record['kind']}: {record['class']}"]
    if "packed_share" in record:
        parts.append(f"packed {100 * record['packed_share']:.1f} %")
    if "error" in record:
        parts.append(f"error {record['error']:.1e}{' =' if record.get('bit_equal') else ''}")
    if "bits_per_param" in record:
        parts.append(f"{record['bits_per_param']:.2f} bits")
    elif record.get("bits"):
        parts.append("no budget: what is not packed weighs more")
    said = list((record.get("errors") or {}).items())
    if record.get("message"):
        said.append((record["stage"], record["message"]))
    parts += [f"{stage}: {text[:140]}" for stage, text in said]
    return ", ".join(parts)


def _warm() -> None:
    """Import before forking what every process needs."""
    import torch

    torch.set_num_threads(1)
    import transformers.models.llama.modeling_llama  # noqa: F401  # and all that modeling files import

    import kbitc.artifact.loading
    import kbitc.compiler.driver  # noqa: F401


if __name__ == "__main__":
    _warm()
    sys.exit(main())
