"""What a module's class says of its parameters, for those that no captured graph reads.

The one thing to know: a class counts as a linear or an embedding only where its forward is torch's own, or
ends in it (``super().forward``). Of another class that multiplies by a parameter, it is a `Miss`.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import nn

from kbitc.checkpoint.names import first_names
from kbitc.graph.direct_reads import added_biases, never_multiplied, read_directly
from kbitc.graph.matching import KERNEL, Miss
from kbitc.tensor.layers import is_patchwise

NO_FACTOR = Miss("of a class whose code multiplies no matrices")


@dataclass(frozen=True)
class ModuleUse:
    """What one module does with a parameter.

    Attributes:
        kind: "linear", "embedding" or "grouped_linear".
        is_transposed: the weight, as it is stored, is (..., in, out).
        view_of: the matrix that it is a view of, as of `kbitc.graph.program.Weight`.
        module: the module's name in the model.
        feeds_output: it gives the logits.
    """

    kind: str
    is_transposed: bool = False
    view_of: tuple[int, ...] | None = None
    module: str = ""
    feeds_output: bool = False


ByClass: TypeAlias = Mapping[str, tuple[ModuleUse | Miss, ...]]
"""For a parameter's first name what each module that has it does with it; none of unknown classes."""


def uses_by_class(model: nn.Module) -> ByClass:
    """What the classes of a model's modules say of its parameters.

    Args:
        model: on any device; nothing is read.
    """
    first = first_names(model)
    head = _head(model)
    uses: dict[str, list[ModuleUse | Miss]] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0]) if path else None
        unread = dict.fromkeys(never_multiplied(model, path), NO_FACTOR)
        for leaf, outcome in {**unread, **_of_module(module, parent)}.items():
            name = f"{path}.{leaf}".lstrip(".")
            if module._parameters.get(leaf) is None:
                continue
            if isinstance(module, nn.Embedding) and read_directly(model, path):
                outcome = Miss("of an embedding whose weight the model's code reads itself")  # noqa: PLW2901
            uses.setdefault(first[name], []).append(_placed(outcome, path, is_head=module is head))
    return {name: tuple(outcomes) for name, outcomes in uses.items()}


def _placed(outcome: ModuleUse | Miss, path: str, *, is_head: bool) -> ModuleUse | Miss:
    if isinstance(outcome, Miss):
        return outcome
    return replace(outcome, module=path, feeds_output=is_head)


def _head(model: nn.Module) -> nn.Module | None:
    """What gives the logits, where transformers says so."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def _of_module(module: nn.Module, parent: nn.Module | None) -> Mapping[str, ModuleUse | Miss]:
    """By the parameter's name in the module."""
    if isinstance(module, nn.Linear):
        is_plain = _leaves_forward_to(nn.Linear, module) or isinstance(parent, nn.MultiheadAttention)
        return {"weight": ModuleUse("linear") if is_plain else _own(module)}
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return {"weight": Miss("an embedding with max_norm, which changes its weight")}
        is_plain = _leaves_forward_to(nn.Embedding, module)
        return {"weight": ModuleUse("embedding") if is_plain else replace(_own(module), is_matmul=False)}
    if isinstance(module, _conv1d()):
        return {"weight": ModuleUse("linear", is_transposed=True)}
    if vars(module).keys() >= _EXPERTS:  # what transformers' use_experts_implementation sets
        grouped = ModuleUse("grouped_linear", is_transposed=bool(module.is_transposed))
        return dict.fromkeys(("gate_up_proj", "up_proj", "down_proj"), grouped)
    for classes, names in _LINEARS:
        if isinstance(module, classes):
            is_plain = type(module).__module__.startswith("torch.nn.")
            use = ModuleUse("linear") if is_plain else _own(module)
            return {leaf: use for leaf in module._parameters if leaf.startswith(names)}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"weight": _of_convolution(module)}
    for classes, names, miss in _MISSES:
        if isinstance(module, classes):
            return {leaf: miss for leaf in module._parameters if leaf.startswith(names)}
    owner: type = type(module)
    return dict.fromkeys(added_biases(owner) & set(module._parameters), Miss("added to other values"))


def _of_convolution(module: nn.modules.conv._ConvNd) -> ModuleUse | Miss:
    form = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
    base = next(base for base in type(module).__mro__ if base.__module__ == nn.Conv1d.__module__)
    if module.transposed or not is_patchwise(*form) or not _leaves_forward_to(base, module):
        return Miss(KERNEL)
    out, *patch = module.weight.shape
    return ModuleUse("linear", view_of=(out, math.prod(patch)))


def _leaves_forward_to(base: type[nn.Module], module: nn.Module) -> bool:
    """Whether a module's forward is that of its base class, or calls it."""
    forward = type(module).forward
    if forward is base.forward:
        return True
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and {"super", "forward"} <= set(code.co_names)


def _own(module: nn.Module) -> Miss:
    return Miss(f"of a {type(module).__name__}, which has a forward of its own", is_matmul=True)


def _conv1d() -> tuple[type, ...]:
    """GPT-2's linear; transformers is not imported to find out."""
    module = sys.modules.get("transformers.pytorch_utils")
    return () if module is None else (module.Conv1D,)


_EXPERTS = {"has_gate", "has_bias", "is_transposed", "is_concatenated"}
_LINEARS: tuple[tuple[tuple[type, ...], str | tuple[str, ...]], ...] = (
    ((nn.MultiheadAttention,), ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    ((nn.RNNBase, nn.RNNCellBase), "weight"),
)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_MISSES: tuple[tuple[tuple[type, ...], str | tuple[str, ...], Miss], ...] = (
    ((nn.Bilinear,), "weight", Miss("of a bilinear layer", is_matmul=True)),
    (_NORMS, "weight", Miss("norm weight or bias")),
    ((nn.EmbeddingBag,), "weight", Miss("look-up in bags of rows")),
)
