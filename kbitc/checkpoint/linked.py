"""A skeleton linked to a source's tensors: every name of the model has a recipe, or an error.

The one thing to know: the rules about tied weights live here. One of the tied names in the source
is enough; if it holds two with different values, they are not tied, as in ``from_pretrained``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint.base import TensorInfo
from kbitc.checkpoint.conversion import ReadSource, Recipe, recipes_for
from kbitc.checkpoint.names import stored_names, tensor_of
from kbitc.checkpoint.skeletons import default_value, untie
from kbitc.errors import SourceError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Linked:
    """A model on the meta device whose every tensor can be read.

    Attributes:
        model: the skeleton.
        recipes: by first name, in the model's order.
        defaults: what the source lacks and the model's initialization sets.
        untied: names that the config ties and the source does not.
        ignored: names of the source that nothing uses.
        read_source: reads one tensor by the source's name.
    """

    model: nn.Module
    recipes: Mapping[str, Recipe]
    defaults: Mapping[str, Tensor]
    untied: tuple[str, ...]
    ignored: tuple[str, ...]
    read_source: ReadSource

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model, in its order; kept, since each read of calibration asks for it."""
        own = {n: TensorInfo.of(tuple(t.shape), t.dtype) for n, t in self.defaults.items()}
        made = {name: recipe.info for name, recipe in self.recipes.items()} | own
        return {name: made[name] for name in stored_names(self.model)}

    def read(self, name: str) -> Tensor:
        """One tensor by the model's first name."""
        if name in self.defaults:
            return self.defaults[name].clone()
        return self.recipes[name].make(self.model, self.read_source)

    def source_name(self, name: str) -> str | None:
        """The source's name of a tensor that it holds just so; None where it has to be made."""
        recipe = self.recipes.get(name) if name not in self.defaults else None
        return recipe.sources[0][1] if recipe is not None and recipe.rule is None else None


def link(
    model: nn.Module,
    sources: Mapping[str, TensorInfo],
    rules: Sequence[Any],
    read_source: ReadSource,
    label: str,
) -> Linked:
    """Link a skeleton to a source. The skeleton is untied where the source says so.

    Raises:
        SourceError: the source lacks a parameter, or one is of another shape or quantized.
    """
    recipes, ignored = recipes_for(model, sources, rules, label)
    untied = _untie_different(model, recipes, read_source)
    chosen: dict[str, Recipe] = {}
    missing: list[str] = []
    for first, names in stored_names(model).items():
        provider = next((name for name in names if name in recipes), None)
        if provider is None:
            missing.append(first)
        else:
            chosen[first] = recipes[provider]
    defaults = _defaults(model, missing)
    _check_missing([name for name in missing if name not in defaults], model, ignored, label)
    _check_fit(model, chosen, label)
    return Linked(model, chosen, defaults, tuple(untied), tuple(ignored), read_source)


def _untie_different(model: Any, recipes: Mapping[str, Recipe], read: ReadSource) -> list[str]:
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    untied = []
    for target, source in tied.items():
        if target not in recipes or source not in recipes:
            continue
        if not torch.equal(recipes[target].make(model, read), recipes[source].make(model, read)):
            _log.warning("%s and %s are tied in the config, but differ: kept apart", target, source)
            untie(model, target)
            untied.append(target)
    return untied


def _defaults(model: nn.Module, missing: Sequence[str]) -> dict[str, Tensor]:
    values = {}
    for name in missing:
        if isinstance(tensor_of(model, name), nn.Parameter) and not _is_never_saved(model, name):
            continue
        value = default_value(model, name)
        if value is not None:
            _log.info("%s is not in the checkpoint; the model's own initial value is used", name)
            values[name] = value
    return values


def _is_never_saved(model: Any, name: str) -> bool:
    """Whether transformers computes a parameter at load, and leaves it out of files (Marian's sinusoids)."""
    return name in (model._keys_to_ignore_on_save or ())


def _check_missing(missing: Sequence[str], model: Any, ignored: Sequence[str], label: str) -> None:
    if not missing:
        return
    hints = []
    if ignored:
        hints.append(f"nothing uses {len(ignored)} that are there, such as '{ignored[0]}'")
    if missing[0] in (model._tied_weights_keys or {}):
        hints.append('if it is the embedding again, set "tie_word_embeddings": true in config.json')
    hints.append("else weights are missing, or config.json names another class than they are of")
    raise SourceError(
        f"{label}: the checkpoint lacks {len(missing)} of the tensors of {type(model).__name__}, "
        f"the first is '{missing[0]}'; {'; '.join(hints)}"
    )


def _check_fit(model: nn.Module, recipes: Mapping[str, Recipe], label: str) -> None:
    for name, recipe in recipes.items():
        wanted, info = tensor_of(model, name), recipe.info
        where = f"{label}: '{name}' (from '{recipe.sources[0][1]}')"
        is_plain = info.dtype.is_floating_point and info.dtype.itemsize > 1
        if wanted.is_floating_point() and not is_plain and wanted.dtype != info.dtype:
            raise SourceError(
                f"{where} is stored as {str(info.dtype).removeprefix('torch.')}: the checkpoint is "
                "quantized already; compile the 16-bit model that it was made from"
            )
        if tuple(wanted.shape) != info.shape:
            raise SourceError(
                f"{where} is {info.shape} in the checkpoint, but {tuple(wanted.shape)} in the "
                "model of config.json; config and weights do not belong together"
            )
