"""Inputs that a model's own documentation gives the shape of, where their names say nothing to kbitc.

before:  states (`torch.Tensor` of shape `(batch_size, episode_length, state_dim)`):
after:   states: (2, 8, 17)    state_dim is a number of the config

The one thing to know: transformers documents forward's parameters in this form and names sizes as its configs
do; what a model cannot do without is not called optional there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

import torch

from kbitc.graph.input_shapes import SHAPES, Asked, Shape

_LINE = re.compile(
    r"^ *(?P<name>\w+) \((?P<kind>.*?) of shape `?\((?P<sizes>[^)]*)\)`?(?P<rest>.*)$", re.MULTILINE
)
_WHOLE = ("LongTensor", "IntTensor", "int64")


def documented_inputs(asked: Asked) -> Mapping[str, Shape]:
    """What forward's documentation calls for beyond what `kbitc.graph.input_shapes` knows, by name."""
    found = {}
    for line in _LINE.finditer(inspect.getdoc(asked.model.forward) or ""):
        name = line["name"]
        is_called_for = name in asked.required or "optional" not in line["rest"]
        if not is_called_for or name not in asked.accepted or name in SHAPES or "label" in name:
            continue
        sizes = [size.strip().removeprefix("config.") for size in line["sizes"].split(",") if size.strip()]
        is_whole = any(kind in line["kind"] for kind in _WHOLE)
        dtype, fill = (torch.int64, 0) if is_whole else (torch.float32, None)
        found[name] = Shape(tuple(_size(asked, size) for size in sizes), dtype, fill)
    return found


def _size(asked: Asked, size: str) -> int:
    if size.isdecimal():
        return int(size)
    if size.startswith("batch"):
        return asked.batch
    stated = asked.get(size) if size.isidentifier() else None
    return stated if isinstance(stated, int) else asked.length
