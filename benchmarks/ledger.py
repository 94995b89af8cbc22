"""Rows of measurements in one small JSON file that can be committed: long campaigns go on elsewhere.

The one thing to know: a row is kept under a key that names all that it depends on, so a row of something else
is never taken for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kbitc.system.files import write_whole
from kbitc.system.json_file import read_json


class Ledger:
    """Rows by key; without a file they are forgotten at the end.

    Attributes:
        rows: what is known.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Read what is there.

        Raises:
            SourceError: the file exists and cannot be read.
        """
        self._file = file
        self.rows: dict[str, Any] = dict(read_json(file)) if file is not None and file.exists() else {}

    def put(self, key: str, row: Any) -> None:
        """Keep a row: the file is written anew, whole or not at all, a row a line."""
        self.rows[key] = row
        if self._file is not None:
            lines = [f"{json.dumps(name)}: {json.dumps(self.rows[name])}" for name in sorted(self.rows)]
            write_whole(self._file, "{\n" + ",\n".join(lines) + "\n}\n")
