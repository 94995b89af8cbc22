"""Peak memory and time of the text that a model samples itself.

Without a folder, the synthetic fp16 LLaMA of `benchmarks.compile_memory` is made: 1.1 B parameters, 2.2 GB.

    python -m benchmarks.sampling_memory [FOLDER] [--windows 64] [--layers 22]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import tempfile
from pathlib import Path
from time import perf_counter

from benchmarks.compile_memory import make_folder
from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.calibrator import Calibrator


def measure(folder: Path, windows: int) -> None:
    """Sample in this process, and print."""
    with open_checkpoint(str(folder)) as checkpoint:
        stored = sum(info.nbytes for info in checkpoint.tensors().values())
        started = perf_counter()
        ids = Calibrator(checkpoint).windows(windows)
        seconds = perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{folder.name}: {stored / 1e9:.2f} GB of weights")
    print(f"{ids.numel():,} tokens in {seconds:.1f} s, {ids.numel() / seconds:.1f} a second")
    print(f"peak resident memory {peak / 1e9:.3f} GB")
    print(f"sha256 of the ids {hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}")


def main() -> None:
    """Make the folder if none is given, and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--layers", type=int, default=22, help="of the model that is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["KBITC_CACHE"] = f"{temporary}/cache"  # or a second run would find what the first sampled
        folder = options.folder or Path(temporary) / "llama"
        if options.folder is None:
            folder.mkdir()
            make_folder(folder, options.layers)
        measure(folder, options.windows)


if __name__ == "__main__":
    main()
