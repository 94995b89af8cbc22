"""Decode and prefill speed of a whole model on the CPU: dense, kbitc and llama.cpp in one table.

    python -m benchmarks.cpu_decode ARTIFACT_OR_MODEL [--spec nf4:64] [--gguf FILE] [--threads 2]
        [--prompt 256] [--new 64] [--runs 3] [--rounds 3] [--peers PYTHON] [--json] [--markdown FILE]

A model is compiled with the spec first; an artifact is taken as it is, and its own weights,
dequantized, are the dense rows. Each row is measured in processes of its own, one a round, the rows in
turn so that a busy machine slows all alike: the median of several runs after a warm-up, and the
median and the best of the rounds. A row that cannot be measured says why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from benchmarks.cpu import cpu_name, kernel_set
from benchmarks.peer_environment import environment
from benchmarks.peers import last_line
from benchmarks.tables import Section, markdown_table, print_section
from kbitc.evaluation.opening import open_model

Row = dict[str, Any]

GGUF = Path.home() / ".cache" / "kbitc-models" / "smollm2-135m.gguf"
LLAMA = "llama-cpp-python==0.3.36"
COLUMNS = (
    ("name", "", ""),
    ("decode", "decode tok/s", ".2f"),
    ("prefill", "prefill tok/s", ".1f"),
    ("decode_best", "best decode", ".2f"),
    ("prefill_best", "best prefill", ".1f"),
    ("megabytes", "weights MB", ".2f"),
    ("bits_per_param", "bits/param", ".3f"),
    ("decode_ratio", "decode x llama.cpp", ".2f"),
    ("prefill_ratio", "prefill x llama.cpp", ".2f"),
    ("reason", "", ""),
)


def measure_here(source: str, kind: str, prompt: int, new: int, runs: int) -> Row:
    """One row in this process; kind is "packed" or the dtype of the dense model."""
    dtype = None if kind == "packed" else getattr(torch, kind)
    loaded = open_model(source, dtype)
    model, nbytes, bits = loaded.model, loaded.nbytes, loaded.bits_per_param
    if dtype is not None:
        if getattr(model, "hf_quantizer", None) is not None:
            model = model.dequantize(dtype)  # type: ignore[operator]  # a method of transformers
        parameters = list(model.parameters())
        nbytes = sum(parameter.nbytes for parameter in parameters)
        bits = 8 * nbytes / sum(parameter.numel() for parameter in parameters)
    return speed(model, prompt, new, runs) | {"bytes": nbytes, "bits_per_param": bits}


@torch.inference_mode()
def speed(model: Any, prompt: int, new: int, runs: int) -> Row:
    """Prefill and greedy decode speed of a transformers model, after one warm-up run."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, prompt), generator=generator)
    prefill, decode = [], []
    for _ in range(runs + 1):
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for _ in range(new):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        prefill.append(prompt / (middle - start))
        decode.append(new / (time.perf_counter() - middle))
    return {"decode": median(decode[1:]), "prefill": median(prefill[1:])}


def _run(command: list[str], threads: int) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        raise RuntimeError(([line for line in done.stderr.splitlines() if line.strip()] or ["failed"])[-1])
    return done.stdout


def torch_row(options: argparse.Namespace, source: str, kind: str) -> Row:
    """A row of torch, in a process of its own."""
    numbers = [str(number) for number in (options.prompt, options.new, options.runs)]
    command = [sys.executable, "-m", "benchmarks.cpu_decode", "--measure", source, kind, *numbers]
    row: Row = json.loads(_run(command, options.threads).splitlines()[-1])
    return row


def compiled_row(options: argparse.Namespace, artifact: str) -> Row:
    """The compiled row of `kbitc bench`, which measures it in a process of its own."""
    command = [sys.executable, "-m", "kbitc", "bench", artifact, "--json", "--backend", "cpu"]
    command += ["--prompt-tokens", str(options.prompt), "--new-tokens", str(options.new)]
    command += ["--runs", str(options.runs)]
    rows: dict[str, Row] = json.loads(_run(command, options.threads))
    for name, row in rows.items():
        if "compiled" in name or "cpu" in name:
            return row
    raise RuntimeError(f"kbitc bench has no compiled row; it has {', '.join(rows)}")


