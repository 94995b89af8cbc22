"""The campaign: numbered mutants in forked processes, what became of each, and the table.

The one thing to know: the good files go through every way in once in this process, before any fork. That
gives the digests that mutants must not change, and everything that is imported lazily is imported then.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz.mutators import misplace, mutate_file
from benchmarks.fuzz.targets import ChangedError, OutsideError, Target, targets
from benchmarks.processes import LATE, Job, Tell, discard_output, own_cache, run_jobs

FINE = ("refused", "same", "no digest")
OUTSIDE = "outside kbitc"
"""transformers' own doing: counted, neither fine nor a failure of kbitc. docs/artifact.md says so."""
FAILURES = ("accepted", "exception", "memory", "hang", "crash")
CELL = 14  # characters of a column
KEPT = 3  # failing mutants of one signature
MISPLACED = 0.04  # share of mutants whose file is not where or what it should be
SEVERAL = 0.08
PATIENCE = 3


QUICK = ("open and read", "artifact: load", "file: load", "from_pretrained", "moments")
"""Parts of the names of ways in that take milliseconds."""


def sample(count: int = 150, seed: int = 0, failures: Path | None = None) -> Results:
    """A few mutants of the quick ways in: what a test can afford."""
    with Campaign(seed, only=QUICK, failures=failures) as campaign:
        return campaign.run(count)


def _nobody(record: dict[str, Any]) -> None:
    """Is told, and does nothing."""


@dataclass(frozen=True)
class Limits:
    """Of one mutant: seconds and bytes; of the campaign: seconds."""

    timeout: float = 10
    memory: int = 3 * 10**9
    seconds: float = 1800


@dataclass
class Results:
    """What became of the mutants.

    Attributes:
        outcomes: how many by target and outcome.
        failed: records of those that are not fine.
        is_cut: the time was over before the last one.
    """

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)
    is_cut: bool = False

    @property
    def count(self) -> int:
        """Mutants that ran."""
        return sum(counter.total() for counter in self.outcomes.values())

    @property
    def failures(self) -> int:
        """Mutants that are not fine."""
        return len(self.failed)

    def add(self, record: dict[str, Any]) -> None:
        """Count one."""
        self.outcomes.setdefault(record["target"], Counter())[record["outcome"]] += 1
        if record["outcome"] in FAILURES:
            self.failed.append(record)

    def table(self) -> str:
        """Outcomes by target."""
        names = [*FINE, OUTSIDE, *FAILURES]
        width = max([len(name) for name in self.outcomes] + [5])
        lines = ["".join([f"{'':{width}}", f"{'mutants':>{CELL}}", *(f"{name:>{CELL}}" for name in names)])]
        total: Counter[str] = Counter()
        for target, counter in sorted(self.outcomes.items()):
            total += counter
            lines.append(_table_row(target, counter, names, width))
        return "\n".join([*lines, _table_row("all", total, names, width)])

    def signatures(self) -> str:
        """Failures by what they have in common, most frequent first, with the number of one of them."""
        count: Counter[tuple[str, str]] = Counter()
        first: dict[tuple[str, str], dict[str, Any]] = {}
        for record in self.failed:
            key = (record["outcome"], record.get("signature", ""))
            count[key] += 1
            first.setdefault(key, record)
        return "\n".join(
            f"{number:>5} {outcome}: {signature}  [mutant {first[outcome, signature]['mutant']}, "
            f"{first[outcome, signature]['target']}: {first[outcome, signature].get('done', '')}]"
            for (outcome, signature), number in count.most_common()
        )


def _table_row(title: str, counter: Counter[str], names: Sequence[str], width: int) -> str:
    cells = (f"{counter[name] or '':>{CELL}}" for name in names)
    return "".join([f"{title:{width}}", f"{counter.total():>{CELL}}", *cells])


