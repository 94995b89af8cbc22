"""Which model at which spec fits a memory, by what a sweep measured, and the command that makes it.

The one thing to know: what was measured comes first. A model that was scored at one scope and format is
advised with that loss and its interval; nothing is extrapolated to models or formats that were not run.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from kbitc.errors import UsageError
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
    """

    row: Row
    command: str | None
    reason: str = ""

    @property
    def nbytes(self) -> int:
        """Stored."""
        return self.row.total_bits // 8

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the loss, 95 %, over windows; None of one window."""
        if self.row.loss is None or self.row.loss_error is None:
            return None
        half = NORMAL * self.row.loss_error
        return self.row.loss - half, self.row.loss + half


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


def advise(rows: Sequence[Row], memory: int, family: str = "", *, most: int = 5) -> list[Advice]:
    """The jobs of lowest loss that fit, one a model, the best first.

    Args:
        rows: of a table.
        memory: bytes that all stored tensors may take; activations and caches are not among them.
        family: part of the name of the family to choose from; "" for the only one.
        most: how many.

    Raises:
        UsageError: nothing fits, no such family, or several, whose losses cannot be compared.
    """
    own = [row for row in rows if row.loss is not None and family in row.family]
    names = sorted({row.family for row in own})
    if not names:
        known = ", ".join(sorted({row.family for row in rows})) or "none"
        raise UsageError(f"the table has no job with a finite loss of the family '{family}' (known: {known})")
    if len(names) > 1:
        raise UsageError(
            f"the table has models of {len(names)} families ({', '.join(names)}), whose losses per token "
            "cannot be compared: they cut the text differently; choose one with --family"
        )
    fitting = sorted((row for row in own if row.total_bits <= 8 * memory), key=_by_loss)
    if not fitting:
        least = min(own, key=lambda row: row.total_bits)
        raise UsageError(
            f"nothing in the table fits {memory:,} bytes: the smallest is {least.model} at {least.format}, "
            f"{-(-least.total_bits // 8):,} bytes; give more memory, or sweep smaller models or fewer bits"
        )
    best: dict[str, Row] = {}
    for row in sorted(fitting, key=lambda row: not can_compile(row)):  # those first that can be made
        best.setdefault(row.fingerprint, row)
    chosen = sorted(best.values(), key=_by_loss)[:most]
    return [Advice(row, command_of(row), "" if can_compile(row) else _why_not(row)) for row in chosen]


def _by_loss(row: Row) -> tuple[float, int, str]:
    assert row.loss is not None
    return row.loss, row.total_bits, row.key


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
