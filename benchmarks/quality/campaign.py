"""What one campaign shares: the model, the texts as tokens, the work folder, and results that are kept.

The one thing to know: whatever is expensive lies in the work folder under a digest of all that it depends
on, written whole or not at all, so that an interrupted campaign goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.ledger import Ledger
from benchmarks.quality.evaluator import Evaluator, Scores
from kbitc.evaluation.opening import need_tokenizer, open_model
from kbitc.evaluation.perplexity import read_text, windows
from kbitc.system.json_file import read_json

SLACK = 8  # tokens more than the windows need, for a cut inside a word


@dataclass(frozen=True)
class Sizes:
    """Windows and tokens a window.

    Attributes:
        calibration: windows to calibrate on.
        test: windows of each text to score.
        context: tokens of a window.
    """

    calibration: int = 32
    test: int = 10
    context: int = 512


@dataclass(frozen=True)
class Campaign:
    """What every run needs.

    Attributes:
        model: source folder, absolute.
        work: folder of what is kept.
        key: digest of the model and the calibration tokens.
        calibration: text file with as many tokens as all tools are given.
        tokens: the same as ids, a safetensors file.
        evaluator: of the texts.
        threads: of the processor.
        ledger: rows that were measured before, here or elsewhere.
    """

    model: Path
    work: Path
    key: str
    calibration: Path
    tokens: Path
    evaluator: Evaluator
    threads: int
    ledger: Ledger

    def kept(self, kind: str, what: Any) -> Path:
        """The folder of a result, whether it is there or not.

        Args:
            kind: first part of its name.
            what: all that it depends on beside the model and the calibration, as JSON.
        """
        return self.work / f"{kind}-{digest(self.key, what)}"

    def scores(self, folder: Path, weights: Callable[[], Mapping[str, Tensor]]) -> dict[str, Scores]:
        """Scores on every text; those that lie in the folder are read.

        Args:
            folder: of a result.
            weights: dequantized, asked for when something is to be scored.
        """
        files = {label: folder / f"score-{key}.json" for label, key in self.evaluator.keys.items()}
        missing = [label for label, file in files.items() if not file.exists()]
        if missing:
            for label, scores in self.evaluator.score(weights(), missing).items():
                write_json(files[label], {"loss": scores.loss, "divergence": scores.divergence})
        return {label: Scores(**read_json(file)) for label, file in files.items()}


def open_campaign(
    model: Path,
    work: Path,
    calibration: Path,
    texts: Mapping[str, Path],
    sizes: Sizes,
    threads: int,
    ledger: Path | None = None,
) -> Campaign:
    """Tokens of every text, and a work folder.

    Raises:
        UsageError: a text that cannot be read or is too short.
        SourceError: no model or tokenizer there.
    """
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    loaded = open_model(str(model), torch.float32)
    tokenizer = need_tokenizer(loaded, str(model))
    cut = first_tokens(tokenizer, read_text(calibration), sizes.calibration * sizes.context + SLACK)
    ids = windows(loaded.model, tokenizer, cut, sizes.context, sizes.calibration * sizes.context)
    source = digest_of_files(model)
    key = digest(source, _hash(ids))
    text, tokens = work / f"calibration-{key}.txt", work / f"calibration-{key}.safetensors"
    with whole(text) as partial:
        partial.write_text(cut, encoding="utf-8")
    with whole(tokens) as partial:
        save_file({"ids": ids.contiguous()}, str(partial))
    limit = sizes.test * sizes.context
    scored = {
        label: windows(loaded.model, tokenizer, read_text(file), sizes.context, limit)
        for label, file in texts.items()
    }
    keys = {label: digest(source, _hash(own)) for label, own in scored.items()}
    evaluator = Evaluator(str(model), scored, work, keys)
    return Campaign(model.resolve(), work, key, text, tokens, evaluator, threads, Ledger(ledger))


def first_tokens(tokenizer: Any, text: str, count: int) -> str:
    """The beginning of a text that has about so many tokens."""
    ends = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return text if len(ends) <= count else text[: ends[count - 1][1]]


def digest(*parts: Any) -> str:
    """Ten hexadecimal digits of JSON values."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def digest_of_files(folder: Path, patterns: Sequence[str] = ("config.json", "*.safetensors")) -> str:
    """Of the files of a folder that match, by name and content."""
    found = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.rglob(pattern)}):
        found.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()[:10]


def _hash(ids: Tensor) -> str:
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()


def write_json(file: Path, data: Any) -> None:
    """A JSON file, whole or not at all."""
    with whole(file) as partial:
        partial.write_text(json.dumps(data), encoding="utf-8")


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A name beside the target to write to, which takes its place at the end; left out where it exists."""
    partial = target.with_name(f".{target.name}.partial")
    _remove(partial)
    try:
        yield partial
        if not target.exists():
            partial.replace(target)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Ran:
    """A process that ended well.

    Attributes:
        out: its standard output.
        seconds: wall time.
    """

    out: str
    seconds: float


def run(command: Sequence[str], environment: Mapping[str, str]) -> Ran:
    """Run a process to its end.

    Raises:
        RuntimeError: it failed; the last line that it printed.
    """
    start = perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **environment})
        try:
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        for stream in (out, err):
            stream.seek(0)
        printed, said = out.read(), err.read()
    if process.returncode:
        lines = [line for line in (said or printed).splitlines() if line.strip()]
        raise RuntimeError(lines[-1].strip() if lines else f"exit status {process.returncode}")
    return Ran(printed, perf_counter() - start)


def dense_weights(folder: Path) -> dict[str, Tensor]:
    """The dequantized weights that a worker left."""
    return load_file(str(folder / "weights.safetensors"))
