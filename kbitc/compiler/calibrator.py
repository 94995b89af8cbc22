"""What to calibrate a model on: the user's text, what the model itself samples, or random inputs.

The one thing to know: only a text file is data of the user's. Whatever is drawn has a random generator of
its own: the global one is never touched. What was measured is kept in the cache, so that another budget for
the same model begins at once.
"""

from __future__ import annotations

import contextlib
import copy
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
from kbitc.checkpoint.dense import token_ids, tokenizer_of
from kbitc.checkpoint.kept_tensors import read_tensors, write_tensors
from kbitc.checkpoint.tensor_digests import digest_of_tensors
from kbitc.compiler.sampling import SEED, sample_windows
from kbitc.compiler.stored_model import stored_model, widened
from kbitc.errors import BackendUnavailable, SourceError, UsageError, out_of_memory
from kbitc.graph.context import Progress, silent
from kbitc.graph.example_inputs import InputMaker, is_pretrained, tokens_before, tokens_of_media
from kbitc.graph.given_inputs import drawn_like, named_inputs
from kbitc.graph.input_shapes import Shape
from kbitc.graph.media_tokens import run_on_meta
from kbitc.graph.positions import usable_positions
from kbitc.sensitivity.losses import drawn_loss, next_token_loss
from kbitc.system.checksums import digest
from kbitc.version import VERSION

AUTO, SELF, RANDOM, NONE = "auto", "self", "random", "none"
COUNT = 16
LENGTH = 256
FORMAT = 6  # of what is kept: its layout, and how text is sampled and inputs are drawn
SPARING = (
    "calibrate on a text file (--calibrate TEXT) or not at all (--calibrate none), which read the model a "
    "weight at a time; or give the process more memory"
)

