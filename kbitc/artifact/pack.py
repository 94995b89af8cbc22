"""Pack: the source's tensors, one at a time, through the plan into an artifact.

The one thing to know: three things overlap (reading the next tensor, quantizing this one, hashing and
writing the last), so memory holds about three tensors, and the order of work never changes the bytes. Reading
and quantizing are an engine's, which may be a cluster's workers; writing is this process's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kbitc.artifact.in_order import in_order, packed_in_order
from kbitc.artifact.stored import packed_of, stored_tensors
from kbitc.artifact.writer import Writer
from kbitc.checkpoint.finite import check_finite
from kbitc.checkpoint.tensor_digests import digest_of_tensor
from kbitc.formats.layout import shared_codebooks, stored_plain
from kbitc.formats.packed import Packed
from kbitc.graph.context import Progress, ReadTensor
from kbitc.graph.program import Program, Rest, Weight
from kbitc.graph.stored import CODEBOOKS
from kbitc.quantizers import Evidence, choose_quantizer, settled_quantizer
from kbitc.replay.choice import goes_in_order
from kbitc.sensitivity.sampled_error import packed_error, relative_error
from kbitc.system.checksums import digest
from kbitc.tensor.kbit_tensor import KbitTensor, packed_as


def pack_to(program: Program, writer: Writer) -> list[str]:
    """Quantize and write every tensor that the writer has not done yet.

    Args:
        program: planned, with a source; its context hears of each tensor, also of those done by an earlier,
            interrupted run, in bytes of the source.
        writer: opened with ``stored_slots(program)``.

    Returns:
        The weights that were packed in the order of the graph, by this process whatever the engine: each of
        them needs those before it.

    Raises:
        UsageError: a weight that is not finite.
    """
    read = program.context.read
    assert read is not None
    if CODEBOOKS in writer.slots and CODEBOOKS not in writer.done:
        assert program.plan is not None
        shared = shared_codebooks(choice.spec for choice in program.plan.weights.values())
        writer.put(CODEBOOKS, shared, {})
    in_order = _pack_in_order(program, writer, read)
    tensors: dict[str, Weight | Rest] = {**program.weights, **program.rest}
    waiting = [
        Piece(entry, program.packed.get(name)) for name, entry in tensors.items() if name not in writer.done
    ]
    progress = _Counted(program.context.on_progress, {name: _source_bytes(t) for name, t in tensors.items()})
    for name in tensors:
        if name in writer.done:
            progress.add(name)
    results = program.context.engine.run(_Packing(program), waiting)
    with ThreadPoolExecutor(1) as writing, closing(results):
        written: Future[None] | None = None
        for place, (stored, note) in results:
            name = waiting[place].entry.name
            if written is not None:
                written.result()
            written = writing.submit(writer.put, name, stored, note)
            progress.add(name)
        if written is not None:
            written.result()
    return in_order


def _pack_in_order(program: Program, writer: Writer, read: ReadTensor) -> list[str]:
    """The weights of the plan as the graph reads them, if a quantizer wants them so; their names."""
    assert program.plan is not None
    choices = program.plan.weights
    shared = shared_codebooks(choice.spec for choice in choices.values())

    def known(name: str) -> Packed | None:
        if name in program.packed:
            return program.packed[name]
        if name not in writer.done or choices[name].spec.is_left_alone:
            return None
        fields = {key.removeprefix(f"{name}."): tensor for key, tensor in writer.get(name).items()}
        return packed_of(fields, choices[name].spec, program.weights[name].in_features, shared)

    way = in_order(program, known)
    if way is None:
        return []
    sizes = {
        name: _source_bytes(program.weights[name]) for name, c in choices.items() if not c.spec.is_left_alone
    }
    progress = _Counted(program.context.on_progress, sizes)
    for name in [name for name in sizes if name in writer.done]:
        progress.add(name)
    names = []
    for name, used, packed in way.run():
        names.append(name)
        source = read(name)
        oriented = program.weights[name].oriented(program.as_stored(read)(name))
        stored, note = _stored_weight(name, oriented, packed)
        writer.put(name, stored, {**note, "quantizer": used, "source": digest_of_tensor(source)})
        progress.add(name)
    return names


class _Counted:
    """Bytes of the tensors that are done, told to a `Progress`."""

    def __init__(self, tell: Progress, sizes: Mapping[str, int]) -> None:
        self.tell, self.sizes, self.done = tell, sizes, 0

    def add(self, name: str) -> None:
        self.done += self.sizes[name]
        self.tell(f"packing {name}", self.done, sum(self.sizes.values()))


@dataclass(frozen=True)
class Piece:
    """A tensor to be stored.

    Attributes:
        entry: what it is.
        packed: what a pass has packed it to; None where that is to be done.
    """

    entry: Weight | Rest
    packed: Packed | None = None

    def __str__(self) -> str:
        return self.entry.name


class _Packing:
    """`kbitc.system.work.Work`: reading a tensor, and making of it what is stored.

    Args:
        program: planned.
    """

    def __init__(self, program: Program) -> None:
        self.program = program.apart()

    def load(self, piece: Piece) -> tuple[Tensor, str]:
        """The tensor as it is to be stored, and the checksum of what the source holds."""
        program, name = self.program, piece.entry.name
        read = program.context.read
        assert read is not None
        tensor = read(name)
        source = digest_of_tensor(tensor)
        return program.as_stored(read)(name) if program.is_changed(name) else tensor, source

    def finish(self, piece: Piece, loaded: tuple[Tensor, str]) -> tuple[dict[str, Tensor], dict[str, object]]:
        """It as it is stored, and what to note about it."""
        source, checksum = loaded
        stored, note = _convert(self.program, piece, source)
        return stored, {**note, "source": checksum}


def _convert(program: Program, piece: Piece, source: Tensor) -> tuple[dict[str, Tensor], dict[str, object]]:
    """One source tensor as it is stored, and what to note about it."""
    assert program.plan is not None
    entry = piece.entry
    if isinstance(entry, Rest):
        # Whole numbers take the model's width: a source may hold its index buffers in another.
        dtype = entry.stored if source.is_floating_point() else entry.dtype
        return {entry.name: checked_plain(entry.name, source, dtype, must_be_finite=entry.is_parameter)}, {}
    if program.plan.weights[entry.name].spec.is_left_alone:
        kept = checked_plain(entry.name, source, must_be_finite=True)
        return {entry.name: kept}, {"error": relative_error(source, kept), "quantizer": ""}
    oriented = entry.oriented(source)
    if piece.packed is not None:
        quantizer, packed = program.plan.weights[entry.name].quantizer, piece.packed
    else:
        quantizer, packed = packed_weight(program, entry.name, oriented)
    stored, note = _stored_weight(entry.name, oriented, packed)
    return stored, {**note, "quantizer": quantizer}


def _stored_weight(
    name: str, oriented: Tensor, packed: Packed
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """A packed weight's tensors by their stored names, and what to note about it."""
    stored = {f"{name}.{field}": t for field, t in stored_tensors(packed).items()}
    return stored, {"error": packed_error(oriented, packed)}


