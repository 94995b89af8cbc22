"""A causal language model's way from some tokens to logits, as one flat graph without its key-value cache.

before:  model(input_ids=tokens, past_key_values=cache), weights packed
after:   step(ids, positions) -> logits; what goes into the cache passes ``kbit::cached``, attention is
         ``kbit::attend``

    ids, positions   (1, N) int64, N a dynamic dimension
    logits           (1, N, vocabulary)

The one thing to know: in this graph every value has one row for each token, whatever sequence it belongs to.
Which keys a token sees is no part of it: whoever runs the graph keeps them, of each sequence its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import causal_mask_function

from kbitc.backends._decoding.lifted import LiftedModel
from kbitc.errors import UsageError
from kbitc.graph.tracing import export_program

ATTENTION = "kbit_tokens"
EXAMPLE_TOKENS = 5
MOST_TOKENS = 1 << 20
EVERY = 0  # the window of attention to all tokens before


@torch.library.custom_op("kbit::cached", mutates_args=())
def cached(states: Tensor, slot: int) -> Tensor:
    """Keys or values of some tokens, ``(1, heads, N, size)``, on their way into a cache's slot."""
    del slot
    return states.clone()


@cached.register_fake
def _(states: Tensor, slot: int) -> Tensor:
    del slot
    return torch.empty_like(states)


@torch.library.custom_op("kbit::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, cap: float) -> Tensor:
    """``(1, N, heads, size)``: attention of ``(1, heads, N, size)`` queries to a sequence's tokens so far.

    Args:
        query: of N tokens.
        key: what `cached` gave of these tokens; heads divide those of ``query``.
        value: likewise.
        scale: of the products.
        window: tokens that one sees, itself included; ``EVERY`` for all.
        cap: c of ``c tanh(product / c)``; 0 for none.
    """
    raise NotImplementedError("this call is a graph's; it has no cache to run on")


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, cap: float) -> Tensor:
    del key, scale, window, cap
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    del module
    for name in ("position_bias", "s_aux", "head_mask"):
        if options.get(name) is not None:
            raise UsageError(f"attention with {name}")
    scale = options.get("scaling")
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    # The mask that `_mask` makes has the window as its last dimension.
    window = EVERY if attention_mask is None else attention_mask.shape[-1]
    cap = float(options.get("softcap") or 0.0)
    return torch.ops.kbit.attend(query, key, value, scale, window, cap), None


def _mask(*_: Any, **options: Any) -> Tensor | None:
    """None where a token sees every one before; for a window something that says how long it is.

    Raises:
        UsageError: any other pattern.
    """
    if options.get("attention_mask") is not None:
        raise UsageError("a mask of its own")
    sees = options.get("mask_function", causal_mask_function)
    if sees is causal_mask_function:
        return None
    window = options.get("local_size")
    if not isinstance(window, int) or not _is_window(sees, window):
        raise UsageError("attention to a pattern of tokens that is neither all before nor a window")
    return torch.empty(1, 1, 1, window, device="meta")


def _is_window(sees: Callable[..., Any], window: int) -> bool:
    """Whether a mask function lets a token see itself and the ``window - 1`` tokens before it."""
    spots = sorted({0, 1, window - 1, window, window + 1, 2 * window, 3 * window + 1})
    with _disable_current_modes():  # these are questions, and no part of the graph
        zero = torch.tensor(0)
        return all(
            bool(sees(zero, zero, torch.tensor(q), torch.tensor(k))) == (q - window < k <= q)
            for q in spots
            for k in {k for spot in (0, q, q - window) for k in (spot - 1, spot, spot + 1) if k >= 0}
        )


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)


class _NamedLayer(DynamicLayer):
    """A cache of nothing: what goes in comes out, marked with its slot."""

    def __init__(self, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        key = torch.ops.kbit.cached(key_states, 2 * self.index)
        value = torch.ops.kbit.cached(value_states, 2 * self.index + 1)
        return key, value


class TracedTokens(LiftedModel):
    """The module that is exported.

    Attributes:
        layers: how many have keys and values.
    """

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__(model)
        self.layers = layers

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """See the file's docstring."""
        layers: list[Any] = [_NamedLayer(index) for index in range(self.layers)]
        with self.shown():
            out = self.model(
                input_ids=ids, position_ids=positions, past_key_values=Cache(layers=layers), use_cache=True
            )
        logits: Tensor = out.logits
        return logits

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Packed parameters away from the model, and attention as a call of the graph, for a while."""
        model: Any = self.model
        before = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION)
        try:
            with super().hidden():
                yield
        finally:
            model.set_attn_implementation(before)


def export_tokens(model: nn.Module, layers: int) -> tuple[ExportedProgram, dict[str, Tensor]]:
    """Trace a model with packed weights.

    Args:
        model: causal language model of transformers, on the CPU; as before when this returns.
        layers: that have keys and values.

    Returns:
        The graph, and every tensor that it reads, by its name there.

    Raises:
        UsageError: its attention is none that `attend` can say.
    """
    traced = TracedTokens(model, layers)
    ids = torch.zeros(1, EXAMPLE_TOKENS, dtype=torch.int64)
    positions = torch.arange(EXAMPLE_TOKENS)[None]
    count = torch.export.Dim("count", min=2, max=MOST_TOKENS)
    with traced.hidden():
        exported = export_program(traced, (ids, positions), dynamic_shapes=({1: count}, {1: count}))
    made = {name: value for name, value in exported.constants.items() if isinstance(value, Tensor)}
    return exported, {**made, **traced.state()}
