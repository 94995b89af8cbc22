"""`KbitLM`: whatever kbitc opens, as a model of lm-evaluation-harness; ``lm_eval --model kbitc`` finds it.

The one thing to know: it is the harness' own class for models of transformers, given a model that is open
already, so that log-likelihoods, rolling ones and generated text are computed as for any other model there.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype
from torch import Tensor
from transformers import PreTrainedModel

from kbitc.checkpoint.skeletons import CODE_IS_NOT_RUN
from kbitc.errors import UsageError, did_you_mean
from kbitc.evaluation.causality import check_causal
from kbitc.evaluation.opening import Loaded, need_tokenizer, open_model
from kbitc.graph.context import Progress, silent

OPTIONS = (
    "backend",
    "batch_size",
    "max_batch_size",
    "max_length",
    "mixed_precision_dtype",
    "truncation",
    "logits_cache",
    "add_bos_token",
    "prefix_token_id",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
"""Of the harness' class, which would ignore those about loading: that is ours."""


class KbitLM(HFLM):
    """An artifact, or whatever source `kbitc.evaluation.opening.open_model` knows.

    Args:
        pretrained: an artifact, folder, GGUF file, hub id, or "demo".
        dtype: to compute in; "auto" is the model's own, float32 instead of float16.
        device: where to compute; what the command asks for by default is a GPU, and the CPU serves where
            there is none, as for the harness' own class.
        softmax_dtype: of log-probabilities: sums in bfloat16 would tie.
        options: those of `lm_eval.models.huggingface.HFLM` in `OPTIONS`.

    Raises:
        SourceError: the source cannot be read, or has no tokenizer.
        UsageError: another option, a model that is neither a causal language model nor an encoder-decoder, or
            an exported folder.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        softmax_dtype: str = "float32",
        **options: Any,
    ) -> None:
        _check_options(options)
        wanted = get_dtype(dtype)
        loaded = open_model(pretrained, wanted if isinstance(wanted, torch.dtype) else None)
        place = "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device
        self._start(loaded, pretrained, device=place, softmax_dtype=softmax_dtype, **options)

    @classmethod
    def of(
        cls, loaded: Loaded, label: str = "the model", *, on_progress: Progress = silent, **options: Any
    ) -> KbitLM:
        """One around a model that is open already; ``on_progress`` takes the place of the harness' bars."""
        _check_options(options)
        made = cls.__new__(cls)
        made._start(loaded, label, device="cpu", softmax_dtype="float32", **options)
        made._on_progress = on_progress
        return made

    cut = 0
    """Prompts so far that were longer than the model's positions, and were cut at their beginning."""

    _on_progress: Progress | None = None
    _done = _total = 0

    def _start(self, loaded: Loaded, label: str, *, device: str, softmax_dtype: str, **options: Any) -> None:
        model: Any = loaded.model
        is_transformers = isinstance(model, PreTrainedModel)
        if not is_transformers:
            raise UsageError(
                f"{label}: is an exported folder or no model of transformers, which lm-evaluation-harness "
                "cannot run; give it the artifact that was exported"
            )
        if not model.config.is_encoder_decoder:
            check_causal(model, label)
        HFLM.__init__(
            self,
            pretrained=model.to(device),
            tokenizer=need_tokenizer(loaded, label),
            softmax_dtype=softmax_dtype,
            **options,
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The harness' own, told of to whom it was said."""
        self._done, self._total = 0, len(requests)
        found: list[tuple[float, bool]] = super().loglikelihood(
            requests, disable_tqdm=disable_tqdm or self._on_progress is not None
        )
        return found

    def _loglikelihood_tokens(
        self, requests: list[Any], *rest: Any, **named: Any
    ) -> list[tuple[float, bool]]:
        self.cut += sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests)
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *rest, **named)
        return found

    def _model_call(self, inps: Tensor, *rest: Any, **named: Any) -> Tensor:
        logits: Tensor = super()._model_call(inps, *rest, **named)
        if self._on_progress is not None:
            # Choices of one token share a row, so that there may be fewer of them than requests.
            self._done = min(self._done + len(inps), self._total)
            self._on_progress("scoring examples", self._done, self._total)
        return logits


def _check_options(options: dict[str, Any]) -> None:
    """See that options mean something; that of the command to run a model's own code is taken out."""
    if options.pop("trust_remote_code", False):
        raise UsageError(f"trust_remote_code: {CODE_IS_NOT_RUN}")
    unknown = next((name for name in options if name not in OPTIONS), None)
    if unknown is not None:
        known = ("pretrained", "dtype", "device", "softmax_dtype", *OPTIONS)
        raise UsageError(f"--model_args: {did_you_mean('option of the model kbitc', unknown, known)}")
