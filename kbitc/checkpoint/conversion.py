"""Which tensors of a source make which of the model: transformers' own rules, applied lazily.

    before:  experts.0.w1, experts.0.w3, experts.1.w1, ...     (names of the source)
    after:   experts.gate_up_proj <- stack and concatenate those, when it is read

The one thing to know: rules are tried once on meta tensors, so names and shapes of everything are
known, and checked, before any data is read; a read then runs the rule of one target alone. It
follows ``convert_and_load_state_dict_in_model`` of transformers 5.17 to 5.23.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint.base import TensorInfo
from kbitc.errors import SourceError, first_line, foreign

ReadSource = Callable[[str], Tensor]
"""Reads one tensor by the source's name."""


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the model comes about.

    Attributes:
        target: the model's name.
        sources: (pattern of the rule that matched, source's name), in the order the rule needs.
        rule: a transformers WeightConverter; None for a tensor that is taken as it is.
        anchor: the name that the rule was matched for, its first target.
        info: of the result.
    """

    target: str
    sources: tuple[tuple[str, str], ...]
    rule: Any
    anchor: str
    info: TensorInfo

    def make(self, model: nn.Module, read: ReadSource) -> Tensor:
        """The tensor."""
        if self.rule is None:
            return read(self.sources[0][1])
        return _convert(self.rule, self.anchor, self.sources, model, read)[self.target]


def recipes_for(
    model: nn.Module, sources: Mapping[str, TensorInfo], rules: Sequence[Any], label: str
) -> tuple[dict[str, Recipe], list[str]]:
    """A recipe for each of the model's names that the source provides, and the unused source names.

    Args:
        model: on the meta device.
        sources: the source's tensors by its own names.
        rules: transformers WeightRenamings and WeightConverters, not used before (some keep state).
        label: for messages.

    Raises:
        SourceError: a rule does not fit the tensors that it matches.
    """
    matches, ignored = _match(model, sources, rules)
    recipes: dict[str, Recipe] = {}
    for anchor, (rule, sources_of) in matches.items():
        if rule is None:
            recipes[anchor] = Recipe(anchor, sources_of, None, anchor, sources[sources_of[0][1]])
            continue

        def on_meta(name: str) -> Tensor:
            return torch.empty(sources[name].shape, dtype=sources[name].dtype, device="meta")

        try:
            results = _convert(rule, anchor, sources_of, model, on_meta)
        except Exception as error:
            raise SourceError(
                f"{label}: '{anchor}' cannot be made from {len(sources_of)} tensors of the checkpoint, "
                f"the first '{sources_of[0][1]}': {first_line(error)}. Some may be missing, or "
                "config.json is of another model"
            ) from error
        for target, tensor in results.items():
            info = TensorInfo.of(tuple(tensor.shape), tensor.dtype)
            recipes[target] = Recipe(target, sources_of, rule, anchor, info)
    return recipes, ignored


def model_rules(model: nn.Module) -> list[Any]:
    """Transformers' rules for a safetensors checkpoint of this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    pretrained: Any = model
    with foreign(f"{type(model).__name__}: transformers has no rules for it"):
        rules: list[Any] = get_model_conversion_mapping(pretrained)
    return rules


_Match = tuple[Any, tuple[tuple[str, str], ...]]


def _match(
    model: nn.Module, sources: Mapping[str, TensorInfo], rules: Sequence[Any]
) -> tuple[dict[str, _Match], list[str]]:
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix: Any = getattr(model, "base_model_prefix", None)
    state = model.state_dict()
    matches: dict[str, _Match] = {}
    ignored = []
    for source in sorted(sources, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, state)
        if name not in state and source in state:
            name, pattern = rename_source_key(source, [], [], prefix, state)
        if name not in state:
            ignored.append(source)
        elif name not in matches:
            rule = None if pattern is None else by_pattern[pattern]
            matches[name] = (rule, ((pattern or source, source),))
        elif pattern is None:
            ignored.append(source)  # two sources for one name: transformers takes the first
        else:
            rule, sources_of = matches[name]
            matches[name] = (rule, (*sources_of, (pattern, source)))
    return matches, ignored


def _convert(
    rule: Any, anchor: str, sources: Sequence[tuple[str, str]], model: Any, read: ReadSource
) -> dict[str, Tensor]:
    mapping = copy.deepcopy(rule)  # it collects tensors; one copy for each use
    for pattern, source in sources:
        mapping.add_tensor(anchor, source, pattern, _later(read, source))
    results = mapping.convert(anchor, model=model, config=model.config)
    return {name: t[0] if isinstance(t, list) else t for name, t in results.items()}


def _later(read: ReadSource, source: str) -> Callable[[], Tensor]:
    return lambda: read(source)
