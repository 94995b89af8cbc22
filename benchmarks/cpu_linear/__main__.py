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
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.cpu_linear.bars import bars_section, find_bars
from benchmarks.cpu_linear.bench import make_bench
from benchmarks.cpu_linear.peer_process import open_peers
from benchmarks.cpu_linear.report import legend, machine, machine_line
from benchmarks.cpu_linear.sections import flags_section, peers_section, rows_section, specs_section
from benchmarks.tables import markdown, print_section


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="cpu_linear", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    if options.isa:
        os.environ["KBITC_CPU"] = options.isa  # read when the first op loads the kernels
    torch.set_num_threads(options.threads)
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 160)
    with torch.inference_mode():
        bench = make_bench(options)
        facts = machine(bench)
        console.print(machine_line(facts), legend(bench), sep="\n", highlight=False)
        peers, reason = open_peers(options)
        sections = []
        others = peers.contenders() if peers else []
        steps = (
            partial(peers_section, peers=others, reason=reason),
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