class Campaign:
    """Everything that a seed decides; use as a context manager, which removes the files in the end.

    Args:
        seed: of all mutants.
        limits: of each, and of all.
        only: parts of the names of targets; all where empty.
        failures: folder for the files of failing mutants.
    """

    def __init__(
        self,
        seed: int,
        limits: Limits | None = None,
        *,
        only: Sequence[str] = (),
        failures: Path | None = None,
    ) -> None:
        self.seed, self.limits, self.failures = seed, limits or Limits(), failures
        self.targets = [each for each in targets() if not only or any(text in each.name for text in only)]
        if not self.targets:
            raise ValueError(f"no way in has any of {list(only)} in its name: {[t.name for t in targets()]}")
        self.kept: Counter[str] = Counter()

    def __enter__(self) -> Campaign:
        from benchmarks.fuzz.corpus import make_corpus

        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kbitc-fuzz-")))
            self.good, self.scratch = folder / "good", folder / "mutants"
            self.scratch.mkdir()
            stack.enter_context(own_cache(folder / "cache"))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore")
            with discard_output():
                make_corpus(self.good, {each.item for each in self.targets})
                self.digests = {
                    each.name: self._act(each, self._copy(each, each.item)) for each in self.targets
                }
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _copy(self, target: Target, name: str) -> Path:
        place = self.scratch / f"good-{target.name.replace('/', ' ')}" / name
        shutil.copytree(self.good / target.item, place, symlinks=True)
        return place

    def _act(self, target: Target, folder: Path) -> str:
        return target.act(folder, self.good)

    def target_of(self, number: int) -> Target:
        """The way in that a mutant takes."""
        random = Random(f"{self.seed} {number} target")
        return random.choices(self.targets, [each.share for each in self.targets])[0]

    def make(self, number: int) -> tuple[Target, Path, str]:
        """A mutant's files: its target, its folder, and what was done to it."""
        target, random = self.target_of(number), Random(f"{self.seed} {number}")
        folder = self.scratch / str(number) / target.item
        shutil.copytree(self.good / target.item, folder, symlinks=True)
        done = []
        for _ in range(2 if random.random() < SEVERAL else 1):
            files = target.candidates(folder)
            if not files:
                break
            change = misplace if random.random() < MISPLACED else mutate_file
            done.append(change(random.choice(files), random))
        return target, folder, "; ".join(done)

    def try_one(self, number: int, tell: Tell = _nobody) -> dict[str, Any]:
        """Make a mutant and see what becomes of it, in this process; ``tell`` is given what was made."""
        target, folder, done = self.make(number)
        record = {"mutant": number, "target": target.name, "done": done}
        tell(record)
        try:
            found = self._act(target, folder)
        except Exception as error:  # noqa: BLE001  # this is what the campaign looks for
            return record | _outcome(error, target)
        expected = self.digests[target.name]
        if not expected:
            return record | {"outcome": "no digest"}
        return record | (
            {"outcome": "same"} if found == expected else {"outcome": "accepted", "signature": target.name}
        )

    def show(self, number: int) -> None:
        """Run one mutant here and print what it does."""
        target, folder, done = self.make(number)
        print(f"mutant {number}: {target.name}: {done}")
        try:
            found = self._act(target, folder)
        except Exception:  # noqa: BLE001
            traceback.print_exc()
        else:
            print("same" if found == self.digests[target.name] else f"another digest: {found}")
        if self.failures is not None:
            self._keep({"mutant": number, "target": target.name, "done": done, "outcome": "shown"})

    def run(self, count: int, *, first: int = 0, jobs: int = 2, log: Path | None = None) -> Results:
        """So many mutants, numbered from ``first`` on; those that the log has are taken from there."""
        results, started = Results(), time.monotonic()
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        known = {}
        if log is not None and log.exists():
            lines = log.read_text(encoding="utf-8").splitlines()
            entries = [json.loads(line) for line in lines if line.endswith("}")]
            known = {entry["mutant"]: entry for entry in entries if entry["seed"] == self.seed}
        numbers = range(first, first + count)
        for number in numbers:
            if number in known:
                results.add(known[number])

        def waiting() -> Iterator[Job]:
            for number in numbers:
                if number not in known:
                    if time.monotonic() - started > self.limits.seconds:
                        results.is_cut = True
                        return
                    yield self._job(number)

        for ended in run_jobs(waiting(), jobs):
            record = self._again(ended) if ended.get("message", "").startswith(LATE) else ended
            _judge(record)
            if record["outcome"] in FAILURES:
                self._keep(record)
            shutil.rmtree(self.scratch / str(record["mutant"]), ignore_errors=True)
            results.add(record)
            if log is not None:
                with log.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps({"seed": self.seed, **record}) + "\n")
        return results

    def _again(self, record: dict[str, Any]) -> dict[str, Any]:
        """With more time and alone: on a busy machine the good file may be late as well."""
        shutil.rmtree(self.scratch / str(record["mutant"]), ignore_errors=True)
        return next(run_jobs([self._job(record["mutant"], PATIENCE)], 1))

    def _job(self, number: int, patience: float = 1) -> Job:
        def work(tell: Tell) -> None:
            tell(self.try_one(number, tell))

        start = {"mutant": number, "target": self.target_of(number).name}
        return Job(work, start, patience * self.limits.timeout, self.limits.memory)

    def _keep(self, record: dict[str, Any]) -> None:
        """The files of a failing mutant, the first few of each signature."""
        signature = f"{record['outcome']} {record.get('signature')}"
        self.kept[signature] += 1
        if self.failures is None or self.kept[signature] > KEPT:
            return
        place = self.failures / f"{self.seed}-{record['mutant']}-{record['outcome']}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        (place / "mutant.json").write_text(json.dumps({"seed": self.seed, **record}, indent=1) + "\n")
        for path in (self.scratch / str(record["mutant"])).rglob("*"):
            if path.is_file() and not path.is_symlink():
                copy = place / path.relative_to(self.scratch / str(record["mutant"]))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def _judge(record: dict[str, Any]) -> None:
    """An outcome for those that did not live to tell theirs."""
    message = record.get("message")
    if message is None:
        record.setdefault("outcome", "crash")
        record.setdefault("signature", "the process ended without a word")
    elif message.startswith(LATE):
        record |= {"outcome": "hang", "signature": message}
    elif message.startswith("killed by"):
        record |= {"outcome": "crash", "signature": message}
    else:
        record |= {"outcome": "memory" if "MemoryError" in message else "exception", "signature": message}


def _outcome(error: Exception, target: Target) -> dict[str, Any]:
    from kbitc.errors import KbitcError

    if isinstance(error, KbitcError):
        return {"outcome": "refused"}
    if isinstance(error, OutsideError):
        return {"outcome": OUTSIDE}
    if isinstance(error, ChangedError):
        return {"outcome": "accepted", "signature": str(error)}
    is_memory = isinstance(error, MemoryError) or "allocate memory" in str(error) or "bad_alloc" in str(error)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}kbitc{os.sep}" in frame.filename]
    if target.is_foreign and not ours and not is_memory:
        return {"outcome": "refused"}
    place = f" at {Path(ours[-1].filename).name}:{ours[-1].name}" if ours else ""
    text = (str(error).splitlines() or [""])[0][:300]
    return {
        "outcome": "memory" if is_memory else "exception",
        "signature": f"{type(error).__name__}{place}",
        "text": text,
        "traceback": "".join(traceback.format_exception(error))[-3000:],
    }
