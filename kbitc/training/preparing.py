"""From an artifact and its source to a classroom: what may be tuned, and whose weights are whose.

The one thing to know: the source runs as it is, and the artifact as it was packed, so that passes that
changed tensors on the way (`kbitc.graph.program.Changes`) need not be known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbitc.artifact.reader import Artifact
from kbitc.checkpoint import Checkpoint
from kbitc.checkpoint.tensor_digests import digest_of_tensor
from kbitc.compiler.calibrator import Calibrator
from kbitc.errors import UsageError
from kbitc.graph.program import Program
from kbitc.passes.canonicalize import traced_on
from kbitc.system.checksums import digest
from kbitc.tensor.kbit_tensor import KbitTensor
from kbitc.training.classroom import Classroom, Feed
from kbitc.training.tunable import TunablePlain, TunableWeight


def check_source(artifact: Artifact, checkpoint: Checkpoint) -> None:
    """See that an artifact was compiled from a source, as far as the artifact tells.

    Raises:
        UsageError: it was compiled from another.
    """
    names = [*artifact.plan.weights, *artifact.plan.left_alone]
    there = checkpoint.tensors()
    missing = [name for name in names if name not in there]
    wanted = artifact.plan.source_hash
    if not missing and wanted is not None:
        lines = sorted(f"{name} {digest_of_tensor(checkpoint.read(name))}" for name in names)
        if digest("\n".join(lines).encode()) == wanted:
            return
    elif not missing:
        return
    what = f"it has no '{missing[0]}'" if missing else "its tensors are others"
    raise UsageError(
        f"{artifact.folder}: was not compiled from {checkpoint.label}: {what}; give the model that it was "
        f"compiled from ('{artifact.plan.source}') with --source"
    )


def traced(calibrator: Calibrator, feed: Feed) -> Program:
    """The source's canonical program at the shapes of a feed.

    Raises:
        UsageError: the model cannot be traced.
    """
    program = traced_on(calibrator, feed)
    if program.untraced:
        raise UsageError(
            f"{calibrator.checkpoint.label}: cannot be tuned, since it cannot be traced: {program.untraced}"
        )
    return program


def classroom(artifact: Artifact, calibrator: Calibrator, program: Program) -> Classroom:
    """What runs students of an artifact.

    Raises:
        UsageError: the artifact lacks a tensor that the source's graph reads.
    """
    state = artifact.state()
    packed = {name: value.packed for name, value in state.items() if isinstance(value, KbitTensor)}
    plain = {name: value for name, value in state.items() if name not in packed}
    needed = {*program.parameters.values()}
    # Buffers that no file holds are the model's own.
    stored = {*calibrator.checkpoint.tensors()}
    missing = sorted(needed & stored - {*state})
    if missing:
        raise UsageError(
            f"{artifact.folder}: holds no '{missing[0]}', which {calibrator.checkpoint.label} reads; compile "
            "the model again"
        )

    def read(name: str) -> Tensor:
        return plain[name] if name in plain else calibrator.read(name)

    return Classroom(
        program,
        read,
        {name: TunableWeight(own) for name, own in packed.items() if name in needed},
        {
            name: TunablePlain(value)
            for name, value in plain.items()
            if name in needed and _is_gain(program, value, name)
        },
    )


def _is_gain(program: Program, value: Tensor, name: str) -> bool:
    rest = program.rest.get(name)
    return (
        rest is not None
        and rest.is_parameter
        and value.dim() == 1
        and value.is_floating_point()
        and value.dtype != torch.float64
    )