def packed_weight(program: Program, name: str, oriented: Tensor) -> tuple[str, Packed]:
    """A weight as the plan wants it, and the name of the quantizer that made it.

    Args:
        program: planned; what a pass has packed already is taken as it is.
        name: of the weight.
        oriented: its data, ``(*lead, rows, in_features)``.

    Raises:
        UsageError: a weight that is not finite, or a quantizer without the evidence that it needs.
    """
    assert program.plan is not None
    choice = program.plan.weights[name]
    if name in program.packed:
        return choice.quantizer, program.packed[name]
    evidence = Evidence.of(program, name, choice.spec)
    # What goes through the graph has had its turn: here are the weights that the graph does not show.
    choose = settled_quantizer if goes_in_order(choice.quantizer) else choose_quantizer
    used, quantizer = choose(choice.quantizer, evidence)
    return used, quantizer.quantize(oriented, choice.spec, evidence)


def packed_tensors(program: Program, stored: ReadTensor) -> Iterator[tuple[str, KbitTensor]]:
    """Every weight that the plan packs, by its first name, in memory.

    Args:
        program: planned.
        stored: reads the source's tensors as they are to be stored.
    """
    assert program.plan is not None
    choices = program.plan.weights
    program = replace(program, packed=packed_in_order(program))
    for name, choice in choices.items():
        if not choice.spec.is_left_alone:
            weight, data = program.weights[name], stored(name)
            _, packed = packed_weight(program, name, weight.oriented(data))
            yield name, packed_as(packed, data.dtype, weight.shape, is_transposed=weight.is_transposed)


def checked_plain(
    name: str, tensor: Tensor, dtype: torch.dtype | None = None, *, must_be_finite: bool
) -> Tensor:
    """A tensor as it is stored unpacked: in ``dtype``, by default see `kbitc.formats.layout.stored_plain`.

    Raises:
        UsageError: a parameter that is not finite.
    """
    if must_be_finite:
        check_finite(name, tensor)
    return stored_plain(tensor) if dtype is None else tensor.to(dtype)


def _source_bytes(entry: Weight | Rest) -> int:
    return entry.numel * entry.dtype.itemsize


def source_hash(done: Mapping[str, Mapping[str, object]]) -> str:
    """One SHA-256 over the source's tensors, from the writer's notes."""
    lines = sorted(f"{unit} {note['source']}" for unit, note in done.items() if "source" in note)
    return digest("\n".join(lines).encode())
