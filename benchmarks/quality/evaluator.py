"""The one evaluator: any tool's dequantized weights in one float32 model, scored window by window.

The one thing to know: the 16-bit model's log-probabilities are computed once a text and lie in a file that is
memory-mapped, 4 bytes for each token and word of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from kbitc.errors import UsageError
from kbitc.evaluation.opening import open_model


@dataclass(frozen=True)
class Scores:
    """Of one model on one text, a figure a window, in nats per token.

    Attributes:
        loss: mean negative log-likelihood.
        divergence: mean KL divergence from the 16-bit model.
    """

    loss: list[float]
    divergence: list[float]

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss; all windows are of one length."""
        return float(np.exp(np.mean(self.loss)))

    @property
    def mean_divergence(self) -> float:
        """KL divergence over all tokens."""
        return float(np.mean(self.divergence))


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy dense weights into a model's parameters.

    Raises:
        UsageError: a name or shape that the model does not have, or a value that is not finite.
    """
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        if name not in parameters:
            raise UsageError(f"{name}: the model has no such parameter")
        if parameters[name].shape != weight.shape:
            expected, got = tuple(parameters[name].shape), tuple(weight.shape)
            raise UsageError(f"{name}: expected shape {expected}, got {got}")
        if not weight.isfinite().all():
            raise UsageError(f"{name}: has values that are not finite")
        parameters[name].data.copy_(weight)


@dataclass
class Evaluator:
    """Scores weights on texts.

    Attributes:
        model: source folder.
        texts: ``(windows, context)`` token ids by label.
        folder: for the reference's log-probabilities.
        keys: what identifies the model and a text, by label.
    """

    model: str
    texts: Mapping[str, Tensor]
    folder: Path
    keys: Mapping[str, str]
    _references: dict[str, Any] = field(default_factory=dict)

    def reference(self, label: str) -> Any:
        """Log-probabilities of the 16-bit model, ``(windows, context - 1, vocabulary)`` float32."""
        if label not in self._references:
            file = self.folder / f"reference-{self.keys[label]}.npy"
            if not file.exists():
                _write_reference(open_model(self.model, torch.float32).model, self.texts[label], file)
            self._references[label] = np.load(file, mmap_mode="r")
        return self._references[label]

    def score(self, weights: Mapping[str, Tensor], labels: Sequence[str]) -> dict[str, Scores]:
        """Put weights into a fresh float32 model; score it on each text."""
        model = open_model(self.model, torch.float32).model
        put_weights(model, weights)
        return {label: score_windows(model, self.texts[label], self.reference(label)) for label in labels}


def score_windows(model: nn.Module, ids: Tensor, reference: Any) -> Scores:
    """Loss and divergence of each window.

    Args:
        model: causal language model.
        ids: ``(windows, context)`` int64.
        reference: log-probabilities ``(windows, context - 1, vocabulary)``.
    """
    scores = Scores([], [])
    for window, row in zip(ids, reference, strict=True):
        found = log_probs(model, window)
        wanted = torch.from_numpy(np.array(row))
        scores.loss.append(-float(found.gather(-1, window[1:, None]).double().mean()))
        scores.divergence.append(float((wanted.exp() * (wanted - found)).double().sum()) / len(found))
    return scores


@torch.inference_mode()
def log_probs(model: nn.Module, window: Tensor) -> Tensor:
    """Float32 log-probabilities of the next token, ``(context - 1, vocabulary)``."""
    logits: Tensor = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


def _write_reference(model: nn.Module, ids: Tensor, file: Path) -> None:
    partial, out = file.with_suffix(".partial"), None
    for index, window in enumerate(ids):
        found = log_probs(model, window).numpy()
        if out is None:
            out = open_memmap(partial, "w+", np.float32, (len(ids), *found.shape))
        out[index] = found
    assert out is not None
    out.flush()
    partial.replace(file)
