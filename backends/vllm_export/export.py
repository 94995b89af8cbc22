"""From an artifact to a folder of compressed-tensors.

before:  codes in bit planes; value = codebook[code] * scale, with levels -7/8 to 8/8 at 4 bits
after:   -8 to 7 in the bits of 32-bit words, the lowest first; value = integer * (-scale / 8), and of
         ``int4+zp+iz`` (integer - zero point) * (scale / 16)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from kbitc.artifact.folders import FolderClaim
from kbitc.artifact.loading import check_config
from kbitc.artifact.plan_file import WeightEntry
from kbitc.artifact.reader import Artifact
from kbitc.backends._exported import COMPRESSED, REPORT, check_formats, filling, write_json, write_report
from kbitc.backends.vllm_export.target import BITS, GROUPS, holds
from kbitc.checkpoint.companions import CONFIG, copy_files
from kbitc.errors import SourceError, UsageError
from kbitc.formats import bit_planes
from kbitc.formats.packed import Packed
from kbitc.formats.scale_grid import level_bits, whole_steps
from kbitc.tensor.kbit_tensor import KbitTensor
from kbitc.version import VERSION

SHARD = "4GB"
DTYPE = "float16"  # that scales are of; a model in bfloat16 would round them


def export_compressed_tensors(
    model: nn.Module | str | Path, folder: str | Path, *, force: bool = False
) -> dict[str, Any]:
    """Write an artifact as compressed-tensors.

    Args:
        model: a compiled artifact of a model of transformers.
        folder: where to write.
        force: replace an earlier export.

    Returns:
        The report, as in ``kbit_export.json``.

    Raises:
        UsageError: a module in memory, weights in formats that compressed-tensors does not hold, or the
            folder exists, cannot be written, or is being written by another process.
        SourceError: not an artifact, or not of a model of transformers.
    """
    if isinstance(model, nn.Module):
        raise UsageError(
            "compressed-tensors is written from an artifact; compile with out=FOLDER, or kbitc.save"
        )
    artifact = Artifact.open(Path(model))
    if not (artifact.folder / CONFIG).exists():
        raise SourceError(f"{model}: holds the weights of a plain module, which vLLM cannot build")
    config = check_config(artifact)
    instead = (
        f"It holds sint of {' and '.join(map(str, BITS))} bits, and int4+zp+iz, in groups of "
        f"{', '.join(map(str, GROUPS))} of nn.Linear; 'kbitc compile MODEL --bits B --for vllm' plans so"
    )
    check_formats(artifact, _is_held, COMPRESSED, instead)
    artifact.verify()
    with FolderClaim(Path(folder), is_forced=force, marker=REPORT) as claim, filling(claim) as partial:
        weights = _write_tensors(artifact, partial)
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        copy_files(artifact.folder, partial)
        whole = {**config, "dtype": DTYPE, "quantization_config": quantization_config(artifact)}
        write_json(partial / CONFIG, whole)
        report = {
            "kbitc": VERSION,
            "kind": COMPRESSED,
            "source": str(artifact.folder.absolute()),
            "parameters": artifact.plan.parameters,
            "weights": weights,
            "files": sizes,
            "file_bytes": sum(sizes.values()),
        }
        write_report(partial, report)
    return report


def _is_held(name: str, entry: WeightEntry) -> bool:
    is_linear = (
        len(entry.shape) == 2 and entry.view_of is None and not entry.is_transposed and not entry.aliases
    )
    return is_linear and name.endswith(".weight") and holds(entry.spec, entry.shape[1])


def _write_tensors(artifact: Artifact, folder: Path) -> dict[str, Any]:
    """All tensors, in shards; returns the report of the packed ones."""
    state = dict(_converted(artifact))
    sizes: Counter[str] = Counter()
    for key, value in state.items():
        sizes[key.rpartition(".")[0]] += value.nbytes
    shards = split_torch_state_dict_into_shards(state, max_shard_size=SHARD)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: state[name] for name in sorted(names)}, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": dict(sorted(shards.tensor_to_filename.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return {
        name: {
            "spec": str(entry.spec),
            "shape": list(entry.shape),
            "container": f"int{entry.spec.bits}, groups of {entry.spec.block}"
            + (", zero points" if entry.spec.has_zero_point else ""),
            "bytes": sizes[_module(name)],
            "error": 0.0,
        }
        for name, entry in artifact.plan.packed.items()
    }


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _converted(artifact: Artifact) -> Iterator[tuple[str, Tensor]]:
    for name, value in artifact.state().items():
        if isinstance(value, KbitTensor):
            yield from ((f"{_module(name)}.{key}", part) for key, part in converted(value.packed).items())
        else:
            yield name, value


def converted(packed: Packed) -> dict[str, Tensor]:
    """A ``(rows, in_features)`` weight as compressed-tensors has it.

    Returns:
        ``weight_packed``, ``(rows, in_features * bits / 32)`` int32 words; ``weight_scale``,
        ``(rows, groups)`` floats; ``weight_shape``; with zero points ``weight_zero_point``,
        ``(rows * bits / 32, groups)`` words.
    """
    spec = packed.spec
    codes = bit_planes.unpack(packed.planes, packed.in_features, spec.bits)
    factor = 2.0 ** -level_bits(spec)
    if packed.zeros is None:
        # A level m / half is the integer -m, which is stored as half - m: the codes from the other end.
        codes, factor = (2**spec.bits - 1) - codes, -factor
    parts = {
        "weight_packed": _words(codes, spec.bits),
        "weight_scale": _scales(packed.scales, factor),
        "weight_shape": torch.tensor([len(codes), packed.in_features]),
    }
    if packed.zeros is not None:
        steps = whole_steps(packed.zeros, packed.scales, spec).to(torch.uint8)
        parts["weight_zero_point"] = _words(steps.mT.contiguous(), spec.bits).mT.contiguous()
    return parts


def _words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes in 32-bit words."""
    stream = bit_planes.pack_row_by_row(codes, bits)
    return torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4)).view(torch.int32)


def _scales(scales: Tensor, factor: float) -> Tensor:
    """Times a power of two; in float32 where 16 bits would round some, far below all others."""
    turned = scales.float() * factor
    narrow = turned.to(scales.dtype)
    return narrow if torch.equal(narrow.float(), turned) else turned


def quantization_config(artifact: Artifact) -> dict[str, Any]:
    """What compressed-tensors reads: a group of weights for each format, and what is left alone."""
    named: dict[tuple[int, int, bool], list[str]] = {}
    for name, entry in artifact.plan.packed.items():
        spec = entry.spec
        named.setdefault((spec.bits, spec.block, not spec.has_zero_point), []).append(_module(name))
    groups = {
        f"group_{i}": {
            "targets": named[key],
            "weights": {
                "num_bits": key[0],
                "type": "int",
                "symmetric": key[2],
                "strategy": "group",
                "group_size": key[1],
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for i, key in enumerate(sorted(named))
    }
    alone = [_module(n) for n, e in artifact.plan.weights.items() if e.spec.is_left_alone]
    return {
        "quant_method": COMPRESSED,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*alone, "lm_head"} - {name for names in named.values() for name in names}),
        "kv_cache_scheme": None,
    }
