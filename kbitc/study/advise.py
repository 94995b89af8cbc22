"""Which model at which spec fits a memory, by what a sweep measured, and the command that makes it.

The one thing to know: what was measured comes first. A model that was scored at one scope and format is
advised with that loss or accuracy and its interval; nothing is extrapolated to models or formats that were
not run.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from kbitc.errors import UsageError, did_you_mean
from kbitc.study.curves import ACCURACY, LOSS, MEASURES
from kbitc.study.formats import parse_format
from kbitc.study.ledger import Row

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
NORMAL = 1.96  # standard errors to each side of a 95 % interval


@dataclass(frozen=True)
class Advice:
    """A job that fits.

    Attributes:
        row: of it.
        command: that makes an artifact of it; None where none does.
        reason: why there is no command.
        by: what was chosen by, see `kbitc.study.curves.MEASURES`.
    """

    row: Row
    command: str | None
    reason: str = ""
    by: str = LOSS

    @property
    def nbytes(self) -> int:
        """Stored."""
        return self.row.total_bits // 8

    @property
    def value(self) -> float:
        """The loss, nats per token, or the mean accuracy."""
        value = self.row.loss if self.by == LOSS else self.row.accuracy
        assert value is not None
        return value

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the value, 95 %, over windows or examples; None of one of them."""
        error = self.row.loss_error if self.by == LOSS else self.row.accuracy_error
        if error is None:
            return None
        return self.value - NORMAL * error, self.value + NORMAL * error


def parse_size(text: str) -> int:
    """Bytes.

    >>> parse_size("4GB"), parse_size("1.5 MiB"), parse_size("800")
    (4000000000, 1572864, 800)

    Raises:
        UsageError: no size.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--memory {text}: expected a size such as 4GB, 700MB or 1.5GiB")
    return int(float(match[1]) * (UNITS | BINARY)[(match[2] or "").lower()])


def advise(
    rows: Sequence[Row], memory: int, family: str = "", *, by: str = LOSS, tasks: str = "", most: int = 5
) -> list[Advice]:
    """The jobs of lowest loss, or of highest mean accuracy, that fit, one a model, the best first.

    Args:
        rows: of a table.
        memory: bytes that all stored tensors may take; activations and caches are not among them.
        family: part of the name of the family to choose from; "" for the only one. By accuracy models of
            several families are compared: they answered the same examples.
        by: see `kbitc.study.curves.MEASURES`.
        tasks: by accuracy, part of the `Row.tasks` to choose from; "" for the only ones.
        most: how many.

    Raises:
        UsageError: nothing fits; no such family, tasks or measure; or several, whose figures cannot be
            compared.
    """
    if by not in MEASURES:
        raise UsageError(f"--by: {did_you_mean('measure', by, MEASURES)}")
    if tasks and by == LOSS:
        raise UsageError("--tasks: chooses among accuracies; add --by accuracy")
    own = [row for row in rows if row.loss is not None and family in row.family]
    if not own:
        known = ", ".join(sorted({row.family for row in rows})) or "none"
        raise UsageError(f"the table has no job with a finite loss of the family '{family}' (known: {known})")
    own = _of_one_family(own) if by == LOSS else _of_one_set(own, tasks)
    fitting = sorted((row for row in own if row.total_bits <= 8 * memory), key=_ORDERS[by])
    if not fitting:
        least = min(own, key=lambda row: row.total_bits)
        raise UsageError(
            f"nothing in the table fits {memory:,} bytes: the smallest is {least.model} at {least.format}, "
            f"{-(-least.total_bits // 8):,} bytes; give more memory, or sweep smaller models or fewer bits"
        )
    best: dict[str, Row] = {}
    for row in sorted(fitting, key=lambda row: not can_compile(row)):  # those first that can be made
        best.setdefault(row.fingerprint, row)
    chosen = sorted(best.values(), key=_ORDERS[by])[:most]
    return [Advice(row, command_of(row), "" if can_compile(row) else _why_not(row), by) for row in chosen]


def _of_one_family(rows: list[Row]) -> list[Row]:
    names = sorted({row.family for row in rows})
    if len(names) > 1:
        raise UsageError(
            f"the table has models of {len(names)} families ({', '.join(names)}), whose losses per token "
            "cannot be compared: they cut the text differently; choose one with --family"
        )
    return rows


def _of_one_set(rows: list[Row], tasks: str) -> list[Row]:
    """The rows with accuracies on the same examples."""
    scored = [row for row in rows if row.accuracy is not None]
    own = [row for row in scored if tasks in row.tasks]
    names = sorted({row.tasks for row in own})
    if not scored:
        raise UsageError(
            "--by accuracy: the table has no zero-shot accuracies; 'kbitc sweep' with --tasks adds them"
        )
    if not names:
        known = "; ".join(sorted({row.tasks for row in scored}))
        raise UsageError(f"--tasks {tasks}: no job was scored on such examples (known: {known})")
    if len(names) > 1:
        raise UsageError(
            f"the table has accuracies on {len(names)} sets of examples ({'; '.join(names)}), which cannot "
            "be compared; choose one with --tasks"
        )
    return own


def _by_loss(row: Row) -> tuple[float, int, str]:
    assert row.loss is not None
    return row.loss, row.total_bits, row.key


def _by_accuracy(row: Row) -> tuple[float, int, str]:
    assert row.accuracy is not None
    return -row.accuracy, row.total_bits, row.key


_ORDERS = {LOSS: _by_loss, ACCURACY: _by_accuracy}


def can_compile(row: Row) -> bool:
    """Whether an artifact can have a row's format."""
    return not parse_format(row.format).is_of_studies


def _why_not(row: Row) -> str:
    return f"{row.format} is of studies alone; sweep without --flat-blocks and --mean for formats to compile"


def command_of(row: Row) -> str | None:
    """What to type into a shell to make a row's model; None where an artifact cannot have its format.

    Where weights were left at 16 bits it writes a plan that says so, and compiles by that.
    """
    if not can_compile(row):
        return None
    name = row.model.rstrip("/").rpartition("/")[2].partition("@")[0]
    out = f"{name}-{re.sub(r'[^a-z0-9.]+', '-', row.format).strip('-')}"
    compile_it = ["kbitc", "compile", row.model]
    first = ""
    if row.kept and row.bits < 16:
        plan = {"weights": dict.fromkeys(row.kept, "fp16") | {"*": row.format}}
        first = f"echo {shlex.quote(json.dumps(plan))} > {shlex.quote(f'{out}.plan.json')} && "
        compile_it += ["--plan", f"{out}.plan.json"]
    else:
        compile_it += ["--spec", row.format]
    compile_it += ["--quantizer", row.quantizer]
    if row.calibrate:
        compile_it += ["--calibrate", row.calibrate]
    return first + shlex.join([*compile_it, "-o", out])
