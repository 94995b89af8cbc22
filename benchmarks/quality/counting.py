"""Stored bits as kbitc counts them: what a tool quantized, and the rest at 16 bits, tied tensors once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

REST_BYTES = 2  # a parameter that a tool leaves alone


def stored_bytes(model: nn.Module, nbytes: Mapping[str, int]) -> int:
    """Bytes of a whole model.

    Args:
        model: the source; a parameter that has two names counts once.
        nbytes: of each weight that a tool stores in its own way.

    Raises:
        ValueError: a name that the model does not have.
    """
    rest = {name: parameter.numel() * REST_BYTES for name, parameter in model.named_parameters()}
    unknown = nbytes.keys() - rest.keys()
    if unknown:
        raise ValueError(f"the model has no {', '.join(sorted(unknown))}")
    return sum({**rest, **nbytes}.values())


def bits_per_param(model: nn.Module, nbytes: Mapping[str, int]) -> float:
    """Stored bits per parameter."""
    return 8 * stored_bytes(model, nbytes) / sum(parameter.numel() for parameter in model.parameters())


def embeddings(model: nn.Module) -> list[str]:
    """Names of the weights that peers leave at 16 bits: the embedding, and a head that is not tied to it."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    weights = [module.weight for module in modules if module is not None]
    return [name for name, own in model.named_parameters() if any(own is weight for weight in weights)]
