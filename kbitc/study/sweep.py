"""A sweep: every model of a study under every treatment, each job once, whatever interrupts it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from kbitc.checkpoint import Checkpoint, open_checkpoint
from kbitc.compiler.sampling import SEED
from kbitc.errors import KbitcError
from kbitc.evaluation.perplexity import BATCH_LOGITS, BATCH_TOKENS
from kbitc.graph.context import Progress, silent
from kbitc.study.grid import ABSMAX, LINEAR, Grid, Treatment
from kbitc.study.ledger import Ledger, Row
from kbitc.study.subject import Subject, open_subject
from kbitc.study.zero_shot import Tasks, mean_accuracy
from kbitc.system.checksums import digest
from kbitc.system.memory import forget_peak, peak_bytes
from kbitc.system.work import IN_PROCESS, Engine
from kbitc.version import VERSION

SAVE_EVERY = 30.0  # seconds; between two, what was measured lies in the jobs' own files


@dataclass(frozen=True)
class Study:
    """What a sweep is asked for, beside its models.

    Attributes:
        grid: the treatments.
        text: to score.
        text_name: of its file.
        scope: which weights are quantized, see `kbitc.study.grid.SCOPES`.
        context: tokens a window.
        limit: tokens of the text that count; None for all.
        calibrate: on what, for quantizers that need it; as ``kbitc compile --calibrate``.
        tasks: that are scored beside the text; None for none.
    """

    grid: Grid
    text: str
    text_name: str
    scope: str = LINEAR
    context: int = 512
    limit: int | None = None
    calibrate: str = "self"
    tasks: Tasks | None = None

    def calibration(self, treatment: Treatment) -> str:
        """What decides the evidence of a treatment: a mode, or a file's contents; "" for none."""
        if treatment.quantizer == ABSMAX:
            return ""
        path = Path(self.calibrate)
        return digest(path.read_bytes()) if path.is_file() else self.calibrate

    def key(self, fingerprint: str, treatment: Treatment) -> str:
        """Hash of all that decides a job's result."""
        import torch
        import transformers

        parts: dict[str, object] = {
            "model": fingerprint,
            "format": str(treatment.form),
            "quantizer": treatment.quantizer,
            "calibration": self.calibration(treatment),
            "scope": self.scope,
            "text": digest(self.text.encode()),
            "context": self.context,
            "limit": self.limit,
            "batch": [BATCH_TOKENS, BATCH_LOGITS],
            "seed": SEED,
            "versions": [VERSION, torch.__version__, transformers.__version__],
        }
        if self.tasks is not None:
            parts["tasks"] = self.tasks.identity()
        return digest(json.dumps(parts, sort_keys=True).encode())[:32]


@dataclass(frozen=True)
class Outcome:
    """What a sweep did.

    Attributes:
        rows: of the table, those of earlier sweeps included.
        ran: jobs that ran now.
        known: jobs of this sweep that were done before.
    """

    rows: list[Row]
    ran: int
    known: int


def sweep(
    models: Sequence[str],
    study: Study,
    table: Path,
    on_progress: Progress = silent,
    on_row: Callable[[Row], object] = lambda _: None,
    engine: Engine = IN_PROCESS,
) -> Outcome:
    """Run every job that is not done yet, and write the table, also of what was done before a stop.

    Args:
        models: folders, GGUF files, hub ids or "demo"; a model that is named twice counts once.
        study: the jobs of each.
        table: Parquet file; its jobs' files lie in a folder beside it.
        on_progress: told of each job.
        on_row: told of each result.
        engine: that runs the jobs.

    Raises:
        UsageError: a model that is no causal language model, too short a text, tasks that cannot be scored,
            or another sweep at work.
        SourceError: a model or an earlier result cannot be read.
    """
    treatments = study.grid.treatments()
    if study.tasks is not None:
        study.tasks.check()
    ledger = Ledger(table)
    with ledger.held(), ExitStack() as stack:
        waiting, known = _waiting(models, study, treatments, ledger)
        jobs = _Jobs(study, waiting)
        stack.enter_context(closing(jobs))
        total, done, saved = len(jobs.items), 0, time.monotonic()
        on_progress("jobs", 0, total)
        try:
            for _, row in stack.enter_context(closing(engine.run(jobs, jobs.items))):
                ledger.add(row)
                done += 1
                on_row(row)
                on_progress(f"jobs {done}/{total}", done, total)
                if time.monotonic() - saved > SAVE_EVERY:
                    ledger.assemble()
                    saved = time.monotonic()
        except BaseException:
            with contextlib.suppress(KbitcError):  # what went wrong first is what to tell
                ledger.assemble()
            raise
        return Outcome(ledger.assemble(), done, known)


