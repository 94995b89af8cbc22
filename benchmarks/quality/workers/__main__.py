"""Quantize a model with one peer, in that peer's environment.

    python -m workers JOB.json OUT

OUT, a folder that exists, gets ``weights.safetensors`` and ``result.json``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path


def version(package: str) -> str:
    """Of an installed package; "" for one that was not installed by pip."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main(job_file: str, out: str) -> None:
    """Run one job."""
    import torch
    from safetensors.torch import save_file

    from .common import Job
    from .memory import peak_bytes

    given = json.loads(Path(job_file).read_text(encoding="utf-8"))
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    worker = importlib.import_module(f".peer_{given['tool']}", __package__)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        job = Job(
            given["options"], Path(given["model"]), Path(given["tokens"]), Path(scratch), given["threads"]
        )
        made = worker.quantize(job)
    save_file(made.weights, str(Path(out) / "weights.safetensors"))
    result = {
        "nbytes": made.nbytes,
        "seconds": made.seconds,
        "peak_bytes": peak_bytes(),
        "notes": made.notes,
        "versions": {name: version(name) for name in (given["package"], "torch")},
    }
    (Path(out) / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
