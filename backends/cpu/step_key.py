"""What a decode step that is kept depends on, as a name for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbitc.backends._decoding.lifted import LiftedModel
from kbitc.cache import cache_folder
from kbitc.graph import matching, rewriting, weight_reads
from kbitc.pipeline import Pass
from kbitc.system.checksums import digest, digest_of_file
from kbitc.version import VERSION


def kept_folder() -> Path:
    """Where decode steps are kept, native and compiled ones."""
    return cache_folder() / "decode"


def step_key(
    model: Any,
    step: LiftedModel,
    state: dict[str, Tensor],
    passes: Sequence[Pass],
    files: Sequence[str],
    **more: Any,
) -> str:
    """A name for a model's architecture, formats and dtypes, and for the code that makes its step.

    Args:
        model: causal language model of transformers.
        step: the same, lifted.
        state: of ``step``.
        passes: that lower it.
        files: sources that decide what comes out, beside those of the passes.
        more: what else it depends on.
    """
    import transformers

    config = model.config.to_dict()
    # What says where a model came from; its tensors' dtypes and formats are listed below.
    for name in ("quantization_config", "_name_or_path", "architectures", "dtype", "transformers_version"):
        config.pop(name, None)
    paths = {id(module): path for path, module in model.named_modules()}
    places = [
        (
            *(
                paths[id(module)],
                leaf,
                names,
                str(weight.dtype),
                weight.is_transposed,
                weight.activations,
                weight.geometry,
            ),
            weight.operands().numbers,
        )
        for module, leaf, weight, names in step.places
    ]
    modules = [matching, weight_reads, rewriting, *(sys.modules[type(pass_).__module__] for pass_ in passes)]
    # A pass that was typed in has no file.
    sources = [file for module in modules if (file := getattr(module, "__file__", None))]
    facts = {
        "versions": [VERSION, torch.__version__, transformers.__version__, sys.version],
        "sources": [digest_of_file(Path(file)) for file in (*sources, *files, __file__)],
        "passes": [repr(pass_) for pass_ in passes],
        "model": [type(model).__name__, config, model.config._attn_implementation],
        "tensors": [(name, str(t.dtype), tuple(t.shape)) for name, t in state.items()],
        "places": places,
        **more,
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return f"{model.config.model_type}-{digest(text.encode())[:24]}"
