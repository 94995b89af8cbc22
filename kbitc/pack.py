"""Pack: the source's tensors, one at a time, through the plan into an artifact.

The one thing to know: three things overlap (reading the next tensor, quantizing this one, hashing and
writing the last), so memory holds about three tensors, and the order of work never changes the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor

from kbitc import outliers, scoring
from kbitc.artifact import Writer, checksum, stored_tensors
from kbitc.errors import UsageError
from kbitc.kernels import ops
from kbitc.moments import Moments
from kbitc.passes import measure_moments
from kbitc.program import Program, Read, Rest, Weight
from kbitc.slots import Slot, packed_slots, shared_codebooks
from kbitc.spec import Spec

Progress = Callable[[str, int], None]
"""Called with a tensor's name and its source bytes, once it is written."""

CODEBOOKS = "(shared codebooks)"


def slots(program: Program) -> dict[str, dict[str, Slot]]:
    """Every tensor that the artifact of a planned program holds, by unit and stored name."""
    assert program.plan is not None
    specs = {name: choice.spec for name, choice in program.plan.weights.items()}
    units: dict[str, dict[str, Slot]] = {}
    shared = shared_codebooks(specs.values())
    if shared:
        units[CODEBOOKS] = {key: Slot(t.dtype, tuple(t.shape)) for key, t in shared.items()}
    for name, weight in program.weights.items():
        spec = specs[name]
        if spec.is_left_alone:
            units[name] = {name: Slot(_rest_dtype(weight.dtype), weight.shape)}
            continue
        lead = weight.oriented_shape[:-1]
        fields = packed_slots(spec, lead, weight.in_features)
        units[name] = {f"{name}.{field}": slot for field, slot in fields.items()}
    for name, rest in program.rest.items():
        units[name] = {name: Slot(_rest_dtype(rest.dtype), rest.shape)}
    return units


def payload_bytes(program: Program) -> int:
    """Exact bytes of all tensors of the artifact of a planned program."""
    return sum(slot.nbytes for unit in slots(program).values() for slot in unit.values())


def pack_to(program: Program, read: Read, writer: Writer, progress: Progress) -> None:
    """Quantize and write every tensor that the writer has not done yet.

    Args:
        program: planned.
        read: the source's tensor of a name.
        writer: opened with ``slots(program)``.
        progress: called after each tensor, also for those done by an earlier, interrupted run.

    Raises:
        UsageError: a weight that is not finite.
    """
    if CODEBOOKS in writer.slots and CODEBOOKS not in writer.done:
        assert program.plan is not None
        shared = shared_codebooks(choice.spec for choice in program.plan.weights.values())
        writer.put(CODEBOOKS, shared, {})
    tensors: dict[str, Weight | Rest] = {**program.weights, **program.rest}
    waiting = [name for name in tensors if name not in writer.done]
    for name in tensors.keys() - set(waiting):
        progress(name, _source_bytes(tensors[name]))
    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
        ahead = _submit_read(program, reading, read, waiting, 0)
        written: Future[None] | None = None
        for i, name in enumerate(waiting):
            source, digest = ahead.result()
            ahead = _submit_read(program, reading, read, waiting, i + 1)
            stored, note = _convert(program, tensors[name], source)
            del source
            if written is not None:
                written.result()
            written = writing.submit(writer.put, name, stored, {**note, "source": digest})
            progress(name, _source_bytes(tensors[name]))
        if written is not None:
            written.result()


def _submit_read(
    program: Program, pool: ThreadPoolExecutor, read: Read, names: list[str], i: int
) -> Future[tuple[Tensor, str]]:
    """The next tensor as it is to be stored, and the checksum of what the source holds."""

    def job() -> tuple[Tensor, str]:
        tensor = read(names[i])
        digest = checksum(tensor)
        return program.as_stored(read)(names[i]) if program.is_changed(names[i]) else tensor, digest

    return pool.submit(job) if i < len(names) else Future()


def _convert(
    program: Program, entry: Weight | Rest, source: Tensor
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """One source tensor as it is stored, and what to note about it."""
    assert program.plan is not None
    if isinstance(entry, Rest):
        # Whole numbers take the model's width: a source may hold its index buffers in another.
        source = source if source.is_floating_point() else source.to(entry.dtype)
        return {entry.name: to_rest(entry.name, source, must_be_finite=entry.is_parameter)}, {}
    spec = program.plan.weights[entry.name].spec
    if spec.is_left_alone:
        kept = to_rest(entry.name, source, must_be_finite=True)
        return {entry.name: kept}, {"error": scoring.relative_error(source, kept)}
    oriented = source.mT if entry.is_transposed else source
    packed = ops.quantize(oriented, spec, name=entry.name, **quantizer_of(program, entry.name, spec))
    stored = {f"{entry.name}.{field}": t for field, t in stored_tensors(packed).items()}
    return stored, {"error": scoring.packed_error(oriented, packed)}


def quantizer_of(program: Program, name: str, spec: Spec) -> dict[str, Any]:
    """Options of ``quantize`` for a weight under a spec: outliers and importance of inputs, where known."""
    moments = cast("Mapping[str, Moments]", program.facts.get(measure_moments.FACT, {}))
    options: dict[str, Any] = {"quantizer": "absmax"}
    if name in moments:
        options = {"quantizer": "weighted", "importance": moments[name].importance()}
    found = outliers.of_weight(program.facts, name)
    if found is not None:
        options["outliers"] = found.picked(spec)
    return options


def to_rest(name: str, tensor: Tensor, *, must_be_finite: bool) -> Tensor:
    """A tensor as it is stored unpacked: floats at 16 bits, others as they are.

    Float32 becomes float16, or bfloat16 where float16 would overflow.

    Raises:
        UsageError: a parameter that is not finite.
    """
    if not tensor.is_floating_point():
        return tensor
    if must_be_finite and not tensor.isfinite().all():
        raise UsageError(
            f"{name}: holds a NaN or infinite value; a parameter must be finite. Repair the checkpoint"
        )
    if tensor.dtype.itemsize <= 2:
        return tensor
    half = tensor.to(torch.float16)
    return half if bool((half.isfinite() == tensor.isfinite()).all()) else tensor.to(torch.bfloat16)


def _rest_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype.is_floating_point and dtype.itemsize > 2 else dtype


def _source_bytes(entry: Weight | Rest) -> int:
    return entry.numel * entry.dtype.itemsize


def source_hash(done: Mapping[str, Mapping[str, object]]) -> str:
    """One SHA-256 over the source's tensors, from the writer's notes."""
    lines = sorted(f"{unit} {note['source']}" for unit, note in done.items() if "source" in note)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
