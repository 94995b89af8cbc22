"""Plans for llama.cpp against its own quantizer, at the bytes of its own files, run by llama.cpp.

    python -m benchmarks.gguf_files MODEL --calibrate valid.txt --text test.txt --work DIR [--types Q4_0,...]

llama.cpp quantizes a dense file of MODEL to each of its types, with E[x^2] over the calibration text as its
importance matrix. ``kbitc compile --for gguf`` gets the bytes of each of these files as its budget. llama.cpp
then computes the perplexity of both, on the same windows, and decodes with both. What is kept in DIR is not
made again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

import kbitc
from benchmarks.cpu import cpu_name
from benchmarks.peer_environment import environment
from benchmarks.quality.campaign import run, whole, write_json
from benchmarks.quality.settings import TOOLS
from benchmarks.tables import Section, markdown, print_section
from kbitc.backends import find_exporter
from kbitc.backends.gguf_export.target import padded
from kbitc.cache import cache_folder
from kbitc.evaluation.intervals import paired
from kbitc.evaluation.opening import need_tokenizer, open_model
from kbitc.evaluation.perplexity import read_text, windows

TYPES = ("Q4_0", "Q4_K_M", "Q3_K_M", "IQ4_NL")
CONTEXT, TESTED, CALIBRATED = 512, 10, 64
CHARACTERS = 8  # a token, at most, on average
PROMPT, NEW, RUNS = 128, 64, 5
COLUMNS = (
    ("name", "file", ""),
    ("megabytes", "MB of tensors", ".2f"),
    ("bits", "bits per parameter", ".3f"),
    ("perplexity", "perplexity", ".2f"),
    ("decode", "decode, tokens/s", ".1f"),
)
WORKERS = Path(__file__).parent / "quality"


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
        label: what made it.
        nbytes: of its tensors.
        losses: of each window, nats per token.
        decode: tokens per second.
    """

    label: str
    nbytes: int
    losses: Sequence[float]
    decode: float

    @property
    def perplexity(self) -> float:
        """Of all windows."""
        return math.exp(sum(self.losses) / len(self.losses))

    def cells(self, parameters: int) -> dict[str, Any]:
        """As it stands in the table."""
        return {
            "name": self.label,
            "megabytes": self.nbytes / 1e6,
            "bits": 8 * self.nbytes / parameters,
            "perplexity": self.perplexity,
            "decode": self.decode,
        }


class Runner:
    """Everything that is made in a work folder.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        tool = TOOLS["llama"]
        base = cache_folder() / "benchmark-quality" / "llama"
        self.python = environment(None, torch.__version__, pins=tool.pins, folder=base, options=tool.options)

    def prepare(self) -> None:
        """Tokens, and the dense file."""
        model = open_model(str(self.options.model), torch.float32)
        tokenizer = need_tokenizer(model, str(self.options.model))
        self.parameters = sum(parameter.numel() for parameter in model.model.parameters())
        for name, file, count in (
            ("test", self.options.text, TESTED),
            ("calibration", self.options.calibrate, CALIBRATED),
        ):
            text = read_text(file)[: count * CONTEXT * CHARACTERS]
            ids = windows(model.model, tokenizer, text, CONTEXT, count * CONTEXT)
            save_file({"ids": ids.contiguous()}, self.work / f"{name}.safetensors")
        dense = self.work / "dense.gguf"
        if not dense.exists():
            out = self.work / "dense"
            kbitc.compile(self.options.model, plan={"weights": {"*": {"spec": "fp16"}}}, out=out, force=True)
            find_exporter("gguf").export(out, dense)

    def worker(self, *arguments: str) -> None:
        """Run `workers.llama_files`."""
        variables = {"PYTHONPATH": str(WORKERS), "OMP_NUM_THREADS": str(self.options.threads)}
        run([str(self.python), "-P", "-m", "workers.llama_files", *arguments], variables)

    def quantize(self) -> Mapping[str, Path]:
        """llama.cpp's own files."""
        files = {kind: self.work / f"llama-{kind}.gguf" for kind in self.options.types}
        missing = {kind: str(file) for kind, file in files.items() if not file.exists()}
        if missing:
            job = {
                "source": str(self.work / "dense.gguf"),
                "types": missing,
                "model": str(self.options.model),
                "tokens": str(self.work / "calibration.safetensors"),
                "threads": self.options.threads,
            }
            write_json(self.work / "job.json", job)
            self.worker("quantize", str(self.work / "job.json"))
        return files

    def planned(self, kind: str, nbytes: int) -> Path:
        """Ours, in so many bytes."""
        families = self.options.families
        name = f"kbitc-{self.options.quantizer}-{families or 'all'}-{kind}"
        out, file = self.work / name, self.work / f"{name}.gguf"
        if not file.exists():
            command = [
                sys.executable, "-m", "kbitc", "compile", str(self.options.model), "--for", "gguf",
                "--bits", f"{8 * nbytes / self.parameters:.9f}", "--calibrate", str(self.options.calibrate),
                "--quantizer", self.options.quantizer, "-o", str(out), "--force",
                *(["--types", families] if families else []),
            ]  # fmt: skip
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            find_exporter("gguf").export(out, file)
        return file

    def row(self, label: str, file: Path) -> Row:
        """What llama.cpp says of a file."""
        kept = file.with_suffix(".json")
        if not kept.exists():
            with whole(kept) as scratch:
                tokens = self.work / "test.safetensors"
                self.worker("score", str(file), str(tokens), str(scratch), str(self.options.threads))
        return Row(label, tensor_bytes(file), json.loads(kept.read_text()), self._decode(file))

    def _decode(self, file: Path) -> float:
        script = Path(__file__).parent / "peers.py"
        numbers = [str(self.options.threads), str(PROMPT), str(NEW), str(RUNS)]
        out = run([str(self.python), "-P", str(script), "llama", str(file), *numbers], {}).out
        found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return float(found["decode"])


def tensor_bytes(file: Path) -> int:
    """Bytes of a file's tensors, each rounded up to where the next may start."""
    import gguf

    return sum(padded(int(tensor.n_bytes)) for tensor in gguf.GGUFReader(file).tensors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a Llama model")
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--types", type=lambda text: text.split(","), default=list(TYPES))
    parser.add_argument("--quantizer", default="feedback")
    parser.add_argument(
        "--families", default="", help="of data types that kbitc may use, as --types of compile"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    runner = Runner(options)
    runner.prepare()
    rows = [runner.row("16 bits", runner.work / "dense.gguf")]
    verdicts = []
    for kind, file in runner.quantize().items():
        theirs = runner.row(f"llama.cpp {kind}, imatrix", file)
        ours = runner.row(
            f"kbitc at its bytes, {options.quantizer} {options.families}".strip(),
            runner.planned(kind, theirs.nbytes),
        )
        rows += [theirs, ours]
        verdicts.append(f"{kind}: log perplexity {paired(ours.losses, theirs.losses)}")
    head = f"{kbitc.__version__}, llama.cpp of {options.threads} threads, {TESTED} x {CONTEXT} tokens"
    section = Section(
        f"{options.model.name}: {head}", COLUMNS, [row.cells(runner.parameters) for row in rows]
    )
    section.notes.extend(verdicts)
    print_section(Console(), section)
    if options.markdown:
        text = markdown(
            [f"`python -m benchmarks.gguf_files`, {datetime.now(UTC).date()}, {cpu_name()}"], [section]
        )
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        write_json(options.json, [{"perplexity": row.perplexity, **vars(row)} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
