"""Seeded mutants of every file that kbitc reads, through the command line and the Python interface.

Each mutant runs in a process of its own with a limit on time and memory. A mutant is fine where kbitc refuses
it with an error of its own, or gives what the good file gives. Anything else is a failure: a crash, a hang,
another exception, too much memory, or a changed payload that is accepted. Seed and number are all of it.

    python -m benchmarks.fuzz --mutants 500
    python -m benchmarks.fuzz --mutants 10000 --seconds 1800 --jobs 2 --log fuzz.jsonl
    python -m benchmarks.fuzz --first 2000 --mutants 500
    python -m benchmarks.fuzz --seed 7 --mutant 1234
    python -m benchmarks.fuzz --mutants 150 --quick
    python -m benchmarks.fuzz --only artifact --only GGUF --failures failures

The second goes on where it stopped; the fourth shows what one mutant does, with its traceback. What the table
calls outside kbitc is a model that transformers made of an artifact whose config names kbitc no more: it is
never asked then (docs/artifact.md, "Verification").
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: what is forked must have had one thread
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import sys
import time
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run, print a table; 1 where a mutant failed."""
    options = _options(arguments)
    from benchmarks.fuzz.campaign import QUICK, Campaign, Limits  # imports torch: --help need not

    limits = Limits(options.timeout, int(options.memory * 10**9), options.seconds)
    only = [*options.only, *(QUICK if options.quick else ())]
    with Campaign(options.seed, limits, only=only, failures=options.failures) as campaign:
        if options.mutant is not None:
            campaign.show(options.mutant)
            return 0
        started = time.monotonic()
        results = campaign.run(options.mutants, first=options.first, jobs=options.jobs, log=options.log)
        print(results.table())
        print(f"{time.monotonic() - started:.0f} s")
        if results.failures:
            print(results.signatures())
            print(
                f"failing mutants are in {options.failures}; one again: --seed {options.seed} --mutant NUMBER"
            )
        if results.is_cut:
            print(
                f"{results.count} of {options.mutants} mutants in {options.seconds:g} s; "
                "with --log, the same command goes on"
            )
        return 1 if results.failures else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mutants", type=int, default=500, help="how many [500]")
    parser.add_argument("--first", type=int, default=0, help="number of the first [0]")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn [0]")
    parser.add_argument("--seconds", type=float, default=1800, help="stop after so many [1800]")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at one time [2]")
    parser.add_argument("--timeout", type=float, default=10, help="seconds of a mutant [10]")
    parser.add_argument("--memory", type=float, default=3, metavar="GB", help="of a mutant [3]")
    parser.add_argument("--quick", action="store_true", help="only ways in that take milliseconds")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="ways in whose name holds it"
    )
    parser.add_argument(
        "--failures", type=Path, default=Path("fuzz-failures"), help="folder of failing mutants"
    )
    parser.add_argument("--log", type=Path, help="one JSON line a mutant; those in it are not run again")
    parser.add_argument(
        "--mutant", type=int, metavar="NUMBER", help="run this one here and show what it does"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
