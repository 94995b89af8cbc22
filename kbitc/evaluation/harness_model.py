"""`KbitLM`: whatever kbitc opens, as a model of lm-evaluation-harness; ``lm_eval --model kbitc`` finds it.

The one thing to know: it is the harness' own class for models of transformers, given a model that is open
already, so that log-likelihoods, rolling ones and generated text are computed as for any other model there.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype
from torch import Tensor, nn
from transformers import PreTrainedModel

from kbitc.errors import UsageError
from kbitc.evaluation.causality import check_causal
from kbitc.evaluation.opening import Loaded, need_tokenizer, open_model
from kbitc.graph.context import Progress, silent


class KbitLM(HFLM):
    """An artifact, or whatever source `kbitc.evaluation.opening.open_model` knows.

    Args:
        pretrained: an artifact, folder, GGUF file, hub id, or "demo".
        dtype: to compute in; "auto" is the model's own, float32 instead of float16.
        device: where to compute; what the command asks for by default is a GPU, and the CPU serves where
            there is none, as for the harness' own class.
        softmax_dtype: of log-probabilities: sums in bfloat16 would tie.
        options: of `lm_eval.models.huggingface.HFLM` that are not about loading, ``batch_size`` for example.

    Raises:
        SourceError: the source cannot be read, or has no tokenizer.
        UsageError: it is neither a causal language model nor an encoder-decoder, or an exported folder.
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
        wanted = get_dtype(dtype)
        loaded = open_model(pretrained, wanted if isinstance(wanted, torch.dtype) else None)
        place = "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device
        self._start(loaded, pretrained, device=place, softmax_dtype=softmax_dtype, **options)

    @classmethod
    def of(
        cls, loaded: Loaded, label: str = "the model", *, on_progress: Progress = silent, **options: Any
    ) -> KbitLM:
        """One around a model that is open already; ``on_progress`` takes the place of the harness' bars."""
        made = cls.__new__(cls)
        made._start(loaded, label, device="cpu", softmax_dtype="float32", **options)
        made._on_progress = on_progress
        return made

    _on_progress: Progress | None = None
    _done = _total = 0

    def _start(self, loaded: Loaded, label: str, *, device: str, softmax_dtype: str, **options: Any) -> None:
        model = loaded.model
        if not isinstance(model, PreTrainedModel):
            raise UsageError(
                f"{label}: is an exported folder or no model of transformers, which lm-evaluation-harness "
                "cannot run; give it the artifact that was exported"
            )
        if not model.config.is_encoder_decoder:
            check_causal(model, label)
        HFLM.__init__(
            self,
            pretrained=nn.Module.to(model, device),
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

    def _model_call(self, inps: Tensor, *rest: Any, **named: Any) -> Tensor:
        logits: Tensor = super()._model_call(inps, *rest, **named)
        if self._on_progress is not None:
            # Choices of one token share a row, so that there may be fewer of them than requests.
            self._done = min(self._done + len(inps), self._total)
            self._on_progress("scoring examples", self._done, self._total)
        return logits
