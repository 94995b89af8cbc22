"""A command of kbitc that says how much memory it took.

python -m benchmarks.quality.measured FILE ARGUMENTS...

FILE gets the bytes as a number, whatever becomes of the command.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.quality.workers.memory import peak_bytes
from kbitc.cli import main

if __name__ == "__main__":
    file = Path(sys.argv[1])
    sys.argv = ["kbitc", *sys.argv[2:]]
    try:
        main()
    finally:
        file.write_text(str(peak_bytes()), encoding="ascii")
