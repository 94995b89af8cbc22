"""Random kills of compile, --force, --resume and export, each of which must end in the same bytes.

    python -m benchmarks.kill --kills 200 --seconds 1800 [MODEL]

Each round starts a command, sends it SIGKILL (or SIGINT or SIGTERM) after a random part of the time that it
takes, looks at what is there, and goes on as a user would. Prints a table with a row for each scenario;
exit code 1 if anything was half-written, lost, or of other bytes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console

from benchmarks.tables import Section, print_section
from kbitc.system.checksums import digest_of_file

COLUMNS = (
    ("name", "scenario", ""),
    ("kills", "kills", "d"),
    ("hit", "in time", "d"),
    ("left", "left to go on with", "d"),
    ("identical", "identical at the end", "d"),
    ("faults", "faults", "d"),
)
SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["kbitc.compiler.driver", "transformers.models.auto.modeling_auto", "torch.export"]
CODES = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass(frozen=True)
class Scenario:
    """A command that is killed.

    Attributes:
        name: for the table.
        command: of kbitc, without ``-o OUT``.
        again: what is added where a killed run left something to go on with.
        is_forced: an older folder stands at OUT, and must stand there at every moment.
    """

    name: str
    command: tuple[str, ...]
    again: tuple[str, ...] = ()
    is_forced: bool = False


@dataclass
class Campaign:
    """What is killed, in which folder, and what came out.

    Attributes:
        work: folder for everything.
        random: of signals and delays.
        signals: to choose from.
        faults: what was wrong, a line each.
        numbers: of the processes so far.
        counts: by scenario.
    """

    work: Path
    random: random.Random
    signals: Sequence[signal.Signals] = (signal.SIGKILL,)
    faults: list[str] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def finished(self, *arguments: str) -> tuple[Path, float]:
        """Run a command to its end in a folder of its own; its output and its seconds."""
        out = Path(tempfile.mkdtemp(dir=self.work)) / "out"
        started = time.monotonic()
        process = self.started([*arguments, "-o", str(out)])
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"kbitc {' '.join(arguments)}: {self.said(process)}")
        return out, time.monotonic() - started

    def started(self, arguments: Sequence[str]) -> BaseProcess:
        """A process that runs a command, forked from one that has imported what it needs."""
        log = self.work / f"{next(self.numbers)}.log"
        process = SERVER.Process(target=command, args=(tuple(arguments), log), name=log.name)
        process.start()
        return process

    def said(self, process: BaseProcess) -> str:
        """The end of what it wrote to standard error."""
        log = self.work / process.name
        return log.read_text(encoding="utf-8", errors="replace").strip()[-300:] if log.exists() else ""

    def killed(self, arguments: Sequence[str], seconds: float, partial: Path) -> bool:
        """Start a command and end it at a random moment; False if it was faster.

        Half of the moments are spread over the whole run, half over what comes after its first file.
        """
        number = self.random.choice(self.signals)
        process = self.started(arguments)
        if self.random.random() < 0.5:
            process.join(seconds * self.random.random())
        else:
            while process.is_alive() and not any(partial.glob("new/*")):
                time.sleep(0.001)
            process.join(seconds * 0.3 * self.random.random() ** 2)
        if process.exitcode is None:
            os.kill(process.pid, number)
        process.join()
        # Before kbitc listens the signal itself ends a process, which a shell calls 130 and 143 as well.
        if process.exitcode not in (0, CODES[number], -number):
            self.faults.append(f"exit code {process.exitcode}: {' '.join(arguments)}: {self.said(process)}")
        return process.exitcode != 0

    def round(self, scenario: Scenario, whole: dict[str, str], old: Path, seconds: float) -> None:
        """Kill one command until it ends, and compare what it made."""
        count = self.counts.setdefault(scenario.name, Counter())
        folder = Path(tempfile.mkdtemp(dir=self.work))
        out, partial = folder / "out", folder / ".out.partial"
        before = None
        if scenario.is_forced:
            shutil.copytree(old, out)
            before = digests(out)
        arguments = [*scenario.command, "-o", str(out), *(["--force"] if scenario.is_forced else [])]
        count["kills"] += 1
        count["hit"] += self.killed(arguments, seconds, partial)
        there = digests(out) if out.exists() else None
        if there not in (whole, before):
            self.faults.append(f"{scenario.name}: OUT is neither what it was nor what it will be")
        is_left = partial.exists() and any(path.name != "lock" for path in partial.iterdir())
        count["left"] += is_left
        if is_left and scenario.again:
            arguments += scenario.again
            if self.random.random() < 0.5:  # and that one is killed too
                count["kills"] += 1
                count["hit"] += self.killed(arguments, seconds, partial)
        if out.exists() and digests(out) == whole and not partial.exists():
            count["identical"] += 1
        else:
            last = self.started(arguments)
            last.join()
            is_same = last.exitcode == 0 and digests(out) == whole
            count["identical"] += is_same
            if not is_same:
                self.faults.append(f"{scenario.name}: {' '.join(arguments)}: {self.said(last)}")
            elif sorted(path.name for path in folder.iterdir()) not in (["out"], [".out.old", "out"]):
                self.faults.append(f"{scenario.name}: something is left beside OUT")
        shutil.rmtree(folder)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the pages, which hold times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".html"]
    return {str(p.relative_to(folder)): digest_of_file(p) for p in sorted(files)}


def command(arguments: Sequence[str], log: Path) -> None:
    """What a process runs: ``kbitc`` with these arguments, its output in a file."""
    from kbitc.cli import main as kbitc

    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["kbitc", *arguments]
    kbitc()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=3600, help="of killing; stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", action="store_true", help="also SIGINT and SIGTERM")
    parser.add_argument("--no-export", action="store_true", help="compile alone, which is quicker")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kbitc-kill-") as folder:
        signals = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM) if given.signals else (signal.SIGKILL,)
        campaign = Campaign(Path(folder), random.Random(given.seed), signals)
        run(campaign, given.model, given.kills, given.seconds, with_export=not given.no_export)
    rows = [
        {"name": name, "faults": 0, **{key: count[key] for key in ("kills", "hit", "left", "identical")}}
        | {"faults": sum(fault.startswith(f"{name}:") for fault in campaign.faults)}
        for name, count in campaign.counts.items()
    ]
    print_section(Console(), Section(f"{given.model}, seed {given.seed}", COLUMNS, rows, campaign.faults))
    return 1 if campaign.faults else 0


def run(campaign: Campaign, model: str, kills: int, seconds: float, *, with_export: bool = True) -> None:
    """Rounds of all scenarios in turn until there were so many kills, or so many seconds have passed."""
    SERVER.set_forkserver_preload(PRELOADED)
    compile_ = ("compile", model, "--spec", "nf4:64")
    old, _ = campaign.finished("compile", model, "--spec", "int3:64")
    whole, length = campaign.finished(*compile_)
    export = ("export", str(whole), "--format", "onnx")
    scenarios = {
        Scenario("compile", compile_, ("--resume",)): (whole, old, length),
        Scenario("compile --force", compile_, ("--resume",), is_forced=True): (whole, old, length),
    }
    if with_export:
        exported, export_length = campaign.finished(*export)
        other, _ = campaign.finished(*export, "--storage", "compact")
        scenarios[Scenario("export", export)] = (exported, other, export_length)
        scenarios[Scenario("export --force", export, is_forced=True)] = (exported, other, export_length)
    wanted = {scenario: digests(made) for scenario, (made, _, _) in scenarios.items()}
    deadline = time.monotonic() + seconds
    while True:
        for scenario, (_, before, length) in scenarios.items():
            if (
                time.monotonic() > deadline
                or sum(count["kills"] for count in campaign.counts.values()) >= kills
            ):
                return
            campaign.round(scenario, wanted[scenario], before, length)


if __name__ == "__main__":
    sys.exit(main())
