"""The peers as contenders: a process of their own environment, which times a slice when asked."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks import peers
from benchmarks.cpu_linear.contenders import Contender, Timer
from benchmarks.peer_environment import environment
from benchmarks.peers import Sample, last_line


class PeerProcess:
    """Peers in an environment of their own: one process that times a slice when asked."""

    def __init__(self, python: Path, size: int, threads: int) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [str(python), peers.__file__, "linear", str(size), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.summary = self._read()

    def contenders(self) -> list[Contender]:
        """One for each peer that this environment can run; for the others a row with the reason."""
        return [
            Contender(name, {} if "reason" in facts else self._timers(name), facts)
            for name, facts in self.summary["peers"].items()
        ]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _timers(self, name: str) -> dict[str, Timer]:
        return {mode: partial(self._time, name, mode) for mode in ("cold", "warm")}

    def _time(self, name: str, mode: str, seconds: float) -> list[Sample]:
        line = json.dumps({"name": name, "mode": mode, "seconds": seconds})
        _pipe(self._process.stdin).write(line + "\n")
        _pipe(self._process.stdin).flush()
        samples: list[Sample] = self._read()["samples"]
        return samples

    def _read(self) -> Any:
        line = _pipe(self._process.stdout).readline()
        if not line:
            self.close()
            self._errors.seek(0)
            raise RuntimeError((self._errors.read().strip().splitlines() or ["it ended"])[-1])
        return json.loads(line)


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def open_peers(options: argparse.Namespace) -> tuple[PeerProcess | None, str | None]:
    """The process of the peers, or why there is none."""
    try:
        python = environment(options.peers, torch.__version__)
        return PeerProcess(python, options.size, options.threads), None
    except (OSError, RuntimeError, ValueError) as error:
        return None, last_line(error)
