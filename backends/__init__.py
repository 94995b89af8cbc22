"""Backends: one file each, found by name. The folder is the registry.

The one thing to know: a file ends with ``BACKEND = <its class>``, its name is the backend's name, and
it is imported when it is first asked for. Files that begin with an underscore are parts of backends.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from typing import TYPE_CHECKING, Any

from kbitc.errors import BackendUnavailable, KbitcError, UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from kbitc.backends._decoding.decoder import Decoder

AUTO = "auto"


def backend_names() -> list[str]:
    """The registered backends, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find_backend(name: str) -> Any:
    """The class of a backend.

    Raises:
        UsageError: no backend has that name.
        BackendUnavailable: it needs a package that is not installed.

    >>> find_backend("eager").__name__
    'Eager'
    """
    if name not in backend_names():
        raise UsageError(did_you_mean("backend", name, backend_names()))
    try:
        return importlib.import_module(f"kbitc.backends.{name}").BACKEND
    except ImportError as error:
        raise BackendUnavailable(f"the backend '{name}' cannot be imported: {error}") from error


def make_decoder(model: nn.Module, name: str = AUTO) -> Decoder:
    """What decodes a causal language model token by token.

    Args:
        model: of transformers, packed or not.
        name: of a backend. "auto" takes "cpu" for packed weights on the CPU; where that cannot be, it
            warns once, says why, and takes "eager".

    Raises:
        UsageError: no such backend, or one that cannot decode this model.
        BackendUnavailable: it lacks something to be installed.
    """
    own = getattr(model, "make_decoder", None)  # what runs elsewhere decodes there
    if own is not None:
        if name != AUTO:
            raise UsageError(f"an exported model does not run on the backend '{name}'; leave out --backend")
        exported: Decoder = own()
        return exported
    if name != AUTO:
        backend = find_backend(name)()
        if not hasattr(backend, "decoder"):
            raise UsageError(f"the backend '{name}' does not decode; use 'cpu' or 'eager'")
        decoder: Decoder = backend.decoder(model)
        return decoder
    if not _is_packed_on_cpu(model):
        return make_decoder(model, "eager")
    try:
        return make_decoder(model, "cpu")
    except KbitcError as error:
        warnings.warn(f"decoding with Python calls, which is slower: {error}", RuntimeWarning, stacklevel=2)
        return make_decoder(model, "eager")


def _is_packed_on_cpu(model: nn.Module) -> bool:
    from kbitc.tensor.kbit_tensor import KbitTensor

    parameters = list(model.parameters())
    is_on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return is_on_cpu and any(isinstance(parameter, KbitTensor) for parameter in parameters)
