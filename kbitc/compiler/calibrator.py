"""What to calibrate a model on: the user's text, what the model itself samples, or random inputs.

The one thing to know: only a text file is data of the user's. Whatever is drawn has a random generator of
its own: the global one is never touched. What was measured is kept in the cache, so that another budget for
the same model begins at once.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.cache import cache_folder, check_private, make_private
from kbitc.checkpoint import Checkpoint
from kbitc.checkpoint.dense import dense_model, tokenizer_of
from kbitc.checkpoint.kept_tensors import read_tensors, write_tensors
from kbitc.errors import BackendUnavailable, SourceError, UsageError
from kbitc.graph.context import Progress, silent
from kbitc.graph.example_inputs import is_pretrained, random_inputs
from kbitc.sensitivity.losses import drawn_loss, next_token_loss
from kbitc.version import VERSION

AUTO, SELF, RANDOM, NONE = "auto", "self", "random", "none"
COUNT = 16
LENGTH = 256
SEED = 0
FORMAT = 3  # of what is kept
SMALL = 2 * 10**9  # bytes of a model that is sampled in float32

_log = logging.getLogger(__name__)

Calibrate = str | Path | Tensor
"""``"auto"``, ``"self"``, ``"random"``, ``"none"``, a UTF-8 text file, or ``(windows, length)`` token ids."""


@dataclass(frozen=True)
class Calibrator:
    """What a pass needs to measure moments: inputs, losses, and the model to run them through.

    Attributes:
        checkpoint: open while this is used.
        source: "self", "random", a text file, or token ids ``(windows, length)``.
        on_progress: told of the sampling.
    """

    checkpoint: Checkpoint
    source: str | Path | Tensor = SELF
    on_progress: Progress = silent

    @property
    def label(self) -> str:
        """How reports call the text."""
        if isinstance(self.source, Tensor):
            return f"{self.source.shape[0]} windows of {self.source.shape[1]} given tokens"
        length = window_length(self.checkpoint.skeleton())
        if self.source == RANDOM:
            return f"{COUNT} random inputs of up to {length} tokens"
        by = "that the model sampled itself" if self.source == SELF else f"of {Path(self.source).name}"
        return f"up to {COUNT} windows of {length} tokens {by}"

    @property
    def is_text(self) -> bool:
        """Whether inputs are text, whose next tokens are the outcomes; otherwise those are drawn."""
        return isinstance(self.source, Tensor) or self.source != RANDOM

    def feeds(self) -> list[dict[str, Tensor]]:
        """Keyword inputs of batch 1, all of the same shapes.

        Raises:
            UsageError: see :meth:`windows`, or a model whose inputs cannot be made.
        """
        if self.is_text:
            return [{"input_ids": window[None]} for window in self.windows()]
        model, generator = self.checkpoint.skeleton(), torch.Generator().manual_seed(SEED)
        return [random_inputs(model, window_length(model), generator) for _ in range(COUNT)]

    def loss(self, feed: Mapping[str, Tensor], outputs: Sequence[Any], seed: int) -> Tensor:
        """What to take gradients of; see `kbitc.sensitivity.losses`."""
        if self.is_text:
            return next_token_loss(feed["input_ids"], outputs)
        config: Any = self.checkpoint.skeleton().config
        classes = getattr(config.get_text_config(), "vocab_size", None)
        return drawn_loss(outputs, classes, torch.Generator().manual_seed(seed))

    def windows(self) -> Tensor:
        """``(count, length)`` int64 token ids.

        Raises:
            UsageError: the text cannot be read, is too short, or there is no tokenizer for it.
        """
        if isinstance(self.source, Tensor):
            return self.source
        length = window_length(self.checkpoint.skeleton())
        if self.source == SELF:
            self.on_progress("loading the model to sample from", 0, 0)
            size = sum(info.nbytes for info in self.checkpoint.tensors().values())
            # CPUs multiply float32 fastest; a large model keeps its own width for its memory's sake.
            model = dense_model(self.checkpoint, torch.float32 if size <= SMALL else None)
            return sample_windows(model, length, COUNT, on_progress=self.on_progress)
        tokenizer = tokenizer_of(self.checkpoint)
        if tokenizer is None:
            raise UsageError(
                f"--calibrate {self.source}: {self.checkpoint.label} has no tokenizer; give token ids "
                "(kbitc.compile(..., calibrate=ids)), or calibrate with 'self'"
            )
        return text_windows(tokenizer, _read(Path(self.source)), length, COUNT, label=str(self.source))

    def skeleton(self) -> nn.Module:
        """See `kbitc.graph.context.Calibration`."""
        return copy.deepcopy(self.checkpoint.skeleton()).float()

    def read(self, name: str) -> Tensor:
        """A parameter or buffer, those included that no checkpoint holds."""
        if name in self.checkpoint.tensors():
            return self.checkpoint.read(name)
        buffer = self.checkpoint.transient(name)
        if buffer is None:
            raise SourceError(
                f"{self.checkpoint.label}: the value of the buffer '{name}' is not known without running the "
                "model's own set-up; calibrate with 'none'"
            )
        return buffer

    def remembered(
        self, measure: Callable[[], Mapping[str, Tensor]], options: str = ""
    ) -> Mapping[str, Tensor]:
        """What an earlier run measured on the same model and text, or what ``measure`` gives, kept.

        ``options`` names whatever else the result depends on.
        """
        path = cache_folder() / "moments" / f"{self._key(options)}.safetensors"
        try:
            make_private(path.parent)
            if path.exists():
                check_private(path)
                with contextlib.suppress(SourceError):  # damaged: it is measured and written again
                    return read_tensors(path)
        except (OSError, BackendUnavailable) as error:
            _log.warning("%s. What calibration measures is not kept", error)
            return measure()
        measured = measure()
        # A cache that cannot be written costs time, nothing else.
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            scratch = Path(folder) / path.name
            write_tensors(measured, scratch)
            scratch.chmod(0o600)
            scratch.replace(path)
        return measured

    def _key(self, options: str) -> str:
        if isinstance(self.source, Tensor):
            text = hashlib.sha256(self.source.contiguous().numpy().tobytes()).hexdigest()
        elif self.source in {SELF, RANDOM}:
            text = f"{self.source} {SEED}"
        else:
            text = hashlib.sha256(_read(Path(self.source)).encode()).hexdigest()
        parts = [self.checkpoint.fingerprint(), text, str(COUNT), str(LENGTH), options]
        # Sums of float32 differ in their last bits between machines and counts of threads.
        machine = f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
        parts += [str(FORMAT), VERSION, torch.__version__, machine]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def make_calibrator(
    checkpoint: Checkpoint, calibrate: Calibrate, on_progress: Progress, *, is_wanted: bool
) -> Calibrator | None:
    """The calibrator that was asked for; None for none.

    Args:
        checkpoint: of the model.
        calibrate: the user's choice.
        on_progress: told of long work.
        is_wanted: what "auto" means: for a causal language model "self", for another model of transformers
            "random"; or "none".

    Raises:
        UsageError: text for a model that is no causal language model, random inputs for a module that
            transformers does not know, or bad token ids.
    """
    model = checkpoint.skeleton()
    if isinstance(calibrate, str) and calibrate == AUTO:
        known = RANDOM if is_pretrained(model) else NONE
        calibrate = (SELF if is_language_model(model) else known) if is_wanted else NONE
    if isinstance(calibrate, str) and calibrate == NONE:
        return None
    if isinstance(calibrate, str) and calibrate == RANDOM:
        if not is_pretrained(model):
            raise UsageError(
                f"--calibrate random: {checkpoint.label} is not a model of transformers, so its inputs "
                "cannot be made; use --calibrate none"
            )
        return Calibrator(checkpoint, RANDOM, on_progress)
    if not is_language_model(model):
        raise UsageError(
            f"--calibrate: {checkpoint.label} is no causal language model of transformers, which is what "
            "calibration on text needs; use --calibrate random"
        )
    if isinstance(calibrate, Tensor) and (calibrate.dim() != 2 or calibrate.dtype != torch.int64):
        raise UsageError(
            f"calibrate: expected int64 token ids of shape (windows, length), got {calibrate.dtype} of shape "
            f"{tuple(calibrate.shape)}"
        )
    return Calibrator(checkpoint, calibrate, on_progress)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--calibrate {path}: cannot be read as UTF-8 text: {error}") from error


def window_length(model: nn.Module) -> int:
    """Tokens of a window: ``LENGTH``, or what the model can take if that is less."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(LENGTH, longest) if longest else LENGTH


