"""``kbitc verify DIR`` of compressed-tensors: its own library and transformers against the artifact.

The one thing to know: weights are compared as the library decompresses them, to the last bit. A folder with
zero points is not run: transformers cannot load it (`kbitc.backends.vllm_export.target`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbitc.artifact.loading import load
from kbitc.artifact.reader import Artifact
from kbitc.backends import REPORT, verify_exported
from kbitc.checkpoint.companions import CONFIG
from kbitc.checkpoint.dense import token_ids, tokenizer_in
from kbitc.checkpoint.safetensors_file import read_header
from kbitc.errors import BackendUnavailable, SourceError, UsageError, foreign
from kbitc.evaluation.checks import Check, differing
from kbitc.evaluation.onnx_verify import TEXT
from kbitc.system import files
from kbitc.system.json_file import read_json
from kbitc.tensor.kbit_tensor import KbitTensor

PACKAGE = "compressed_tensors"
PARTS = ("weight_packed", "weight_scale", "weight_shape")
ZEROS = "weight_zero_point"
TOKENS = 16
TOLERANCE = 0.005  # of outputs: kbitc's kernels round activations to 16 bits


def verify(folder: str | Path, against: str | None = None) -> list[Check]:
    """Check an exported folder.

    Args:
        folder: of ``kbitc export --format compressed-tensors``.
        against: the artifact that it came from; by default as recorded.

    Raises:
        BackendUnavailable: compressed-tensors is not installed.
        SourceError: damaged files, the source is not where it was, or a library cannot read the folder.
        UsageError: the source is no artifact.
    """
    path = Path(folder)
    report = read_json(path / REPORT)
    verify_exported(path, report)
    if find_spec(PACKAGE) is None:
        raise BackendUnavailable(
            f"{folder}: comparing it needs compressed-tensors; install it with: pip install 'kbitc[vllm]'"
        )
    source = Path(against or str(report.get("source") or ""))
    if not files.exists(source) or not source.name:
        raise SourceError(f"{folder}: its source {source} is not there; name the artifact with --against OUT")
    artifact = Artifact.open(source)
    unchanged = Check("files that do not match their checksums", 0, 0)
    has_zeros = any(spec.has_zero_point for spec in artifact.specs.values())
    return [unchanged, _weights(path, artifact), *([] if has_zeros else _outputs(path, artifact))]


def _weights(folder: Path, artifact: Artifact) -> Check:
    """Packed weights that come out of the library in other bits than out of the artifact."""
    stored = {
        key: tensor for file in folder.glob("*.safetensors") for key, tensor in read_header(file).items()
    }
    schemes = _schemes(folder)
    wrong = 0
    for name, weight in artifact.state().items():
        if not isinstance(weight, KbitTensor):
            continue
        module = name.removesuffix(".weight")
        places = {key: stored.get(f"{module}.{key}") for key in PARTS}
        if module not in schemes or None in places.values():
            raise UsageError(f"{folder}: has no '{module}', which {artifact.folder} packs; export it again")
        own = {key: place.read() for key, place in places.items() if place is not None}
        if f"{module}.{ZEROS}" in stored:
            own[ZEROS] = stored[f"{module}.{ZEROS}"].read()
        with foreign(f"{folder}: compressed-tensors cannot decompress '{name}'", "export it again"):
            found = _decompressed(own, schemes[module])
        wanted = torch.ops.kbit.dequantize(*weight.packed.operands(), torch.float32)
        wrong += not torch.equal(found, wanted.to(found.dtype))
    return Check("weights that decompress to other bits", wrong, 0)


def _schemes(folder: Path) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationScheme

    groups = read_json(folder / CONFIG)["quantization_config"]["config_groups"]
    with foreign(f"{folder / CONFIG}: compressed-tensors refuses its quantization_config", "export it again"):
        made = [QuantizationScheme.model_validate(group) for group in groups.values()]
    return {target: scheme for scheme in made for target in scheme.targets}


def _decompressed(own: dict[str, Tensor], scheme: Any) -> Tensor:
    from compressed_tensors.compressors.base import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    out: Tensor = compressor.decompress(own, scheme)["weight"]
    return out


def _outputs(folder: Path, artifact: Artifact) -> list[Check]:
    """What transformers computes with both, in float32."""
    from transformers import AutoModelForCausalLM

    ours: Any = load(artifact.folder, dtype=torch.float32)
    with foreign(f"{folder}: transformers cannot load it"):
        theirs: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).eval()
    tokenizer, words = tokenizer_in(folder), int(ours.config.get_text_config().vocab_size)
    ids = torch.arange(TOKENS) % words if tokenizer is None else token_ids(tokenizer, TEXT, ours)
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    with torch.inference_mode(), foreign(f"{folder}: transformers cannot run it"):
        wanted, found = (model(input_ids=ids[None]).logits for model in (ours, theirs))
        tokens = [model.generate(ids[None], **options)[0].tolist() for model in (ours, theirs)]
    error = float((found - wanted).norm() / wanted.norm())
    return [
        Check("relative error of logits in transformers", error, TOLERANCE),
        Check(f"of {TOKENS} greedy tokens that differ", differing(*tokens), 0),
    ]
