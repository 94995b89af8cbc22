"""Native steps that are kept: tracing a model takes seconds, reading what came out of it milliseconds.

The one thing to know: a file holds no weights. It names the model's own tensors, and has the few constants
that were computed from them; so its name depends on all of these but the packed ones.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc import cache
from kbitc.backends._decoding import lifted as lifted_model
from kbitc.backends._decoding.decoder import layer_count
from kbitc.backends._decoding.lifted import place_of
from kbitc.backends.cpu import native_lowering, native_nodes, native_program, native_trace, native_values
from kbitc.backends.cpu.native_program import NativeProgram
from kbitc.backends.cpu.native_trace import TracedTokens
from kbitc.backends.cpu.step_key import kept_folder, step_key
from kbitc.errors import BackendUnavailable, SourceError
from kbitc.formats.packed import Operands
from kbitc.graph import tracing
from kbitc.pipeline import Pass
from kbitc.pipeline.records import Fired
from kbitc.system import files
from kbitc.system.checksums import check_seal, digest, sealed
from kbitc.system.json_file import read_json, well_formed

MOST_NUMBERS = 1 << 16  # of constants that are written down
Made = tuple[NativeProgram, dict[str, Fired]]


def kept_step(model: nn.Module, passes: Sequence[Pass], make: Callable[[], Made]) -> Made:
    """The step of a model and what the passes recorded: as it is kept, or made and kept.

    Args:
        model: causal language model of transformers with packed weights, on the CPU.
        passes: what runs on the traced graph.
        make: makes it.
    """
    lifted = TracedTokens(model, layer_count(model))
    state = lifted.state()
    path = kept_folder() / f"{_key(model, lifted, state, passes)}.json"
    with contextlib.suppress(OSError, SourceError, BackendUnavailable):
        cache.check_private(path.parent.parent, path.parent, path)
        return _read(path, state)
    made = make()
    data = _written(*made, state)
    if data is not None:
        with contextlib.suppress(OSError, BackendUnavailable):  # then it is made again next time
            cache.make_private(path.parent)
            files.write_whole(path, json.dumps(sealed(data)))
    return made


def _key(model: nn.Module, lifted: TracedTokens, state: dict[str, Tensor], passes: Sequence[Pass]) -> str:
    modules = (
        native_lowering,
        native_nodes,
        native_program,
        native_trace,
        native_values,
        lifted_model,
        tracing,
    )
    sources = [str(module.__file__) for module in modules]
    packed = {name for *_, names in lifted.places for name in names.values()}
    plain = {
        name: digest(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        for name, tensor in state.items()
        if name not in packed
    }
    return step_key(model, lifted, state, passes, [*sources, __file__], contents=plain)


def _written(
    program: NativeProgram, fusions: Mapping[str, Fired], state: Mapping[str, Tensor]
) -> dict[str, Any] | None:
    """A program as plain data; None if it has weights that are not the model's, or large constants."""
    names = {place_of(tensor): name for name, tensor in state.items()}
    weights, constants, left = [], [], MOST_NUMBERS
    for weight in program.weights:
        own = [None if tensor is None else names.get(place_of(tensor), "") for tensor in weight.tensors]
        if "" in own:
            return None
        weights.append([own, list(weight.numbers)])
    for source, constant in zip(program.sources, program.constants, strict=True):
        name = names.get(place_of(source))
        if name is not None:
            constants.append({"name": name, "is_dense": constant.dtype != torch.float32})
            continue
        left -= constant.numel()
        if left < 0 or constant.dtype != torch.float32 or not constant.isfinite().all():
            return None
        constants.append({"shape": list(constant.shape), "values": constant.flatten().tolist()})
    return {
        "weights": weights,
        "constants": constants,
        "code": list(program.code),
        "numbers": list(program.numbers),
        "slots": [list(slot) for slot in program.slots],
        "fusions": {name: fired.to_json() for name, fired in fusions.items()},
    }


def _read(path: Path, state: Mapping[str, Tensor]) -> Made:
    """The inverse of `_written`.

    Raises:
        SourceError: the file is damaged, or not there.
    """
    data = read_json(path)
    advice = "remove it"
    check_seal(data, str(path), advice)
    with well_formed(str(path), advice):
        weights = tuple(
            Operands._make((*(None if name is None else state[name] for name in names), *numbers))
            for names, numbers in data["weights"]
        )
        sources = tuple(_constant(entry, state) for entry in data["constants"])
        constants = tuple(
            (source if entry.get("is_dense") else source.float()).contiguous()
            for source, entry in zip(sources, data["constants"], strict=True)
        )
        slots = tuple((heads, size) for heads, size in data["slots"])
        program = NativeProgram(
            weights, constants, tuple(data["code"]), tuple(data["numbers"]), slots, sources
        )
        return program, {name: Fired.from_json(record) for name, record in data["fusions"].items()}


def _constant(entry: Mapping[str, Any], state: Mapping[str, Tensor]) -> Tensor:
    if "name" in entry:
        return state[entry["name"]]
    return torch.tensor(entry["values"], dtype=torch.float32).view(entry["shape"])
