"""Speed and peak memory of a packed model against the 16-bit one, each in a process of its own.

The one thing to know: peak memory is the operating system's figure for that process from the end of
loading on (Linux ``VmHWM``), so what loading needed for a moment does not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitc.backends import exported_kind
from kbitc.errors import SourceError
from kbitc.evaluation.causality import check_causal
from kbitc.evaluation.opening import open_model
from kbitc.evaluation.speed import bytes_of_a_token, read_bandwidth, speed
from kbitc.system.memory import forget_peak, peak_bytes

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]


def compare(
    artifact: str,
    against: str | None,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    kv: str | None = None,
) -> dict[str, Row]:
    """Measure an artifact and the dense model.

    Args:
        artifact: compiled folder, or one that was exported for ONNX Runtime.
        against: source of the dense model; None dequantizes the artifact's own weights, and leaves out that
            row of what was exported.
        prompt_tokens: of the prefill.
        new_tokens: to decode.
        runs: medians are over so many, after one warm-up.
        backend: of the artifact's decode step; "auto" measures "eager" and, where it works, "cpu".
        dtype: that both compute in; None leaves the artifact its own, and the dense model is bfloat16.
        kv: how the artifact's decode step caches keys and values, as `make_decoder` has it; under "auto" the
            rows of other steps keep their own.

    Returns:
        ``decode``, ``prefill`` (tokens/s), ``peak_bytes``, ``bytes``, ``bits_per_param`` by row:
        "packed" on the eager backend, "packed, cpu" compiled, and "16-bit" ("32-bit" in float32);
        "exported" of an exported folder. ``bandwidth`` is what the machine reads in bytes/s, ``limit`` the
        tokens/s at which reading the weights alone takes all of it, ``share`` how much of that ``decode`` is;
        ``spent`` seconds of a token by what took them, where the decoder tells, and ``why_compiled`` why a
        step is no native one.

    Raises:
        SourceError: a model cannot be loaded or measured.
    """
    own = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    dense = "bfloat16" if dtype is None else own
    numbers = [str(prompt_tokens), str(new_tokens), str(runs)]
    rows = {}
    if exported_kind(Path(artifact)):
        rows["exported"] = _measure([artifact, "packed", backend, own, *numbers, kv or ""])
    elif backend in ("auto", "eager"):
        rows["packed"] = _measure(
            [artifact, "packed", "eager", own, *numbers, (kv or "") if backend == "eager" else ""]
        )
    if "exported" not in rows and backend != "eager":
        compiled = _measure([artifact, "packed", backend, own, *numbers, kv or ""])
        # Where auto had to fall back, the row would repeat the eager one.
        if compiled.pop("is_compiled") or backend != "auto":
            rows["packed, cpu"] = compiled
    if against or "exported" not in rows:
        label = "32-bit" if dense == "float32" else "16-bit"
        rows[label] = _measure([against or artifact, "dense", "eager", dense, *numbers, ""])
    for row in rows.values():
        row.pop("is_compiled", None)
    return rows


def _measure(arguments: list[str]) -> Row:
    command = [sys.executable, "-m", "kbitc.evaluation.benchmark", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise SourceError(f"measuring {arguments[0]} failed: {last[0]}")
    sys.stderr.write("".join(f"{line}\n" for line in done.stderr.splitlines() if "RuntimeWarning" in line))
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(
    source: str,
    kind: str,
    backend: str,
    dtype: str,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    kv: str | None = None,
) -> Row:
    """One row, in this process."""
    import torch

    from kbitc.backends import make_decoder

    wanted = None if dtype == "auto" else getattr(torch, dtype)
    loaded = open_model(source, wanted)
    model, nbytes, bits = loaded.model, loaded.nbytes, loaded.bits_per_param
    if kind == "dense":
        if getattr(model, "hf_quantizer", None) is not None:
            model = model.dequantize(wanted)  # type: ignore[operator]  # transformers' method
        parameters = list(model.parameters())  # tied ones once
        nbytes = sum(parameter.nbytes for parameter in parameters)
        bits = 8 * nbytes / sum(parameter.numel() for parameter in parameters)
    check_causal(model, source)
    decoder = make_decoder(model, backend, kv)
    forget_peak()
    measured = speed(decoder, prompt_tokens, new_tokens, runs)
    peak, bandwidth = peak_bytes(), read_bandwidth()
    limit = bandwidth / bytes_of_a_token(model, nbytes)
    return {
        "decode": measured.decode,
        "prefill": measured.prefill,
        "peak_bytes": peak,
        "bytes": nbytes,
        "bits_per_param": bits,
        "bandwidth": bandwidth,
        "limit": limit,
        "share": measured.decode / limit,
        "spent": dict(measured.spent),
        "why_compiled": decoder.why_compiled,
        "is_compiled": float(decoder.name != "eager"),
    }


def main(arguments: list[str]) -> dict[str, Any]:
    """``SOURCE packed|dense BACKEND DTYPE PROMPT NEW RUNS KV``; KV may be empty."""
    source, kind, backend, dtype, *numbers, kv = arguments
    prompt_tokens, new_tokens, runs = map(int, numbers)
    return measure(source, kind, backend, dtype, prompt_tokens, new_tokens, runs, kv or None)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1:])) + "\n")
