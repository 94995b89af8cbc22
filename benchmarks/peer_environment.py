"""The environments that peers of kbitc run in, apart from kbitc's own."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import last_line
from kbitc.cache import cache_folder

PINS = ("onnxruntime==1.32.0", "onnx==1.23.2", "bitsandbytes==0.50.2")
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


def environment(
    given: Path | None,
    torch_version: str,
    *,
    pins: Sequence[str] = PINS,
    folder: Path | None = None,
    options: Sequence[str] = (),
) -> Path:
    """The Python that has the peers: the given one, or that of an environment, made now if need be.

    Args:
        given: a Python, taken as it is.
        torch_version: that the environment gets, before all else.
        pins: packages that it gets.
        folder: where it lies, or is made; by default in the cache folder.
        options: of pip, for the packages.

    Raises:
        RuntimeError: it could not be made.
    """
    if given is not None:
        return given
    folder = folder or cache_folder() / "benchmark-peers"
    python = folder / "bin" / "python"
    stamp = folder / "installed.json"
    wanted = [*pins, f"torch=={torch_version}"]
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return python
    sys.stderr.write(f"making {folder}: {', '.join(wanted)}\n")
    try:
        venv.create(folder, with_pip=True, clear=True)
        torch = _install_torch(python, torch_version)
        # torch is named again: no package may bring another build of it.
        _install(python, [*options, *pins, torch])
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"no environment in {folder}: {last_line(error)}") from error
    stamp.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def _install_torch(python: Path, version: str) -> str:
    """Install it, with what building a package may need; returns the requirement that was met."""
    build = ["setuptools", "wheel", "numpy"]
    try:
        _install(python, [f"torch=={version}", *build])
    except subprocess.CalledProcessError:
        # An index may not have torch's build for CPUs ("2.13.0+cpu") under that name.
        version = version.partition("+")[0]
        _install(python, [f"torch=={version}", *build])
    return f"torch=={version}"


def _install(python: Path, wanted: Sequence[str]) -> None:
    subprocess.run([str(python), *PIP, *wanted], check=True, capture_output=True, text=True)
