"""The environment that peers of kbitc run in, apart from kbitc's own."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.peers import last_line
from kbitc.cache import cache_folder

PINS = ("onnxruntime==1.32.0", "onnx==1.23.2", "bitsandbytes==0.50.2")


def environment(given: Path | None, torch_version: str) -> Path:
    """The Python that has the peers: the given one, or that of a cached environment, made now if need be.

    Raises:
        RuntimeError: it could not be made.
    """
    if given is not None:
        return given
    folder = cache_folder() / "benchmark-peers"
    python = folder / "bin" / "python"
    stamp = folder / "installed.json"
    wanted = [*PINS, f"torch=={torch_version}"]
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return python
    sys.stderr.write(f"making {folder}: {', '.join(wanted)}\n")
    try:
        venv.create(folder, with_pip=True, clear=True)
        _install(python, wanted)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"no environment in {folder}: {last_line(error)}") from error
    stamp.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def _install(python: Path, wanted: list[str]) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([*command, *wanted], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError:
        # An index may not have torch's build for CPUs ("2.13.0+cpu") under that name.
        public = [name.partition("+")[0] for name in wanted]
        subprocess.run([*command, *public], check=True, capture_output=True, text=True)
