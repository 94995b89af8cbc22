"""`StepDecoder`: what decoders with a step of their own share, and how ``model.generate`` runs on it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.backends._decoding.cache import ROUND, GrowingCache
from kbitc.backends._decoding.decoder import Decoder, why_not
from kbitc.errors import UsageError
from kbitc.tensor.kbit_tensor import KbitTensor

# What a call of forward may say and still be the plain step.
PLAIN = {"input_ids", "past_key_values", "attention_mask", "position_ids", "cache_position"}
FLAGS = {"use_cache": True, "return_dict": True, "output_attentions": False, "output_hidden_states": False}


class StepDecoder(Decoder):
    """Decodes with a step of its own, into the cache that the model itself could go on with.

    Attributes:
        model: as given.
        reads_prompts: whether the step takes several tokens at once; else the model reads prompts.

    Raises:
        UsageError: not a causal language model on the CPU, with packed weights, whose layers have keys and
            values.
    """

    reads_prompts = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        reason = why_not(model) or _not_plain_cpu(model)
        if reason is not None:
            raise UsageError(f"the decode step cannot be compiled: {reason}; use the backend 'eager'")
        self._weights = _identities(model)

    @abstractmethod
    def _step(self, ids: Tensor, cache: GrowingCache) -> Tensor:
        """Append ``(1, tokens)`` to the cache; logits of the next token, ``(1, vocabulary)``."""

    def __deepcopy__(self, memo: dict[int, Any]) -> StepDecoder:
        """The same decoder: what was compiled cannot be copied."""
        return self

    def step(self, token: int, cache: Any) -> Tensor:
        """See `Decoder.step`."""
        return self._step(torch.tensor([[token]]), cache)

    def prefill(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """See `Decoder.prefill`."""
        if cache is not None and ids.shape == (1, 1) and cache.get_seq_length() > 0:
            return self._step(ids, cache), cache
        self._check_weights()
        if not self.reads_prompts:
            return super().prefill(ids, cache)
        cache = self.new_cache(ids.shape[1] + ROUND) if cache is None else cache
        return self._step(ids, cache), cache

    def _check_weights(self) -> None:
        if _identities(self.model) != self._weights:
            raise UsageError(
                "the model's parameters were replaced after its decode step was compiled; make a new "
                "decoder, or use the backend 'eager'"
            )

    def install(self) -> None:
        """Let ``model.generate`` run on the step, for one sequence without beams.

        Anything else (batches, beams, assistants, a cache of the caller's) runs as before, and so does a
        forward call that asks for more than logits. Tokens are the same either way.
        """
        model: Any = self.model
        plain_generate = type(model).generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            room = self._room(args, kwargs)
            if room is None:
                return plain_generate(model, *args, **kwargs)
            self._check_weights()
            with self._forward_replaced():
                return plain_generate(model, *args, **kwargs, past_key_values=self.new_cache(room))

        model.generate = generate

    def uninstall(self) -> None:
        """Undo ``install``."""
        vars(self.model).pop("generate", None)

    def _room(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Tokens that a call of generate may need; None if the call is not for the step."""
        config = kwargs.get("generation_config") or self.model.generation_config

        def option(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(config, name, None) if value is None else value

        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        is_one = isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[0] == 1 and ids.shape[1] > 0
        is_plain = (
            kwargs.get("past_key_values") is None
            and kwargs.get("inputs_embeds") is None
            and kwargs.get("assistant_model") is None
            and kwargs.get("custom_generate") is None
            and option("cache_implementation") is None
            and option("use_cache") is not False
            and option("prompt_lookup_num_tokens") is None
            and all(option(name) in (None, 1) for name in ("num_beams", "num_return_sequences"))
        )
        if not (is_one and is_plain):
            return None
        assert ids is not None
        new = option("max_new_tokens") or max((option("max_length") or 0) - ids.shape[1], 0)
        return int(ids.shape[1] + min(new, 1024))

    @contextmanager
    def _forward_replaced(self) -> Iterator[None]:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        model: Any = self.model
        plain_forward = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args or not self._takes(kwargs):
                return plain_forward(*args, **kwargs)
            cache = kwargs["past_key_values"]
            return CausalLMOutputWithPast(
                logits=self._step(kwargs["input_ids"], cache)[:, None],  # type: ignore[arg-type]
                past_key_values=cache,
            )

        had = vars(model).get("forward")
        model.forward = forward
        try:
            yield
        finally:
            if had is None:
                del model.forward
            else:
                model.forward = had

    def _takes(self, kwargs: dict[str, Any]) -> bool:
        """True if a call of forward is for the step: tokens after those in the cache, none of them masked."""
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if not isinstance(cache, GrowingCache) or ids is None or ids.dim() != 2 or ids.shape[0] != 1:
            return False
        seen, count = cache.get_seq_length(), ids.shape[1]
        if not self.reads_prompts and (count != 1 or seen == 0):
            return False
        if count > 1 and kwargs.get("logits_to_keep", 0) != 1:
            return False
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        return (
            (mask is None or (mask.shape == (1, seen + count) and bool(mask.all())))
            and (positions is None or positions.flatten().tolist() == list(range(seen, seen + count)))
            and all(
                value is None or name in PLAIN or name == "logits_to_keep" or value == FLAGS.get(name)
                for name, value in kwargs.items()
            )
        )


def _not_plain_cpu(model: nn.Module) -> str | None:
    tensors = [*model.parameters(), *model.buffers()]
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    if device is not None:
        return f"the model is on {device}, not on the CPU"
    if not any(isinstance(t, KbitTensor) for t in tensors):
        return "none of its weights is packed"
    return None


def _identities(model: nn.Module) -> tuple[tuple[str, int], ...]:
    return tuple((name, id(parameter)) for name, parameter in model.named_parameters())
