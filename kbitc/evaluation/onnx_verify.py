"""``kbitc verify DIR``: does an exported folder answer as the model that it came from, still packed?

The one thing to know: ONNX's own checker accepts models that ONNX Runtime refuses or answers with zeros,
so everything here is what ONNX Runtime does: its outputs against PyTorch's, and the memory of a process
that loads the folder.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kbitc.backends import verify_exported
from kbitc.backends.onnx_export.runtime import GRAPH, OnnxModel, read_report
from kbitc.checkpoint.dense import token_ids
from kbitc.errors import SourceError, UsageError, foreign
from kbitc.evaluation.checks import Check
from kbitc.evaluation.opening import Loaded, open_model
from kbitc.formats.spec import parse
from kbitc.system import files
from kbitc.tensor.kbit_tensor import KbitTensor

# Relative errors of outputs. PyTorch's CPU kernels round activations to 16 bits, ONNX Runtime's
# int8 ones to 8; a wrong weight gives about 1.
TOLERANCE = {"fp32": 0.005, "split": 0.005, "int8": 0.2}
CONTAINER_GAIN = 10  # how much larger than the weights' the outputs' relative error may be
OVERHEAD = 64 * 2**20  # bytes of a session beside what it reads
MEMORY_FACTOR = 1.6  # times the packed containers: the kernels keep copies in their own order
TEXT = "The quick brown fox jumps over the lazy dog, and then the story goes on."
SHORT, LONG = 1, 7


def verify(folder: str | Path, against: str | nn.Module | None = None) -> list[Check]:
    """Check an exported folder.

    Args:
        folder: of ``kbitc export``.
        against: the artifact, or the packed model, that it came from; by default as recorded.

    Raises:
        SourceError: damaged files, or the source is not where it was.
        UsageError: the folder is not of a transformers model.
    """
    path = Path(folder)
    report = read_report(path)
    verify_exported(path, report)
    unchanged = Check("files that do not match their checksums", 0, 0)
    model, tokenizer = _reference(report, against, path)
    checks = [unchanged, _expanded(path, report, model), _memory(path, report)]
    exported = OnnxModel(path)
    limit = _tolerance(report, path) + CONTAINER_GAIN * _container_error(report)
    with torch.inference_mode():
        compared = _compare_decoder if report["kind"] == "decoder" else _compare_whole
        checks += [Check(name, error, limit) for name, error in compared(exported, model, tokenizer)]
    return checks


def _tolerance(report: dict[str, Any], folder: Path) -> float:
    if report["activations"] not in TOLERANCE:
        raise SourceError(f"{folder}: is of another kind of activations, '{report['activations']}'")
    has_int8_inputs = any(parse(str(entry["spec"])).has_int8_inputs for entry in report["weights"].values())
    return max(TOLERANCE[report["activations"]], TOLERANCE["int8"] if has_int8_inputs else 0.0)


def _reference(report: dict[str, Any], against: str | nn.Module | None, folder: Path) -> tuple[Any, Any]:
    if report["kind"] == "module":
        raise UsageError(f"{folder}: exported from a plain module; kbitc verify compares transformers models")
    if isinstance(against, nn.Module):
        return against, None
    source = against or report.get("source")
    if not isinstance(source, str) or not files.exists(Path(source)):
        raise SourceError(
            f"{folder}: its source {source or ''} is not there; name the artifact with --against OUT"
        )
    loaded: Loaded = open_model(source, torch.float32)
    return loaded.model, loaded.tokenizer


def _container_error(report: dict[str, Any]) -> float:
    return max((float(entry["error"]) for entry in report["weights"].values()), default=0.0)


def _expanded(folder: Path, report: dict[str, Any], model: nn.Module) -> Check:
    """Packed weights of the model that the file holds dense.

    Raises:
        SourceError: names them.
    """
    import onnx

    with foreign(f"{folder / GRAPH}: cannot be read", "export the model again"):
        graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    floats = {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.DOUBLE,
    }
    dense = {
        tensor.name: math.prod(tensor.dims)
        for tensor in graph.initializer
        if tensor.data_type in floats and math.prod(tensor.dims) > 1
    }
    bad = []
    for name, weight in model.named_parameters():
        if not isinstance(weight, KbitTensor):
            continue
        if name not in report["weights"]:
            bad.append(name)
            continue
        is_whole = weight.spec.block > 1
        bad += [
            key
            for key, size in dense.items()
            if key.startswith(f"{name}.") and is_whole and size >= weight.numel()
        ]
    known = {*report["left_alone"], *report["weights"]}
    bad += [
        key
        for key in dense
        if not key.startswith("kbit.constant.")
        and key not in known
        and key.rpartition(".")[0] not in known
        and key.rpartition(".")[0].rpartition(".")[0] not in known
    ]
    if bad:
        raise SourceError(f"{folder / GRAPH}: holds '{bad[0]}' expanded ({len(bad)} in all); export it again")
    return Check("weights expanded in the file", 0, 0)


def _memory(folder: Path, report: dict[str, Any]) -> Check:
    """Resident bytes that loading adds to a process of its own."""
    command = [sys.executable, "-m", "kbitc.evaluation.onnx_memory", str(folder / GRAPH)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise SourceError(f"{folder}: loading it failed: {last[0]}")
    packed = sum(entry["container_bytes"] for entry in report["weights"].values())
    rest = sum(entry["bytes"] for entry in report["left_alone"].values())
    return Check(
        "resident bytes after load", json.loads(done.stdout), MEMORY_FACTOR * packed + 2 * rest + OVERHEAD
    )


def _ids(model: Any, tokenizer: Any, tokens: int) -> Iterator[tuple[str, Tensor]]:
    """Two sequences of random ids, and one of text where there is a tokenizer."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(tokens)
    # Past the first few ids: those stand for padding in some families.
    yield "random", torch.randint(min(4, vocabulary - 1), vocabulary, (2, tokens), generator=generator)
    if tokenizer is not None:
        yield "text", token_ids(tokenizer, TEXT, model)[None, :tokens]


