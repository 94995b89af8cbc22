"""Outcomes in one small JSON file that can be committed: a campaign of many hours goes on elsewhere.

The one thing to know: a row is kept under a digest of all that it depends on, for kbitc its source
included, so a row of another commit is never taken for one of this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kbitc.system.json_file import read_json


class Ledger:
    """Rows by key; without a file it remembers nothing."""

    def __init__(self, file: Path | None = None) -> None:
        """Read what is there.

        Raises:
            OSError: the file exists and cannot be read.
        """
        self._file = file
        self._rows: dict[str, Any] = dict(read_json(file)) if file is not None and file.exists() else {}

    def get(self, key: str) -> Any:
        """The row of a key; None if there is none."""
        return self._rows.get(key)

    def put(self, key: str, row: Any) -> None:
        """Keep a row: the file is written anew, whole or not at all, a row a line."""
        if self._file is None:
            return
        self._rows[key] = row
        lines = [f"{json.dumps(name)}: {json.dumps(self._rows[name])}" for name in sorted(self._rows)]
        partial = self._file.with_name(f".{self._file.name}.partial")
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        partial.replace(self._file)