TEXT = {"input_ids", "attention_mask"}  # inputs that say no more than a text does

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
        inputs: the user's own, by name, that random inputs are to be like.
    """

    checkpoint: Checkpoint
    source: str | Path | Tensor = SELF
    on_progress: Progress = silent
    inputs: Mapping[str, Any] | None = None

    @property
    def label(self) -> str:
        """How reports call the text."""
        if isinstance(self.source, Tensor):
            return f"{self.source.shape[0]} windows of {self.source.shape[1]} given tokens"
        if self.inputs is not None:
            return f"{COUNT} random inputs like the given ones"
        length = window_length(self.checkpoint.skeleton())
        if self.source == RANDOM:
            return f"{COUNT} random inputs of up to {length} tokens"
        by = "that the model sampled itself" if self.source == SELF else f"of {Path(self.source).name}"
        return f"up to {COUNT} windows of {length} tokens {by}"

    @property
    def is_text(self) -> bool:
        """Whether inputs are text, whose next tokens are the outcomes; otherwise those are drawn."""
        return isinstance(self.source, Tensor) or self.source != RANDOM

    def feeds(self, count: int | None = None) -> list[dict[str, Any]]:
        """Keyword inputs, all of the same shapes; of batch 1 unless the user gave them.

        Args:
            count: of them at most; ``COUNT`` by default.

        Raises:
            UsageError: see :meth:`windows`, or a model whose inputs cannot be made.
        """
        model, generator = self.checkpoint.skeleton(), torch.Generator().manual_seed(SEED)
        count = COUNT if count is None else count
        if self.inputs is not None:
            return [drawn_like(self.inputs, generator) for _ in range(count)]
        if not self.is_text:
            maker = InputMaker.of(model, window_length(model))
            return [maker.draw(generator) for _ in range(count)]
        windows = self.windows(count)
        maker = InputMaker.of(model, windows.shape[1])
        return [maker.draw(generator, window[None]) for window in windows]

    def loss(self, feed: Mapping[str, Any], outputs: Sequence[Any], seed: int) -> Tensor:
        """What to take gradients of; see `kbitc.sensitivity.losses`."""
        model: Any = self.checkpoint.skeleton()
        if self.is_text:
            return next_token_loss(feed["input_ids"], outputs, not_text=tokens_of_media(model))
        classes = None
        if is_pretrained(model):
            classes = getattr(model.config.get_text_config(), "vocab_size", None)
        return drawn_loss(outputs, classes, torch.Generator().manual_seed(seed))

    def windows(self, count: int | None = None) -> Tensor:
        """``(count, length)`` int64 token ids; of a short text, or given, there may be fewer.

        Raises:
            UsageError: the text cannot be read, is too short, or there is no tokenizer for it.
        """
        count = COUNT if count is None else count
        if isinstance(self.source, Tensor):
            return self.source
        length = window_length(self.checkpoint.skeleton())
        if self.source == SELF:
            with out_of_memory("sampling text from the model", SPARING):
                model = stored_model(self.checkpoint, self.on_progress)
                with widened(model):
                    return sample_windows(model, length, count, on_progress=self.on_progress)
        tokenizer = tokenizer_of(self.checkpoint)
        if tokenizer is None:
            raise UsageError(
                f"--calibrate {self.source}: {self.checkpoint.label} has no tokenizer; give token ids "
                "(kbitc.compile(..., calibrate=ids)), or calibrate with 'self'"
            )
        text, model = _read(Path(self.source)), self.checkpoint.skeleton()
        return text_windows(tokenizer, text, length, count, label=str(self.source), model=model)

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
            text = digest_of_tensors({"ids": self.source})
        elif self.source in {SELF, RANDOM}:
            text = f"{self.source} {SEED}"
            text += "" if self.inputs is None else _digest_of_inputs(self.inputs)
        else:
            text = digest(_read(Path(self.source)).encode())
        parts = [self.checkpoint.fingerprint(), text, str(COUNT), str(LENGTH), options]
        # Sums of float32 differ in their last bits between machines and counts of threads.
        machine = f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
        parts += [str(FORMAT), VERSION, torch.__version__, machine]
        return digest("\0".join(parts).encode())[:24]


def make_calibrator(
    checkpoint: Checkpoint,
    calibrate: Calibrate,
    on_progress: Progress,
    *,
    is_wanted: bool,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
) -> Calibrator | None:
    """The calibrator that was asked for; None for none.

    Args:
        checkpoint: of the model.
        calibrate: the user's choice.
        on_progress: told of long work.
        is_wanted: what "auto" means: for a causal language model "self", for another model of transformers
            or one with example inputs "random"; or "none".
        example_inputs: the user's; where they are more than text, what random inputs are like.

    Raises:
        UsageError: text for a model that is no causal language model, random inputs for a module whose inputs
            nobody knows, or bad token ids.
    """
    model = checkpoint.skeleton()
    given = named_inputs(model, example_inputs)
    is_text = is_language_model(model) and (given is None or set(given) <= TEXT)
    if isinstance(calibrate, str) and calibrate == AUTO:
        known = RANDOM if given is not None or is_pretrained(model) else NONE
        calibrate = (SELF if is_text else known) if is_wanted else NONE
    if isinstance(calibrate, str) and calibrate == NONE:
        return None
    if isinstance(calibrate, str) and calibrate == RANDOM:
        if given is None and (example_inputs is not None or not is_pretrained(model)):
            raise UsageError(
                f"--calibrate random: {checkpoint.label} is not a model of transformers, or has inputs that "
                "are not plain tensors, so they cannot be made; give example_inputs={'name': tensor, ...}, "
                "or use --calibrate none"
            )
        return Calibrator(checkpoint, RANDOM, on_progress, given)
    if not is_text:
        raise UsageError(
            f"--calibrate: {checkpoint.label} is no causal language model of transformers, or is given other "
            "inputs than tokens, and calibration on text needs one; use --calibrate random"
        )
    if isinstance(calibrate, Tensor) and (calibrate.dim() != 2 or calibrate.dtype != torch.int64):
        raise UsageError(
            f"calibrate: expected int64 token ids of shape (windows, length), got {calibrate.dtype} of shape "
            f"{tuple(calibrate.shape)}"
        )
    return Calibrator(checkpoint, calibrate, on_progress)


def _digest_of_inputs(inputs: Mapping[str, Any]) -> str:
    """In their order, in which noise is drawn for them."""
    forms = [f"{name} {getattr(v, 'shape', v)} {getattr(v, 'dtype', '')}" for name, v in inputs.items()]
    held = {name: v for name, v in inputs.items() if isinstance(v, Tensor) and not v.is_meta}
    return digest("\n".join([*forms, digest_of_tensors(held)]).encode())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--calibrate {path}: cannot be read as UTF-8 text: {error}") from error


def window_length(model: nn.Module) -> int:
    """Tokens of a window of text: ``LENGTH``, or what the model can take if that is less."""
    longest = usable_positions(model)
    if longest is None:
        return LENGTH
    return min(LENGTH, max(1, longest - (tokens_before(model) if is_pretrained(model) else 0)))


def is_language_model(model: nn.Module) -> bool:
    """Whether it is a causal language model of transformers: tokens in, next-token logits out."""
    config: Any = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", lambda: False)
    if config is None or not is_pretrained(model) or getattr(config, "is_encoder_decoder", False):
        return False
    return bool(can_generate()) and hasattr(config.get_text_config(), "vocab_size") and _tells_tokens(model)


def _tells_tokens(model: Any) -> bool:
    """Whether its logits are of the tokens that it takes: what makes sound of text has them of codes."""
    outputs = run_on_meta(model, {"input_ids": Shape((1, 2), torch.int64)})
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        return model.get_output_embeddings() is not None  # it does not run on text alone
    taken = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return logits.shape[-1] in {model.config.get_text_config().vocab_size, taken}


def text_windows(
    tokenizer: Any,
    text: str,
    length: int,
    count: int,
    label: str = "the calibration text",
    model: nn.Module | None = None,
) -> Tensor:
    """``(count, length)`` token ids, evenly spread over a text.

    Raises:
        UsageError: the text is shorter than one window.
        SourceError: the tokenizer fails, or is not the model's, if that is given.
    """
    ids = token_ids(tokenizer, text, model)
    available = len(ids) // length
    if available == 0:
        raise UsageError(
            f"{label} has {len(ids)} tokens, fewer than one window of {length}; give a longer one"
        )
    picked = torch.arange(min(count, available)) * available // min(count, available)
    windows: Tensor = ids[: available * length].view(available, length)[picked]
    return windows