def _waiting(
    models: Sequence[str], study: Study, treatments: Sequence[Treatment], ledger: Ledger
) -> tuple[dict[str, dict[str, Treatment]], int]:
    """The jobs of each model that are not done, by key, and how many are."""
    waiting: dict[str, dict[str, Treatment]] = {}
    seen: set[str] = set()
    for source in dict.fromkeys(models):
        with open_checkpoint(source) as checkpoint:
            fingerprint = checkpoint.fingerprint()
        jobs = {study.key(fingerprint, treatment): treatment for treatment in treatments}
        waiting[source] = {key: job for key, job in jobs.items() if key not in seen and not ledger.has(key)}
        seen |= set(jobs)
    return waiting, len(seen) - sum(map(len, waiting.values()))


@dataclass(frozen=True)
class Job:
    """One model under one treatment.

    Attributes:
        source: the model, as the user named it.
        key: see `Study.key`.
        treatment: of its weights.
    """

    source: str
    key: str
    treatment: Treatment

    def __str__(self) -> str:
        return f"{self.source} at {self.treatment}"


class _Jobs:
    """`kbitc.system.work.Work`: the job of a model, which stays loaded until one of another model comes."""

    def __init__(self, study: Study, waiting: Mapping[str, Mapping[str, Treatment]]) -> None:
        self.study = study
        self.treatments = {source: list(jobs.values()) for source, jobs in waiting.items()}
        self.items = [Job(source, key, own) for source, jobs in waiting.items() for key, own in jobs.items()]
        self._opened: tuple[str, Checkpoint, Subject] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "items": [], "_opened": None}

    def load(self, job: Job) -> None:
        """Nothing: a model that was read ahead would be a second one in memory."""

    def finish(self, job: Job, _: None) -> Row:
        """The row of a job."""
        opened = self._opened
        if opened is None or opened[0] != job.source:
            self.close()  # before the next is loaded, or two were in memory
            opened = self._opened = (job.source, *self._open(job.source))
        return _run(opened[1], opened[2], self.study, job.key, job.treatment)

    def _open(self, source: str) -> tuple[Checkpoint, Subject]:
        study, checkpoint = self.study, open_checkpoint(source)
        treatments = self.treatments[source]
        subject = open_subject(
            checkpoint, study.text, study.context, study.limit, study.scope, treatments, study.calibrate
        )
        return checkpoint, subject

    def close(self) -> None:
        """Let go of the model."""
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None


def _run(checkpoint: Checkpoint, subject: Subject, study: Study, key: str, treatment: Treatment) -> Row:
    import torch
    import transformers

    form = treatment.form
    forget_peak()
    started = time.monotonic()
    subject.treat(treatment)
    scored = subject.score()
    # A model whose loss is no number gives figures to compare choices by that are none either.
    tasks = study.tasks if scored.loss is not None else None
    hits = {} if tasks is None else subject.solve(tasks)
    seconds = time.monotonic() - started
    spec = form.spec
    accuracy, accuracy_error = mean_accuracy(hits)
    zero, variant = "+zp" if spec.has_zero_point else "", f"+{spec.variant}" if spec.variant else ""
    return Row(
        key=key,
        model=checkpoint.label,
        fingerprint=checkpoint.fingerprint(),
        family=subject.family,
        parameters=subject.program.parameter_count,
        quantized_parameters=subject.treated_parameters,
        format=str(form),
        type=f"{spec.family}{zero}{variant}",
        bits=spec.bits,
        block=0 if spec.is_left_alone else spec.block,
        quantizer=treatment.quantizer,
        scope=study.scope,
        outliers=spec.outliers,
        has_mean=form.has_mean,
        is_flat=form.is_flat,
        total_bits=subject.total_bits(form),
        paper_bits=subject.paper_bits(form),
        loss=scored.loss,
        loss_error=scored.error,
        losses=scored.losses,
        tokens=subject.ids.shape[0] * (subject.ids.shape[1] - 1),
        context=study.context,
        text=study.text_name,
        text_sha256=digest(study.text.encode()),
        kept=[name for name in subject.program.weights if name not in subject.treated],
        calibrate="" if treatment.quantizer == ABSMAX else study.calibrate,
        calibration="" if treatment.quantizer == ABSMAX else subject.calibration,
        seed=SEED,
        seconds=round(seconds, 3),
        peak_bytes=peak_bytes(),
        kbitc=VERSION,
        torch=torch.__version__,
        transformers=transformers.__version__,
        tasks="" if tasks is None else tasks.label,
        accuracy=accuracy,
        accuracy_error=accuracy_error,
        hits=hits,
        lm_eval="" if tasks is None else tasks.version,
    )
