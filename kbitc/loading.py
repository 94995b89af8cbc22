"""Models from artifacts and artifacts from models: load, load_into, save, and dense models to compare.

The one thing to know: loading goes through transformers' own ``from_pretrained`` with the ``kbit``
quantizer, so that what comes back is the Hugging Face model with packed parameters, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.artifact import PLAN_FILE, Artifact, Writer, stored_tensors
from kbitc.backends._onnx_runtime import OnnxModel, is_exported
from kbitc.checkpoint import Checkpoint, open_checkpoint
from kbitc.checkpoint.folder_checks import read_json
from kbitc.documents import documents, weight_entry
from kbitc.errors import SourceError, UsageError
from kbitc.huggingface import register
from kbitc.pack import CODEBOOKS, to_rest
from kbitc.plan import Choice
from kbitc.slots import Slot, shared_codebooks
from kbitc.tensor import KbitTensor


def load(folder: str | Path, *, dtype: torch.dtype | None = None, verify: bool = True) -> nn.Module:
    """Load an artifact as the transformers model that it was compiled from.

    Args:
        folder: the artifact.
        dtype: compute dtype: of activations and of the unpacked rest. By default the model's own,
            but float32 instead of float16, which CPUs compute slowly.
        verify: compare every tensor with its checksum first.

    Raises:
        SourceError: not an artifact, damaged, of a newer format, or not of a transformers model.
    """
    artifact = Artifact.open(Path(folder))
    if verify:
        artifact.verify()
    config = artifact.folder / "config.json"
    if not config.exists():
        raise SourceError(
            f"{folder}: holds the weights of a plain module, without a config.json; build the module "
            "and use kbitc.load_into(module, folder)"
        )
    register()
    data = read_json(config)
    model_class = _model_class(data, config)
    with quiet_transformers():
        model: nn.Module = model_class.from_pretrained(artifact.folder, dtype=dtype or compute_dtype(data))
    return model.eval()


def _model_class(config: dict[str, Any], path: Path) -> Any:
    import transformers

    names = config.get("architectures") or ["AutoModel"]
    found = getattr(transformers, names[0], None)
    if found is None:
        raise SourceError(
            f"{path}: transformers {transformers.__version__} has no model class '{names[0]}'; "
            "install the version that the model was made with"
        )
    return found


def compute_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype to compute in by default: the config's, but float32 for float16."""
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return torch.float32 if stored == "float16" else getattr(torch, stored)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers' own progress bars and load reports off: kbitc has checked and shows its own."""
    from transformers.utils import logging

    was_on, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if was_on:
            logging.enable_progress_bar()


def load_into(module: nn.Module, folder: str | Path, *, verify: bool = True) -> nn.Module:
    """Put an artifact's weights into a module of the same structure.

    Args:
        module: may be on the meta device; changed in place and returned.
        folder: the artifact.
        verify: compare every tensor with its checksum first.

    Raises:
        SourceError: not an artifact, or damaged.
        UsageError: names do not fit the module.
    """
    artifact = Artifact.open(Path(folder))
    if verify:
        artifact.verify()
    state: dict[str, Tensor] = artifact.state()
    for name, entry in artifact.plan["weights"].items():
        tensor = state[name]
        if isinstance(tensor, KbitTensor):
            state[name] = nn.Parameter(tensor, requires_grad=False)
        state.update(dict.fromkeys(entry["aliases"], state[name]))
    for name, entry in artifact.plan["left_alone"].items():
        state.update(dict.fromkeys(entry["aliases"], state[name]))
    outcome = module.load_state_dict(state, strict=False, assign=True)
    if outcome.missing_keys or outcome.unexpected_keys:
        raise UsageError(
            f"{folder}: does not fit this module: missing {outcome.missing_keys[:3]}, "
            f"unexpected {outcome.unexpected_keys[:3]}"
        )
    return module


