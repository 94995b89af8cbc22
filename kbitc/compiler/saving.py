"""An artifact from a module that is packed already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kbitc.artifact.folders import FolderClaim
from kbitc.artifact.pack import checked_plain
from kbitc.artifact.plan_file import LeftAlone, PlanFile, WeightEntry
from kbitc.artifact.stored import stored_tensors
from kbitc.artifact.writer import Writer
from kbitc.checkpoint.float32_names import float32_names
from kbitc.compiler.documents import documents
from kbitc.errors import UsageError
from kbitc.formats.layout import Slot, plain_dtype, shared_codebooks
from kbitc.graph.plan import Choice
from kbitc.graph.stored import CODEBOOKS
from kbitc.tensor.kbit_tensor import KbitTensor


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
    asked = float32_names(model)
    stored: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, WeightEntry] = {}
    left: dict[str, LeftAlone] = {}
    count = 0
    for key, (first, *others) in names.items():
        tensor, aliases = tensors[key].detach(), tuple(others)
        count += tensor.numel() if key in parameters else 0
        if isinstance(tensor, KbitTensor):
            packed = tensor.packed.map(lambda t: t.cpu())
            choice = Choice(tensor.spec, "saved from a module", bits=8 * packed.nbytes() / tensor.numel())
            shape = tuple(tensor.shape)
            weights[first] = WeightEntry(
                choice, shape, tensor.dtype, tensor.is_transposed, aliases, view_of=tensor.view_of()
            )
            stored[first] = {f"{first}.{field}": t for field, t in stored_tensors(packed).items()}
        else:
            is_wide = key not in parameters or first in asked
            dtype = plain_dtype(tensor.cpu(), is_wide=is_wide, is_summed=_is_summed(model, first))
            left[first] = LeftAlone("not packed in the module", tuple(tensor.shape), aliases)
            stored[first] = {
                first: checked_plain(first, tensor.cpu(), dtype, must_be_finite=key in parameters)
            }
    if not weights:
        raise UsageError("nothing in this model is packed; compile it first with kbitc.compile")
    stored = {CODEBOOKS: shared_codebooks(entry.spec for entry in weights.values()), **stored}
    slots = {
        unit: {key: Slot(t.dtype, tuple(t.shape)) for key, t in parts.items()}
        for unit, parts in stored.items()
    }
    config: Any = getattr(model, "config", None)
    identity = {"model": type(model).__name__}
    with (
        FolderClaim(Path(folder), is_forced=force) as claim,
        Writer(Path(folder), slots, identity, claim=claim) as writer,
    ):
        for unit, parts in stored.items():
            writer.put(unit, parts, {})
        generation: Any = getattr(model, "generation_config", None)
        if hasattr(generation, "save_pretrained"):
            generation.save_pretrained(writer.partial)
        data = config.to_dict() if hasattr(config, "to_dict") else None
        if data is not None:
            data.pop("quantization_config", None)
            data["architectures"] = [type(model).__name__]  # none yet, if the model was made in memory
        plan = PlanFile(
            source=type(model).__name__,
            source_hash=None,
            parameters=count,
            nbytes=sum(slot.nbytes for unit in slots.values() for slot in unit.values()),
            source_bytes=sum(2 * t.numel() for t in tensors.values()),
            weights=weights,
            left_alone=left,
            checksums=writer.checksums,
        )
        writer.commit(documents(plan, data, digests=writer.digests()))


def _is_summed(model: nn.Module, name: str) -> bool:
    """Whether a tensor is the weight of a matmul, a convolution or an embedding, as its module tells."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    kinds = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    return leaf == "weight" and (isinstance(module, kinds) or type(module).__name__ == "Conv1D")
