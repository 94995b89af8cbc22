"""An exported folder in ONNX Runtime: logits for `kbitc eval`, token by token for `kbitc run`.

The one thing to know: keys and values stay in ONNX Runtime's own memory between steps; what a step gives
is what the next one takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kbitc.artifact import verifying
from kbitc.backends._decoding.decoder import Decoder
from kbitc.backends._exported import ADVICE, REPORT, verify_exported
from kbitc.checkpoint.folder_checks import check_regular
from kbitc.checkpoint.skeletons import load_config
from kbitc.errors import BackendUnavailable, SourceError, UsageError, foreign
from kbitc.system import files
from kbitc.system.json_file import read_json, well_formed

_FIELDS = {
    "kind": str,
    "activations": str,
    "parameters": int,
    "file_bytes": int,
    "files": dict,
    "weights": dict,
    "left_alone": dict,
}
GRAPH = "model.onnx"


def read_report(folder: Path) -> dict[str, Any]:
    """What the export says of itself.

    Raises:
        SourceError: not an exported folder, or damaged.
    """
    path = folder / REPORT
    if not files.exists(path):
        raise SourceError(
            f"{folder}: holds no {REPORT}; write one with 'kbitc export OUT --format onnx -o DIR'"
        )
    check_regular(folder, str(folder))
    report = read_json(path)
    with well_formed(str(path), ADVICE):
        for key, kind in _FIELDS.items():
            if not isinstance(report[key], kind) or isinstance(report[key], bool):
                raise TypeError(f"{key} is {report[key]!r:.80}")
        if report["parameters"] <= 0 or report["file_bytes"] <= 0:
            raise ValueError("it counts nothing")
        for entry in report["weights"].values():
            float(entry["error"]), int(entry["container_bytes"])
        for entry in report["left_alone"].values():
            int(entry["bytes"])
    return report


def open_session(folder: Path) -> Any:
    """An ONNX Runtime session with as many threads as torch has.

    Raises:
        BackendUnavailable: onnxruntime is not installed.
        SourceError: ONNX Runtime refuses the files.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            f"{folder}: running it needs onnxruntime; install it with: pip install 'kbitc[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise SourceError(f"{folder / GRAPH}: ONNX Runtime cannot load it: {error}") from error


@dataclass
class OnnxCache:
    """Keys and values so far.

    Attributes:
        length: tokens seen.
        states: one OrtValue for each of the graph's past inputs, in order.
    """

    length: int = 0
    states: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Output:
    """What a causal language model gives, as far as kbitc asks."""

    logits: Tensor


class OnnxModel(nn.Module):
    """An exported model, called like one of transformers.

    Attributes:
        report: ``kbit_export.json``.
        session: of ONNX Runtime.
        config: of transformers; None for a plain module.

    Raises:
        SourceError: damaged or changed files.
        BackendUnavailable: onnxruntime is missing.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.report = read_report(folder)
        if verifying.is_wanted():
            verify_exported(folder, self.report)
        self.session = open_session(folder)
        self.config: Any = None
        self.generation_config: Any = None
        if (folder / "config.json").exists():
            self.config = load_config(folder, str(folder))
        if (folder / "generation_config.json").exists():
            from transformers import GenerationConfig

            with foreign(f"{folder / 'generation_config.json'}: cannot be read"):
                self.generation_config = GenerationConfig.from_pretrained(folder)
        self._past = [
            given for given in self.session.get_inputs() if given.name.startswith("past_key_values.")
        ]
        self._names = {given.name for given in self.session.get_inputs()}
        self.outputs = [made.name for made in self.session.get_outputs()]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """All outputs by name, for numpy or torch inputs by name."""
        feed = {name: np.asarray(value) for name, value in inputs.items()}
        with foreign("ONNX Runtime cannot run the graph", ADVICE):
            return dict(zip(self.outputs, self.session.run(None, feed), strict=True))

    def new_cache(self, batch: int = 1) -> OnnxCache:
        """No tokens."""
        from onnxruntime import OrtValue

        shapes = [(batch, given.shape[1], 0, given.shape[3]) for given in self._past]
        return OnnxCache(0, [OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for shape in shapes])

    def decode(self, ids: Tensor, cache: OnnxCache, attention_mask: Tensor | None = None) -> Tensor:
        """Append tokens to a cache.

        Args:
            ids: (batch, tokens) int64.
            cache: changed.
            attention_mask: (batch, all tokens) int64, 0 for padding on the left; by default none.

        Returns:
            Logits (batch, tokens, vocabulary) float32.
        """
        from onnxruntime import OrtValue

        total = cache.length + ids.shape[1]
        mask = (
            torch.ones(ids.shape[0], total, dtype=torch.int64) if attention_mask is None else attention_mask
        )
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, cache.length :]
        plain = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feed = {
            name: OrtValue.ortvalue_from_numpy(value.contiguous().numpy())
            for name, value in plain.items()
            if name in self._names
        }
        feed |= {given.name: state for given, state in zip(self._past, cache.states, strict=True)}
        with foreign("ONNX Runtime cannot run the graph", ADVICE):
            logits, *cache.states = self.session.run_with_ort_values(self.outputs, feed)
        cache.length = total
        return torch.from_numpy(logits.numpy())

    def forward(self, input_ids: Tensor, *, use_cache: bool = False) -> Output:
        """Logits of whole sequences.

        Raises:
            UsageError: not an exported causal language model.
        """
        del use_cache
        self.need_decoder()
        return Output(self.decode(input_ids, self.new_cache(input_ids.shape[0])))

    def need_decoder(self) -> None:
        """Raises UsageError if the export is not of a causal language model."""
        if self.report["kind"] != "decoder":
            raise UsageError(f"this is an exported {self.report['kind']}, not a causal language model")

    def make_decoder(self) -> OnnxDecoder:
        """What decodes token by token."""
        self.need_decoder()
        return OnnxDecoder(self)


class OnnxDecoder(Decoder):
    """Decodes in ONNX Runtime.

    Attributes:
        model: the exported model.
    """

    name = "onnx"
    model: OnnxModel

    def __init__(self, model: OnnxModel) -> None:
        self.model = model

    def new_cache(self, room: int = 0) -> OnnxCache:
        """An empty cache; it grows."""
        del room
        return self.model.new_cache()

    def prefill(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """See `Decoder.prefill`."""
        cache = self.new_cache() if cache is None else cache
        return self.model.decode(ids, cache)[:, -1], cache
