"""The engine that ``--engine`` names, from its start to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kbitc.errors import UsageError, did_you_mean
from kbitc.system.ray_engine import RAY, ray_engine
from kbitc.system.work import IN_PROCESS, Engine

ENGINES = {IN_PROCESS.name: "this process", RAY: "workers of a Ray cluster"}


@contextmanager
def engine_of(name: str, address: str | None = None) -> Iterator[Engine]:
    """The engine of that name, started; it ends with the block.

    Args:
        name: see `ENGINES`.
        address: of a Ray cluster that runs already; None starts one on this machine.

    Raises:
        UsageError: no such engine, an address for one that has none, or no cluster there.
        BackendUnavailable: Ray is not installed.
    """
    if name not in ENGINES:
        raise UsageError(f"--engine: {did_you_mean('engine', name, ENGINES)}")
    if name == IN_PROCESS.name:
        if address is not None:
            raise UsageError("--address: is of a Ray cluster; add --engine ray")
        yield IN_PROCESS
        return
    with ray_engine(address) as engine:
        yield engine
