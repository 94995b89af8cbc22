"""The files around an exported graph: configs for ONNX Runtime GenAI and transformers, the report.

The one thing to know: everything is written to a folder beside the target, which one rename completes
(`kbitc.artifact.folders`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kbitc.artifact.folders import FolderClaim
from kbitc.backends._exported import filling, write_json, write_report
from kbitc.backends.onnx_export.runtime import GRAPH
from kbitc.backends.onnx_export.trace import Signature
from kbitc.checkpoint.companions import copy_files, write_config
from kbitc.graph.positions import stated_positions

DATA = "model.onnx.data"
GENAI = "genai_config.json"


def write_package(
    claim: FolderClaim,
    model: ir.Model,
    report: Mapping[str, Any],
    *,
    config: Any,
    generation_config: Any,
    signature: Signature,
    companions: Path | None,
) -> dict[str, Any]:
    """Write an exported folder; nothing appears under its name before it is complete.

    Returns:
        The report with the sizes of the files.

    Raises:
        UsageError: the folder cannot be written.
    """
    with filling(claim) as partial:
        ir.save(model, partial / GRAPH, external_data=DATA, size_threshold_bytes=1024, max_workers=1)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        full = {**report, "files": sizes, "file_bytes": sum(sizes.values())}
        if companions is not None:
            copy_files(companions, partial)
        if config is not None:
            write_config(_without_dtype(config.to_dict()), partial)
        if signature.kind == "decoder":
            write_json(partial / GENAI, genai_config(config, generation_config, signature))
        write_report(partial, full)
    return full


def _without_dtype(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "dtype": "float32"}


def genai_config(config: Any, generation_config: Any, signature: Signature) -> dict[str, Any]:
    """What ONNX Runtime GenAI needs to generate with the graph, as its documentation has it.

    Args:
        config: of transformers.
        generation_config: its tokens come first; may be None.
        signature: of a decoder.
    """
    text = config.get_text_config(decoder=True)
    states = [name for name in signature.inputs if name.startswith("past_key_values.")]
    _, key_heads, _, head_size = signature.inputs[states[0]].shape
    inputs = {name: name for name in signature.inputs if name not in states}
    inputs |= {
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    length = stated_positions(config) or 2048
    tokens = {
        name: getattr(generation_config, name, None) or getattr(config, name, None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    end = tokens["eos_token_id"] or None
    first_end = end[0] if isinstance(end, list) else end
    return {
        "model": {
            "bos_token_id": tokens["bos_token_id"] or 0,
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GRAPH,
                "head_size": head_size,
                "hidden_size": text.hidden_size,
                "inputs": inputs,
                "outputs": outputs,
                "num_attention_heads": text.num_attention_heads,
                "num_hidden_layers": len(states) // 2,
                "num_key_value_heads": key_heads,
            },
            "eos_token_id": end if end is not None else 0,
            "pad_token_id": tokens["pad_token_id"] or first_end or 0,
            "type": "llama",  # any decoder whose inputs are named above
            "vocab_size": text.vocab_size,
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
