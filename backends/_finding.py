"""What a backend is, and which one decodes or exports.

The one thing to know: a backend only says what it misses; whoever asks for it here learns it in time, as
`BackendUnavailable`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from torch import nn

from kbitc.errors import BackendUnavailable, KbitcError, UsageError, did_you_mean
from kbitc.pipeline.registry import Registry
from kbitc.planning.target import Target

if TYPE_CHECKING:
    from kbitc.backends._decoding.decoder import Decoder

AUTO = "auto"
"""The backend "cpu" for packed weights on the CPU, where it can be; "eager" elsewhere."""

BACKENDS = Registry("backend", "kbitc.backends", "BACKEND", BackendUnavailable, inner="backend")


@runtime_checkable
class Backend(Protocol):
    """What every backend can say. ``BACKEND`` is its class, which is made without arguments."""

    def missing(self) -> str | None:
        """What to install, in words that go on after "cannot be used here: "; None if nothing."""
        ...


@runtime_checkable
class Decoding(Backend, Protocol):
    """A backend that decodes causal language models of transformers."""

    def decoder(self, model: nn.Module) -> Decoder:
        """What decodes this model token by token; it gives the tokens of the model itself.

        Raises:
            UsageError: this backend cannot decode it; says why, and what can.
        """
        ...


@runtime_checkable
class Exporting(Backend, Protocol):
    """A backend that writes packed models for another program.

    Attributes:
        format: what it writes, as ``kbitc export --format`` has it.
    """

    @property
    def format(self) -> str: ...

    def export(
        self, model: nn.Module | str | Path, folder: str | Path, *, force: bool = False, **options: Any
    ) -> Mapping[str, Any]:
        """Write a model.

        Args:
            model: with packed weights, or a compiled artifact.
            folder: where to write.
            force: replace an earlier export.
            options: the backend's own.

        Returns:
            A report of what was written, as plain data; with "weights" in it, as `kbit_export.json` has them.
        """
        ...


@runtime_checkable
class Targeted(Backend, Protocol):
    """A backend that writes weights in containers of its own, which a plan can be made for."""

    def target(self) -> Target:
        """The containers; needs nothing that is to be installed."""
        ...


OWN = ("cpu", "triton")
"""Targets of the artifact itself: kbitc's kernels hold every format."""


def find_target(name: str) -> Target | None:
    """What ``kbitc compile --for`` names; None for kbitc's own kernels.

    Raises:
        UsageError: no such target.

    >>> find_target("onnx").name
    'onnx'
    """
    if name in OWN:
        return None
    targets = {t.name: t for t in (b.target() for _, b in _usable() if isinstance(b, Targeted))}
    if name not in targets:
        raise UsageError(did_you_mean("target", name, [*OWN, *targets]))
    return targets[name]


def backend_names() -> list[str]:
    """The registered backends: folders beside this file, and entry points of other packages."""
    return BACKENDS.names()


def find_backend(name: str) -> type[Any]:
    """The class of a backend that can be used.

    Raises:
        UsageError: no backend has that name.
        BackendUnavailable: it cannot be loaded, or misses something to be installed.

    >>> find_backend("eager").__name__
    'Eager'
    """
    kind = cast("type[Any]", BACKENDS.load(name))
    backend = kind()
    if not isinstance(backend, Backend):
        raise BackendUnavailable(f"the backend '{name}' has no method missing(); see kbitc.backends.Backend")
    missing = backend.missing()
    if missing is not None:
        raise BackendUnavailable(f"the backend '{name}' cannot be used here: {missing}")
    return kind


def export_formats() -> list[str]:
    """What ``kbitc export`` can write, sorted."""
    return sorted({exporter.format for _, exporter in _exporters()})


def find_exporter(name: str) -> Exporting:
    """What writes a format.

    Args:
        name: of the format, or of the backend where several write one.

    Raises:
        UsageError: nothing writes it, or more than one backend.
        BackendUnavailable: what writes it misses something to be installed.

    >>> find_exporter("onnx").format
    'onnx'
    """
    exporters = dict(_exporters())
    writers = [known for known, exporter in exporters.items() if name in (known, exporter.format)]
    if not writers:
        raise UsageError(did_you_mean("format", name, {exporter.format for exporter in exporters.values()}))
    if len(writers) > 1 and name not in writers:
        listed = " and ".join(f"'{writer}'" for writer in writers)
        raise UsageError(f"the format '{name}' is written by the backends {listed}; name one of them instead")
    return cast("Exporting", find_backend(name if name in writers else writers[0])())


def make_decoder(model: nn.Module, name: str = AUTO, kv: str | None = None) -> Decoder:
    """What decodes a causal language model token by token.

    Args:
        model: of transformers, packed or not.
        name: of a backend. "auto" takes "cpu" for packed weights on the CPU; where that cannot be, it
            warns once, says why, and takes "eager".
        kv: how keys and values are cached: "fp16", or the spec of a k-bit cache; by default as the backend
            does.

    Raises:
        UsageError: no such backend, one that cannot decode this model, or not with such a cache.
        BackendUnavailable: it lacks something to be installed.
    """
    decoder = _find_decoder(model, name)
    if kv is not None:
        decoder.use_cache(kv)
    return decoder


def _find_decoder(model: nn.Module, name: str) -> Decoder:
    own = getattr(model, "make_decoder", None)  # what runs elsewhere decodes there
    if own is not None:
        if name != AUTO:
            raise UsageError(f"an exported model does not run on the backend '{name}'; leave out --backend")
        exported: Decoder = own()
        return exported
    if name != AUTO:
        backend = find_backend(name)()
        if not isinstance(backend, Decoding):
            decoding = ", ".join(known for known, other in _usable() if isinstance(other, Decoding))
            raise UsageError(f"the backend '{name}' does not decode; use one that does: {decoding}")
        return backend.decoder(model)
    if not _is_packed_on_cpu(model):
        return _find_decoder(model, "eager")
    try:
        return _find_decoder(model, "cpu")
    except KbitcError as error:
        warnings.warn(f"decoding with Python calls, which is slower: {error}", RuntimeWarning, stacklevel=2)
        return _find_decoder(model, "eager")


def _usable() -> Iterator[tuple[str, Backend]]:
    """Every backend that can be loaded: one that is broken must not hide the others."""
    for name in backend_names():
        with contextlib.suppress(BackendUnavailable):
            yield name, BACKENDS.load(name)()


def _exporters() -> Iterator[tuple[str, Exporting]]:
    return ((name, backend) for name, backend in _usable() if isinstance(backend, Exporting))


def _is_packed_on_cpu(model: nn.Module) -> bool:
    from kbitc.tensor.kbit_tensor import KbitTensor

    parameters = list(model.parameters())
    is_on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return is_on_cpu and any(isinstance(parameter, KbitTensor) for parameter in parameters)