def is_language_model(model: nn.Module) -> bool:
    """Whether it is a causal language model of transformers: tokens in, next-token logits out."""
    config: Any = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", lambda: False)
    is_pair = getattr(config, "is_encoder_decoder", False)
    return config is not None and not is_pair and bool(can_generate()) and hasattr(config, "vocab_size")


def text_windows(
    tokenizer: Any, text: str, length: int, count: int, label: str = "the calibration text"
) -> Tensor:
    """``(count, length)`` token ids, evenly spread over a text.

    Raises:
        UsageError: the text is shorter than one window.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    available = len(ids) // length
    if available == 0:
        raise UsageError(
            f"{label} has {len(ids)} tokens, fewer than one window of {length}; give a longer one"
        )
    picked = torch.arange(min(count, available)) * available // min(count, available)
    windows: Tensor = ids[: available * length].view(available, length)[picked]
    return windows


@torch.no_grad()  # not inference_mode: autograd will look at what was sampled
def sample_windows(
    model: nn.Module,
    length: int,
    count: int,
    seed: int = SEED,
    on_progress: Progress = silent,
) -> Tensor:
    """``(count, length)`` token ids that the model samples at temperature 1, from random first tokens.

    Args:
        model: a causal language model of transformers.
        length: tokens a window.
        count: windows.
        seed: of a generator of its own.
        on_progress: told of each token.
    """
    from transformers import DynamicCache

    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.get_text_config().vocab_size, (count, 1), generator=generator)
    cache, ids = DynamicCache(), [tokens]
    for i in range(1, length):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        tokens = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        ids.append(tokens)
        on_progress("sampling text", i + 1, length)
    return torch.cat(ids, dim=1)
