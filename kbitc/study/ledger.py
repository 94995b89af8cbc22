"""What jobs measured, on disk: one file a job, and one table of all of them.

The one thing to know: a job's file is written whole or not at all, under the hash of all that decides its
result, and the table is made of these files. So a sweep that is killed at any moment loses the job it was in.
In the table each task has columns of its own; jobs and tables from before there were tasks have none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kbitc.errors import BackendUnavailable, SourceError, UsageError, first_line
from kbitc.evaluation.intervals import standard_error
from kbitc.study.zero_shot import Hits, accuracy_of
from kbitc.system.files import Lock, LockHeld, scratch_beside, write_whole
from kbitc.system.json_file import MALFORMED, read_json

TABLE_FORMAT = 2
READ_FORMATS = ("1", "2")
"""1 has no tasks, whose columns read as not measured."""
ACCURACY, ERROR, HITS = "accuracy_", "_error", "hits_"
"""Around a task's name in its columns."""
FORMAT_KEY = b"kbitc_sweep_format"
PARTIAL = "*.partial"


@dataclass(frozen=True)
class Row:
    """One job: a model under one treatment, and what came of it.

    Attributes:
        key: hash of all that decides the result.
        model: as the user named it.
        fingerprint: of its files.
        family: of models whose losses can be compared: one architecture, one vocabulary, one cut of the text.
        parameters: of the model, tied ones counted once, embeddings included.
        quantized_parameters: those that the job quantizes.
        format: as `kbitc.study.formats.parse_format` reads it.
        type: the data type without bits, with variant and zero point.
        bits: of a code; 16 for the model at 16 bits.
        block: weights a scale; 0 at 16 bits.
        quantizer: that chose codes and scales.
        scope: "linear" or "all".
        outliers: percent of input features at 16 bits.
        has_mean: centred.
        is_flat: blocks cross rows.
        total_bits: stored bits of the whole model, as its artifact would have them.
        paper_bits: of the quantized weights alone, as the paper counts: n (k + 16 / B + p (16 - k)).
        loss: mean negative log-likelihood, nats per token; None where it is not finite.
        loss_error: its standard error, over windows; None of one window.
        losses: of each window, in order.
        tokens: that were predicted.
        context: tokens a window.
        text: name of the scored file.
        text_sha256: of its contents.
        kept: names of the weights that stayed at 16 bits.
        calibrate: the option that says on what quantizers that need it were calibrated; "" for none.
        calibration: what quantizers that need one were calibrated on; "" for none.
        seed: of whatever is drawn in calibrating.
        seconds: of quantizing and scoring.
        peak_bytes: most memory of the process during the job.
        kbitc: version.
        torch: version.
        transformers: version.
        tasks: which examples accuracies are of; rows whose text here differs are not compared. "" for none.
        accuracy: mean of the tasks, each counted once; None where none was scored, or the loss is not finite.
        accuracy_error: its standard error, over examples; None of one example, or without an accuracy.
        hits: by task, 1 for each example that was right.
        lm_eval: version; "" without tasks.
    """

    key: str
    model: str
    fingerprint: str
    family: str
    parameters: int
    quantized_parameters: int
    format: str
    type: str
    bits: int
    block: int
    quantizer: str
    scope: str
    outliers: float
    has_mean: bool
    is_flat: bool
    total_bits: int
    paper_bits: float
    loss: float | None
    loss_error: float | None
    losses: Sequence[float]
    tokens: int
    context: int
    text: str
    text_sha256: str
    kept: Sequence[str]
    calibrate: str
    calibration: str
    seed: int
    seconds: float
    peak_bytes: int
    kbitc: str
    torch: str
    transformers: str
    tasks: str = ""
    accuracy: float | None = None
    accuracy_error: float | None = None
    hits: Hits = field(default_factory=dict)
    lm_eval: str = ""

    @property
    def treatment(self) -> str:
        """All that was done to the model's weights."""
        return f"{self.format} by {self.quantizer}, {self.scope}"


COLUMNS = tuple(column.name for column in fields(Row) if column.name != "hits")


