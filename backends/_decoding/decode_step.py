"""The decode step of a causal language model as one flat graph of aten and ``kbit::`` calls.

before:  model(input_ids=token, past_key_values=cache), weights packed
after:   step(token, keys and values of every layer) -> logits; caches written in place

    token   (1, 1) int64
    keys    (L, heads, size) for each layer, L = tokens so far with this one: a dynamic dimension; the
            last row is written by the step. Values likewise.
    logits  (1, vocabulary)

The one thing to know: weights are lifted inputs of the graph under the names of ``TracedStep.state()``,
each packed tensor once however many weights share it; their data is never copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kbitc.backends._decoding.cache import GrowingCache
from kbitc.backends._decoding.decoder import layer_count
from kbitc.backends._decoding.lifted import LiftedModel
from kbitc.errors import UsageError
from kbitc.graph.positions import usable_positions
from kbitc.graph.program import Program, Stage
from kbitc.graph.tracing import export_program
from kbitc.pipeline import Pass
from kbitc.pipeline.defaults import lowering_pipeline
from kbitc.pipeline.manager import PassManager
from kbitc.pipeline.records import Fired, records

ATTENTION = "kbit_step"
EXAMPLE_LENGTH = 17


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one token: queries that share a head go together, so that no key is copied.

    query: (1, heads, 1, size); key, value: (1, key heads, tokens, size).
    """
    if options.get("position_bias") is not None or query.shape[2] != 1:
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return attended
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    out = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=options.get("scaling")
    )
    return out.reshape(query.shape[0], 1, query.shape[1], value.shape[3]), None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """None where one new token sees every other; the mask of a window or a pattern elsewhere."""
    is_plain = options.get("mask_function", causal_mask_function) is causal_mask_function
    if is_plain and options.get("local_size") is None and options.get("attention_mask") is None:
        return None
    mask: Tensor | None = sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})
    return mask


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)


class _TracedLayer(DynamicLayer):
    """Keys and values whose last row is to be written: the graph's inputs."""

    def __init__(self, key_rows: Tensor, value_rows: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.key_rows, self.value_rows = key_rows, value_rows
        self.dtype, self.device = key_rows.dtype, key_rows.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.key_rows.shape[0] - 1

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        states = []
        for rows, new in ((self.key_rows, key_states), (self.value_rows, value_states)):
            rows[-1:].copy_(new[0].transpose(0, 1))
            states.append(rows.transpose(0, 1).unsqueeze(0))
        return states[0], states[1]


class TracedStep(LiftedModel):
    """The module that is exported: the model without its packed weights, and their tensors as buffers."""

    def forward(self, ids: Tensor, rows: list[Tensor]) -> Tensor:
        """See the file's docstring."""
        layers: list[Any] = [_TracedLayer(*pair) for pair in zip(rows[::2], rows[1::2], strict=True)]
        with self.shown():
            out = self.model(input_ids=ids, past_key_values=Cache(layers=layers), use_cache=True)
        logits: Tensor = out.logits[:, -1]
        return logits

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Packed parameters away from the model, and attention of one token in it, for a while."""
        model: Any = self.model
        before = model.config._attn_implementation
        if before == "sdpa":
            model.set_attn_implementation(ATTENTION)
        try:
            with super().hidden():
                yield
        finally:
            if before == "sdpa":
                model.set_attn_implementation(before)


def export_step(
    model: nn.Module, passes: Sequence[Pass] | None = None
) -> tuple[ExportedProgram, dict[str, Fired]]:
    """Trace the step of a model with packed weights, and lower it.

    Args:
        model: causal language model of transformers, on the CPU; as before when this returns.
        passes: what runs on the traced graph; by default ``lowering_pipeline()``.

    Returns:
        The lowered step, and what the passes recorded.

    Raises:
        UsageError: it has layers without keys and values, or torch.export cannot trace it.
    """
    cache = GrowingCache(layer_count(model))
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64), past_key_values=cache, use_cache=True)
    if not all(layer.is_initialized for layer in cache.growing):
        raise UsageError(f"{type(model).__name__}: layers share keys and values")
    rows = [part.new_zeros(EXAMPLE_LENGTH, *part.shape[1:]) for part in cache.numbers()]
    longest = usable_positions(model)
    length = torch.export.Dim("length", min=2, max=max(longest or 2**20, EXAMPLE_LENGTH))
    step = TracedStep(model)
    inputs = (torch.zeros(1, 1, dtype=torch.int64), rows)
    shapes: Any = ({}, [{0: length} for _ in rows])
    with step.hidden():
        exported = export_program(step, inputs, dynamic_shapes=shapes)
    lifted = {
        spec.arg.name: spec.target for spec in exported.graph_signature.input_specs if spec.target is not None
    }
    program = Program(exported.graph_module, lifted, stage=Stage.PACKED)
    lowered = PassManager(lowering_pipeline() if passes is None else passes).run(program)
    exported.graph_module.graph = lowered.graph.graph
    exported.validate()
    return exported, records(lowered)
