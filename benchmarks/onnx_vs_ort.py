"""kbitc's ONNX export against ONNX Runtime's own weight quantizer, on one model in one run.

    python -m benchmarks.onnx_vs_ort MODEL --text FILE [--spec int4:64] [--limit-tokens 5120] [--new 64]
        [--rounds 5] [--threads 1] [--json]

Both start from the same weights. ONNX Runtime's quantizer takes the float32 ONNX file of PyTorch's
exporter, with the same bits, block size and accuracy level. Speeds are the best of rounds in which all
rows take turns, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from rich.console import Console
from rich.table import Table

import kbitc
from kbitc.backends import REPORT
from kbitc.backends.onnx_export.runtime import OnnxModel
from kbitc.backends.onnx_export.trace import describe, trace
from kbitc.evaluation.opening import need_tokenizer, open_model
from kbitc.evaluation.perplexity import perplexity, read_text, windows
from kbitc.formats.spec import parse

LEVELS = {"fp32": 1, "int8": 4}  # accuracy levels of MatMulNBits
PROMPT = 32  # tokens
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--spec", default="int4:64")
    parser.add_argument("--limit-tokens", type=int, default=5120)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    logging.disable(logging.INFO)  # the quantizer writes a line for each node
    with tempfile.TemporaryDirectory(prefix="kbitc-") as folder:
        rows = compare(given, Path(folder))
    if given.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    table = Table(title=f"{given.model}, {given.spec}, {given.threads} threads", title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "name" else "right")
    for row in rows:
        table.add_row(*(f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    Console().print(table)


def compare(given: argparse.Namespace, folder: Path) -> list[Row]:
    """One row for each way and accuracy level."""
    loaded = open_model(given.model, torch.float32)
    tokenizer = need_tokenizer(loaded, given.model)
    text = read_text(given.text)
    ids = windows(loaded.model, tokenizer, text, given.context, given.limit_tokens)
    dense = export_dense(loaded.model, folder / "dense")
    packed = folder / "packed"
    kbitc.compile(given.model, spec=given.spec, out=packed)
    folders = {}
    for activations, level in LEVELS.items():
        ours = folder / f"kbitc-{activations}"
        kbitc.export_onnx(packed, ours, activations=activations)
        folders[f"kbitc, {activations}"] = ours
        theirs = folder / f"ort-{activations}"
        quantize_with_ort(dense, theirs, given.spec, level)
        folders[f"ONNX Runtime's, {activations}"] = theirs
    models = {name: OnnxModel(path) for name, path in folders.items()}
    speeds = decode_speeds(models, ids[0][:PROMPT], given.new, given.rounds)
    rows = []
    for name, path in folders.items():
        score = perplexity(models[name], ids)
        size = sum(file.stat().st_size for file in path.glob("model.onnx*"))
        rows.append(
            {
                "name": name,
                "weights quantized %": 100 * quantized_share(path),
                "file MB": size / 1e6,
                "perplexity": score.perplexity,
                "decode tok/s": speeds[name],
            }
        )
    return rows


def export_dense(model: Any, folder: Path) -> Path:
    """The float32 model as PyTorch's exporter writes it."""
    folder.mkdir()
    traced = trace(model, describe(model)).model
    ir.save(traced, folder / "model.onnx", external_data="model.onnx.data")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    (folder / REPORT).write_text(json.dumps({"kind": "decoder", "parameters": numbers}))
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def quantize_with_ort(dense: Path, folder: Path, text: str, level: int) -> None:
    """ONNX Runtime's default quantizer, with the bits and the block of a spec."""
    spec = parse(text)
    folder.mkdir()
    quantizer = MatMulNBitsQuantizer(
        onnx.load(dense / "model.onnx"),
        bits=spec.bits,
        block_size=spec.block,
        is_symmetric=not spec.has_zero_point,
        accuracy_level=level,
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / "model.onnx"), use_external_data_format=True)
    for name in (REPORT, "config.json"):
        (folder / name).write_text((dense / name).read_text())


def quantized_share(folder: Path) -> float:
    """Weights of packed matmuls, among those and the dense matrices that a matmul or a look-up reads."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    packed = {node.input[1]: node_weights(node) for node in graph.node if node.op_type == "MatMulNBits"}
    belongs = {name.rpartition(".")[0] for name in packed}  # scales and the like
    readers = ("MatMul", "Gather", "Gemm", "Transpose")
    read = {name for node in graph.node if node.op_type in readers for name in node.input}
    dense = sum(
        math.prod(tensor.dims)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
        and len(tensor.dims) == 2
        and tensor.name in read
        and tensor.name.rpartition(".")[0] not in belongs
    )
    return sum(packed.values()) / (sum(packed.values()) + dense)


def node_weights(node: Any) -> int:
    """Weights of one MatMulNBits."""
    found = {attribute.name: attribute.i for attribute in node.attribute}
    return int(found["K"] * found["N"])


def decode_speeds(
    models: dict[str, OnnxModel], prompt: torch.Tensor, new: int, rounds: int
) -> dict[str, float]:
    """Tokens per second at batch 1, the best of the rounds."""
    best = dict.fromkeys(models, 0.0)
    for _ in range(rounds):
        for name, model in models.items():
            decoder = model.make_decoder()
            logits, cache = decoder.prefill(prompt[None])
            start = time.perf_counter()
            for _ in range(new):
                logits = decoder.step(int(logits.argmax()), cache)
            best[name] = max(best[name], new / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