class Ledger:
    """The files of one table's jobs, in a folder beside it."""

    def __init__(self, table: Path) -> None:
        self.table = table
        self.folder = table.with_name(f"{table.name}.jobs")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, no other sweep writes here; what a killed one left half-written is removed.

        Raises:
            UsageError: another one does, or nothing can be written there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = Lock.take(self.folder / "lock")
        except LockHeld as error:
            raise UsageError(f"{self.table}: another sweep (process {error.holder}) writes there") from error
        except OSError as error:
            raise UsageError(f"{self.folder}: cannot be written: {error.strerror}") from error
        try:
            for path in self.folder.glob(f".{PARTIAL}"):
                path.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def has(self, key: str) -> bool:
        """Whether a job is done."""
        return self._path(key).exists()

    def add(self, row: Row) -> None:
        """Keep what a job measured.

        Raises:
            UsageError: it cannot be written.
        """
        self._written(self._path(row.key), json.dumps(asdict(row), allow_nan=False) + "\n")

    def rows(self) -> list[Row]:
        """Of all jobs, in an order that does not depend on when they ran.

        Raises:
            SourceError: a file is damaged, or of another version.
        """
        return sorted((_row(path) for path in self.folder.glob("*.json")), key=_order)

    def assemble(self) -> list[Row]:
        """Write the table of all jobs, in one step, and return its rows."""
        rows = self.rows()
        write_table(self.table, rows)
        return rows

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    @staticmethod
    def _written(path: Path, text: str) -> None:
        try:
            write_whole(path, text)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def _order(row: Row) -> tuple[object, ...]:
    kind = (row.family, row.parameters, row.model, row.scope, row.quantizer, row.bits, row.type)
    return (*kind, row.block, row.outliers, row.has_mean, row.is_flat, row.key)


def _row(path: Path) -> Row:
    try:
        return Row(**read_json(path))
    except TypeError as error:
        raise SourceError(
            f"{path}: is no result of this version of kbitc ({first_line(error)}); remove it, and the sweep "
            "runs the job again"
        ) from error


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """A Parquet file of rows, replaced in one step.

    Raises:
        BackendUnavailable: pyarrow is missing.
        UsageError: it cannot be written.
    """
    arrow, parquet = need_arrow()
    every = list(rows)
    tasks = list(dict.fromkeys(task for row in every for task in row.hits))
    flat = [_columns(row) for row in every]
    table = arrow.Table.from_pylist(flat, schema=_schema(arrow, tasks))
    try:
        with scratch_beside(path) as scratch:
            parquet.write_table(table, scratch)
            scratch.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error


def read_table(path: Path) -> list[Row]:
    """The rows of a table.

    Raises:
        UsageError: no table is there.
        SourceError: it is none of a sweep, or of another version.
        BackendUnavailable: pyarrow is missing.
    """
    arrow, parquet = need_arrow()
    if not path.is_file():
        raise UsageError(
            f"{path}: there is no such file; 'kbitc sweep MODELS --text FILE -o {path}' makes it"
        )
    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise SourceError(f"{path}: is no Parquet file that can be read: {first_line(error)}") from error
    version = (table.schema.metadata or {}).get(FORMAT_KEY, b"").decode("ascii", "replace")
    if version not in READ_FORMATS:
        said = f"of format {version}, and this kbitc reads {TABLE_FORMAT}" if version else "of no sweep"
        raise SourceError(
            f"{path}: its table is {said}; run the sweep again with this version: it makes a new one"
        )
    try:
        return [_checked(values) for values in table.to_pylist()]
    except MALFORMED as error:
        raise SourceError(f"{path}: its rows are not those of a sweep: {first_line(error)}") from error


def _columns(row: Row) -> dict[str, Any]:
    """A row as its table has it: a task's accuracy, standard error and outcomes are columns of their own."""
    flat = asdict(row)
    for task, own in flat.pop("hits").items():
        flat |= {ACCURACY + task: accuracy_of(own), ACCURACY + task + ERROR: standard_error(own)}
        flat[HITS + task] = own
    return flat


def _checked(values: Mapping[str, Any]) -> Row:
    own = {name: values[name] for name in COLUMNS if name in values}
    hits = {
        name.removeprefix(HITS): found
        for name, found in values.items()
        if name.startswith(HITS) and found is not None
    }
    row = Row(**own, hits=hits)
    if row.parameters < 1 or row.total_bits < 1 or (row.loss is not None and not math.isfinite(row.loss)):
        raise ValueError(f"the row {row.key} has figures that cannot be")
    if (row.accuracy is None) == bool(hits) or not all(hits.values()):
        raise ValueError(f"the row {row.key} has an accuracy that is not that of its examples")
    return row


def _schema(arrow: Any, tasks: Sequence[str]) -> Any:
    text, real = arrow.string(), arrow.float64()
    kinds = {"int": arrow.int64(), "float": real, "float | None": real, "str": text, "bool": arrow.bool_()}
    kinds |= {"Sequence[float]": arrow.list_(real), "Sequence[str]": arrow.list_(text)}
    columns = [
        arrow.field(column.name, kinds[str(column.type)]) for column in fields(Row) if column.name in COLUMNS
    ]
    for task in tasks:
        columns += [arrow.field(ACCURACY + task + end, real) for end in ("", ERROR)]
        columns.append(arrow.field(HITS + task, arrow.list_(arrow.int8())))
    return arrow.schema(columns, metadata={FORMAT_KEY: str(TABLE_FORMAT)})


def need_arrow() -> tuple[Any, Any]:
    """``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        BackendUnavailable: they are not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise BackendUnavailable(
            "tables of sweeps are Parquet files, which pyarrow reads and writes; pip install 'kbitc[sweep]'"
        ) from error
    return pa, parquet
