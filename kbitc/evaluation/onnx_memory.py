"""What loading an ONNX file adds to the memory of a process: ``python -m kbitc.evaluation.onnx_memory FILE``.

The one thing to know: it imports nothing but ONNX Runtime, before it starts to measure.
"""

from __future__ import annotations

import sys
from pathlib import Path


def resident_growth(path: str) -> int:
    """Resident bytes that an ONNX Runtime session of a file takes; Linux only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    before = _resident()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    grown = _resident() - before
    del session
    return grown


def _resident() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.stdout.write(f"{resident_growth(sys.argv[1])}\n")