def _compare_decoder(exported: OnnxModel, model: Any, tokenizer: Any) -> Iterator[tuple[str, float]]:
    """Without past, and with it: one token and several."""
    for first in (SHORT, LONG):
        for kind, ids in _ids(model, tokenizer, first):
            ours, theirs = exported.new_cache(ids.shape[0]), DynamicCache()
            for tokens, when in ((ids, "without past"), (ids[:, :SHORT], "with past"), (ids, "with past")):
                logits = exported.decode(tokens, ours)
                wanted = model(input_ids=tokens, past_key_values=theirs, use_cache=True).logits
                name = f"{kind} ids, {tokens.shape[1]} at once, {when} ({ours.length - tokens.shape[1]})"
                yield name, relative_error(logits, wanted)
    _, ids = next(_ids(model, None, LONG))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits = exported.decode(ids, exported.new_cache(2), mask)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    named = {"position_ids": positions} if "position_ids" in _accepted(model) else {}
    wanted = model(input_ids=ids, attention_mask=mask, **named).logits
    seen = mask.bool()
    yield "random ids, one sequence padded on the left", relative_error(logits[seen], wanted[seen])


def _compare_whole(exported: OnnxModel, model: Any, tokenizer: Any) -> Iterator[tuple[str, float]]:
    names = {given.name for given in exported.session.get_inputs()}
    for tokens in (SHORT, LONG):
        for kind, ids in _ids(model, tokenizer, tokens):
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if "token_type_ids" in names:
                inputs["token_type_ids"] = torch.zeros_like(ids)
            flags = {}
            if "decoder_input_ids" in names:
                inputs["decoder_input_ids"] = ids.flip(-1)
                flags = {"use_cache": False}
            wanted = model(**inputs, **flags)
            outputs = exported.run({name: value for name, value in inputs.items() if name in names})
            for name, value in outputs.items():
                error = relative_error(torch.from_numpy(value), wanted[name])
                yield f"{kind} ids, {tokens} at once: {name}", error


def _accepted(model: nn.Module) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, relative to the wanted values about their mean."""
    spread = (wanted.double() - wanted.double().mean()).norm()
    return float((got.double() - wanted.double()).norm() / spread.clamp_min(1e-30))