def save(model: nn.Module, folder: str | Path, *, force: bool = False) -> None:
    """Write a module with packed weights as an artifact, without pickle.

    Args:
        model: any module with ``KbitTensor`` parameters; its ``config``, if any, is stored too.
        folder: where to write.
        force: replace an existing artifact.

    Raises:
        UsageError: the folder exists or cannot be written, or nothing in the model is packed.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    parameters = {id(parameter) for parameter in model.parameters()}
    stored: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, dict[str, Any]] = {}
    left: dict[str, dict[str, Any]] = {}
    count = 0
    for key, (first, *aliases) in names.items():
        tensor = tensors[key].detach()
        count += tensor.numel() if key in parameters else 0
        if isinstance(tensor, KbitTensor):
            packed = tensor.packed.map(lambda t: t.cpu())
            choice = Choice(tensor.spec, "saved from a module", bits=8 * packed.nbytes() / tensor.numel())
            weights[first] = weight_entry(
                choice, tensor.shape, tensor.dtype, aliases, is_transposed=tensor.is_transposed
            )
            stored[first] = {f"{first}.{field}": t for field, t in stored_tensors(packed).items()}
        else:
            left[first] = {
                "reason": "not packed in the module",
                "shape": list(tensor.shape),
                "aliases": aliases,
            }
            stored[first] = {first: to_rest(first, tensor.cpu(), must_be_finite=key in parameters)}
    if not weights:
        raise UsageError("nothing in this model is packed; compile it first with kbitc.compile")
    specs = [t.spec for t in tensors.values() if isinstance(t, KbitTensor)]
    stored = {CODEBOOKS: shared_codebooks(specs), **stored}
    slots = {
        unit: {key: Slot(t.dtype, tuple(t.shape)) for key, t in parts.items()}
        for unit, parts in stored.items()
    }
    config: Any = getattr(model, "config", None)
    facts = {
        "source": {"name": type(model).__name__, "sha256": None},
        "budget": None,
        "parameters": count,
        "bytes": sum(t.nbytes for parts in stored.values() for t in parts.values()),
        "source_bytes": sum(2 * t.numel() for t in tensors.values()),
    }
    with Writer(Path(folder), slots, {"model": type(model).__name__}, is_forced=force) as writer:
        for unit, parts in stored.items():
            writer.put(unit, parts, {})
        data = config.to_dict() if hasattr(config, "to_dict") else None
        if data is not None:
            data.pop("quantization_config", None)
        writer.commit(documents(facts, weights, left, writer.checksums, data))


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, packed or dense.

    Attributes:
        model: in eval mode.
        nbytes: bytes of its stored tensors.
        bits_per_param: stored bits per parameter, tied ones counted once.
        tokenizer: None if the source has none.
    """

    model: nn.Module
    nbytes: int
    bits_per_param: float
    tokenizer: Any


def open_model(source: str, dtype: torch.dtype | None = None) -> Loaded:
    """Load an artifact, an exported folder, or the dense model of any source, with its tokenizer.

    Raises:
        SourceError: neither, or damaged.
    """
    folder = Path(source)
    if (folder / PLAN_FILE).exists():
        artifact = Artifact.open(folder)
        model = load(folder, dtype=dtype)
        return Loaded(model, artifact.payload_bytes, artifact.bits_per_param, _tokenizer(folder))
    if is_exported(folder):
        exported = OnnxModel(folder)
        nbytes = int(exported.report["file_bytes"])
        return Loaded(exported, nbytes, 8 * nbytes / exported.report["parameters"], _tokenizer(folder))
    return _open_dense(source, dtype)


def _open_dense(source: str, dtype: torch.dtype | None) -> Loaded:
    with open_checkpoint(source) as checkpoint:
        model = dense_model(checkpoint, dtype)
        parameters = sum(parameter.numel() for parameter in checkpoint.skeleton().parameters())
        nbytes = sum(info.nbytes for info in checkpoint.tensors().values())
        return Loaded(model, nbytes, 8 * nbytes / parameters, tokenizer_of(checkpoint))


def dense_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> nn.Module:
    """The transformers model of a source, dense, in eval mode; a copy where the source is in memory."""
    skeleton: Any = checkpoint.skeleton()
    config = skeleton.config
    wanted = dtype or compute_dtype({"dtype": str(config.dtype or torch.float32)})
    state = {name: checkpoint.read(name) for name in checkpoint.tensors()}
    with quiet_transformers():
        model: nn.Module = type(skeleton).from_pretrained(None, config=config, state_dict=state, dtype=wanted)
    return model.eval()


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The tokenizer that lies beside a source; None if there is none."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="kbitc-") as folder:
        checkpoint.save_companions(Path(folder))
        return _tokenizer(Path(folder))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(folder)


def need_tokenizer(loaded: Loaded, source: str) -> Any:
    """The tokenizer.

    Raises:
        SourceError: the source has none.
    """
    if loaded.tokenizer is None:
        raise SourceError(f"{source}: has no tokenizer files, so text cannot be read; copy them into it")
    return loaded.tokenizer
