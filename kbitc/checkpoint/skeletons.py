"""From a transformers config to a model on the meta device: its shape without its memory.

The one thing to know: only classes of the installed transformers are built; code that lies in a
model folder is never run.
"""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint.names import tensor_of
from kbitc.checkpoint.room import Room
from kbitc.errors import SourceError, first_line

CODE_IS_NOT_RUN = "code that comes with a model is not run; use a model that transformers itself knows"


def load_config(folder: Path, label: str, *, gguf_file: str | None = None) -> Any:
    """The transformers config of a folder, or of a GGUF file in it.

    Raises:
        SourceError: the installed transformers cannot read it.
    """
    import transformers

    options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:
        raise SourceError(
            f"{label}: transformers cannot read the model's config: {first_line(error)}. "
            f"This is transformers {transformers.__version__}: install the version that the model "
            "was made with (code that comes with a model is not run)"
        ) from error
    _check_attention(config, label)
    return config


def _check_attention(config: Any, label: str) -> None:
    """An attention that is named like a repository is compiled code, which transformers would download."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    for part in (config, *inner):
        named = getattr(part, "_attn_implementation", None)
        if named is not None and (not isinstance(named, str) or "/" in named):
            raise SourceError(
                f"{label}: config.json names the attention '{named}', which is code that does not belong to "
                "transformers and is not run; remove 'attn_implementation' from it"
            )


def model_classes(config: Any, label: str) -> list[Any]:
    """Classes that the config may mean: the one it names as architecture, else guesses, best first.

    Raises:
        SourceError: transformers has no such class.
    """
    import transformers

    names = getattr(config, "architectures", None)
    if not names and (guesses := _guesses(config)):
        return guesses
    if not names:
        raise SourceError(
            f"{label}: the config does not say of which class the model is, and transformers has none for "
            f'the model_type \'{config.model_type}\' alone; add its class as "architectures": ["..."]'
        )
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{label}: 'architectures' in config.json is no list of names of classes: {names}")
    named = getattr(transformers, names[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return [named]
    if getattr(config, "auto_map", None):
        raise SourceError(
            f"{label}: '{names[0]}' is code that comes with the model, which kbitc does not run "
            "(trust_remote_code is off); use a model whose class is part of transformers, or build "
            "this one yourself and pass the module to kbitc.compile"
        )
    near = difflib.get_close_matches(names[0], dir(transformers), n=1)
    hint = f"; did you mean '{near[0]}'? Correct 'architectures' in config.json" if near else ""
    raise SourceError(
        f"{label}: transformers {transformers.__version__} has no model class '{names[0]}'{hint}, "
        "or install the version that the model was made with"
    )


def _guesses(config: Any) -> list[Any]:
    """Without ``architectures``: encoders are in the tables of masked and causal models alike."""
    import transformers
    from transformers.models.auto import modeling_auto

    tables = (
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    )
    names = [table[config.model_type] for table in tables if config.model_type in table]
    flat = [name if isinstance(name, str) else name[0] for name in names]
    return [getattr(transformers, name) for name in dict.fromkeys(flat)]


def build(
    model_class: Any, config: Any, label: str, room: Room, dtype: torch.dtype | None = None
) -> nn.Module:
    """A model on the meta device, tied, in eval mode.

    Raises:
        SourceError: the class does not take the config, or it is of a larger model than there is room for.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # an artifact's: the shape of the model is the source's
    try:
        with torch.device("meta"), room.bounded():
            model: Any = model_class._from_config(config, dtype=dtype or config.dtype or torch.float32)
            model.tie_weights()
    except Exception as error:
        raise SourceError(
            f"{label}: {model_class.__name__} cannot be built from the config: {first_line(error)}."
        ) from error
    skeleton: nn.Module = model.eval()
    return skeleton


def untie(model: nn.Module, name: str) -> None:
    """Give a tied name a parameter of its own, on the meta device."""
    path, _, leaf = name.rpartition(".")
    own = nn.Parameter(torch.empty_like(tensor_of(model, name)), requires_grad=False)
    setattr(model.get_submodule(path), leaf, own)
    known: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    known.pop(name, None)


def default_value(model: nn.Module, name: str) -> Tensor | None:
    """What the model's own initialization puts into a buffer or parameter, or None if it leaves that open.

    Older checkpoints lack buffers that the model sets by itself (BART's ``final_logits_bias``).
    Initialization runs twice on the tensor's module alone, over different contents: what it sets
    comes out equal, what it leaves alone or draws at random does not.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    initialize: Any = _model_around(model, path)._init_weights
    outcomes = []
    for content in (0, 1):
        twin = copy.copy(owner)
        twin._parameters = {k: _filled(p, content) for k, p in owner._parameters.items()}
        twin._buffers = {k: _filled(b, content) for k, b in owner._buffers.items()}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(content)  # what is drawn must not come out equal
            initialize(twin)
        outcome = {**twin._buffers, **twin._parameters}[leaf]
        assert outcome is not None
        outcomes.append(outcome)
    return outcomes[0].detach() if torch.equal(*outcomes) else None


def _model_around(model: nn.Module, path: str) -> nn.Module:
    """The innermost model that a module is or belongs to: each initializes its own modules."""
    around, inner = model, model
    for part in path.split(".") if path else ():
        inner = inner.get_submodule(part)
        around = inner if hasattr(inner, "_init_weights") else around
    return around


def _filled(tensor: Tensor | None, content: int) -> Any:
    if tensor is None:
        return None
    full = torch.full(tensor.shape, content, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(full, requires_grad=False) if isinstance(tensor, nn.Parameter) else full