def llama_row(options: argparse.Namespace) -> Row:
    """llama.cpp on the GGUF file."""
    if not options.gguf.exists():
        raise RuntimeError(f"no file {options.gguf}")
    python = environment(options.peers, torch.__version__)
    script = Path(__file__).with_name("peers.py")
    numbers = [str(number) for number in (options.threads, options.prompt, options.new, options.runs)]
    try:
        text = _run([str(python), str(script), "llama", str(options.gguf), *numbers], options.threads)
    except RuntimeError as error:
        if "No module named 'llama_cpp'" not in str(error):
            raise
        raise RuntimeError(f"{python} has no llama.cpp: -m pip install {LLAMA} there") from error
    row: Row = json.loads(text.splitlines()[-1])
    return row | {"name": f"llama.cpp, {row['type']}"}


def compile_model(source: str, spec: str, folder: Path) -> str:
    """Compile, unless the source is an artifact."""
    from kbitc.artifact.folders import PLAN_FILE

    if (Path(source) / PLAN_FILE).exists():
        return source
    out = folder / "out"
    _run([sys.executable, "-m", "kbitc", "compile", source, "--spec", spec, "-o", str(out), "--json"], 2)
    return str(out)


def make_rows(options: argparse.Namespace) -> list[Row]:
    """Measure every row in turn."""
    with tempfile.TemporaryDirectory() as temporary:
        artifact = compile_model(options.model, options.spec, Path(temporary))
        label = "kbitc" if artifact == options.model else f"kbitc {options.spec}"
        steps: dict[str, Callable[[], Row]] = {
            "torch fp32 dense, eager": partial(torch_row, options, options.model, "float32"),
            "torch bf16 dense, eager": partial(torch_row, options, options.model, "bfloat16"),
            f"{label}, eager": partial(torch_row, options, artifact, "packed"),
            f"{label}, compiled": partial(compiled_row, options, artifact),
            "llama.cpp": partial(llama_row, options),
        }
        found: dict[str, list[Row]] = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, step in steps.items():
                found[name].append(_tried(name, step))
        return _compared([_median_row(rows) for rows in found.values()])


def _tried(name: str, step: Callable[[], Row]) -> Row:
    sys.stderr.write(f"measuring {name}\n")
    try:
        row = {"name": name} | step()
    except (OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"  {last_line(error)}\n")
        return {"name": name, "reason": f"not available: {last_line(error)}"}
    row["megabytes"] = row["bytes"] / 1e6
    sys.stderr.write(f"  {row['decode']:.2f} tokens/s, prefill {row['prefill']:.1f}\n")
    return row


def _median_row(rows: list[Row]) -> Row:
    """The rounds of one row as one: medians, and the best decode speed."""
    measured = [row for row in rows if "reason" not in row]
    if not measured:
        return rows[0]
    speeds = {key: [row[key] for row in measured] for key in ("decode", "prefill")}
    row = measured[0] | {key: median(values) for key, values in speeds.items()}
    return row | {"decode_best": max(speeds["decode"]), "prefill_best": max(speeds["prefill"])}


def _compared(rows: list[Row]) -> list[Row]:
    """Add the ratios to the last row, llama.cpp's."""
    peer = rows[-1]
    for row in rows:
        for key in ("decode", "prefill"):
            if key in row and key in peer:
                row[f"{key}_ratio"] = row[key] / peer[key]
    return rows


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="ARTIFACT_OR_MODEL")
    parser.add_argument("--spec", default="nf4:64", help="what a model is compiled with")
    parser.add_argument("--gguf", type=Path, default=GGUF, help="the model for llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prefill")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode")
    parser.add_argument("--runs", type=int, default=3, help="the median is of so many")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each row, the rows in turn")
    parser.add_argument("--peers", type=Path, help="a Python that has llama.cpp")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here too")
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    if sys.argv[1:2] == ["--measure"]:
        source, kind, *numbers = sys.argv[2:]
        print(json.dumps(measure_here(source, kind, *map(int, numbers))))
        return
    options = parse_options()
    rows = make_rows(options)
    head = (
        f"{options.model}: {options.prompt} prompt + {options.new} new tokens, batch 1, {options.threads} "
        f"threads, medians of {options.rounds} rounds of {options.runs} runs; {cpu_name()}, "
        f"torch {torch.__version__}, kbitc kernels: "
        f"{kernel_set()}"
    )
    if options.json:
        print(json.dumps({"machine": head, "rows": rows}, indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else 160)
        print_section(console, Section(head, COLUMNS, rows))
    if options.markdown:
        text = f"# Decoding on a CPU\n\n{head}\n\n{markdown_table(COLUMNS, rows)}\n"
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
