"""What to calibrate a model on: the user's text, what the model itself samples, or random inputs.

The one thing to know: only a text file is data of the user's. Whatever is drawn has a random generator of
its own: the global one is never touched. What was sampled and what was measured is kept in the cache, so that
another budget for the same model begins at once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kbitc.cache import cache_folder
from kbitc.checkpoint import Checkpoint
from kbitc.checkpoint.dense import tokenizer_of
from kbitc.checkpoint.tensor_digests import digest_of_tensors
from kbitc.compiler.calibration_text import (
    all_windows,
    is_language_model,
    read_text,
    spread,
    takes_text,
    with_decoder_text,
)
from kbitc.compiler.kept_results import kept
from kbitc.compiler.sampling import SEED, SamplingError, sample_windows
from kbitc.compiler.stored_model import stored_model, widened
from kbitc.errors import SourceError, UsageError, out_of_memory
from kbitc.graph.context import Progress, silent
from kbitc.graph.example_inputs import InputMaker, is_pretrained, tokens_before, tokens_of_media
from kbitc.graph.given_inputs import drawn_like, named_inputs
from kbitc.graph.input_shapes import Shape
from kbitc.graph.positions import usable_positions
from kbitc.sensitivity.losses import drawn_loss, next_token_loss
from kbitc.system.checksums import digest
from kbitc.system.memo import Memo
from kbitc.version import VERSION

AUTO, SELF, RANDOM, NONE = "auto", "self", "random", "none"
COUNT = 16
LENGTH = 256
SENTENCE = 64  # tokens of what an encoder is mostly given; of its windows one input has several,
SMALL = 50_000_000  # and of a model with no more parameters than that
MORE = 4  # times as many, which takes it no longer than a larger one
FORMAT = 8  # of what is kept: its layout, how text is sampled and inputs are drawn, and what sums are of
SPARING = (
    "calibrate on a text file (--calibrate TEXT) or not at all (--calibrate none), which read the model a "
    "weight at a time; or give the process more memory"
)

TEXT = {"input_ids", "attention_mask"}  # inputs that say no more than a text does

T = TypeVar("T")

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
        most: windows that will be asked for at most, ``COUNT`` by default. As many the model samples, once:
            who asks for fewer gets the first of them.
        is_default: the user asked for no source: where the model cannot sample text, inputs are random.
    """

    checkpoint: Checkpoint
    source: str | Path | Tensor = SELF
    on_progress: Progress = silent
    inputs: Mapping[str, Any] | None = None
    most: int | None = None
    is_default: bool = False
    _memo: Memo = field(default_factory=Memo, init=False, repr=False, compare=False)

    @cached_property
    def _used(self) -> str | Path | Tensor:
        """The source, or random inputs in place of text that the model cannot sample."""
        if self.is_default and not isinstance(self.source, Tensor) and self.source == SELF:
            try:
                self._sample(0)
            except SamplingError as error:
                _log.warning("%s. Calibrating on random inputs instead", error)
                return RANDOM
        return self.source

    @property
    def label(self) -> str:
        """How reports call the text."""
        source = self._used
        if isinstance(source, Tensor):
            return f"{source.shape[0]} windows of {source.shape[1]} given tokens"
        if self.inputs is not None:
            return f"{COUNT} random inputs like the given ones"
        if source == RANDOM:
            length = window_length(self.checkpoint.skeleton())
            why = "" if self.source == RANDOM else ", as the model cannot sample text"
            return f"{COUNT} random inputs of up to {length} tokens{why}"
        by = "that the model sampled itself" if source == SELF else f"of {Path(source).name}"
        return f"up to {COUNT * self._rows} windows of {self._length} tokens {by}"

    @property
    def is_text(self) -> bool:
        """Whether inputs are text; otherwise they are drawn."""
        return isinstance(self._used, Tensor) or self._used != RANDOM

    @cached_property
    def _is_causal(self) -> bool:
        return is_language_model(self.checkpoint.skeleton())

    def feeds(self, count: int | None = None) -> list[dict[str, Any]]:
        """Keyword inputs, all of the same shapes.

        Their batch is 1, but where the user gave inputs, and of an encoder, which gets several sentences.

        Args:
            count: of them at most; by default ``COUNT``, or all tokens that were given.

        Raises:
            UsageError: see :meth:`windows`, or a model whose inputs cannot be made.
        """
        model, generator = self.checkpoint.skeleton(), torch.Generator().manual_seed(SEED)
        number = COUNT if count is None else count
        if self.inputs is not None:
            return [drawn_like(self.inputs, generator) for _ in range(number)]
        if not self.is_text:
            maker = InputMaker.of(model, window_length(model))
            return [maker.draw(generator) for _ in range(number)]
        rows = self._rows
        windows = self.windows(count if rows == 1 else number * rows)
        if rows > 1:  # of a short text rather more inputs than rows
            rows = min(rows, max(1, len(windows) // number))
            windows = windows[: min(number, len(windows) // rows) * rows]
        maker = InputMaker.of(model, windows.shape[1])
        batches = windows.split(rows)
        return [with_decoder_text(model, _widened(maker.draw(generator, batch), rows)) for batch in batches]

    @cached_property
    def _length(self) -> int:
        """Tokens of a window of text."""
        model: Any = self.checkpoint.skeleton()
        longest = window_length(model)
        is_encoder = not self._is_causal and is_pretrained(model) and not model.config.is_encoder_decoder
        if not is_encoder:
            return longest
        others = {**InputMaker.of(model, longest).shapes}
        has_ids = others.pop("input_ids", None) is not None
        return min(SENTENCE, longest) if has_ids and all(map(_is_constant, others.values())) else longest

    @cached_property
    def _rows(self) -> int:
        """Windows of text in one input."""
        model = self.checkpoint.skeleton()
        whole = window_length(model)
        is_cut = not isinstance(self._used, Tensor) and self._used not in {SELF, RANDOM}
        if not is_cut or self._length == whole:
            return 1
        is_small = sum(parameter.numel() for parameter in model.parameters()) <= SMALL
        return (MORE if is_small else 1) * max(1, whole // self._length)

    def loss(self, feed: Mapping[str, Any], outputs: Sequence[Any], seed: int) -> Tensor:
        """What to take gradients of; see `kbitc.sensitivity.losses`."""
        model: Any = self.checkpoint.skeleton()
        if self.is_text and self._is_causal:
            return next_token_loss(feed["input_ids"], outputs, not_text=tokens_of_media(model))
        classes = None
        if is_pretrained(model):
            classes = getattr(model.config.get_text_config(), "vocab_size", None)
        return drawn_loss(outputs, classes, torch.Generator().manual_seed(seed))

    def windows(self, count: int | None = None) -> Tensor:
        """``(count, length)`` int64 token ids; of a short text, or given, there may be fewer.

        Without a count, ``COUNT``, or all that were given.

        Raises:
            UsageError: the text cannot be read, is too short, or there is no tokenizer for it.
            SamplingError: the model cannot sample text, which the user asked for.
        """
        if isinstance(self.source, Tensor):
            return self.source[:count]
        count = COUNT if count is None else count
        if self.source == SELF:
            return self._sample(count)
        return spread(self._cut, count)

    @cached_property
    def _cut(self) -> Tensor:
        """All windows of the text file."""
        tokenizer = tokenizer_of(self.checkpoint)
        if tokenizer is None:
            instead = "'self'" if self._is_causal else "'random'"
            raise UsageError(
                f"--calibrate {self.source}: {self.checkpoint.label} has no tokenizer; give token ids "
                f"(kbitc.compile(..., calibrate=ids)), or calibrate with {instead}"
            )
        assert not isinstance(self.source, Tensor)
        text, model, label = read_text(Path(self.source)), self.checkpoint.skeleton(), str(self.source)
        return all_windows(tokenizer, text, self._length, label, model, has_ends=not self._is_causal)

    def _sample(self, count: int) -> Tensor:
        """The first windows of all that the model samples, in this run or an earlier one."""
        from transformers import __version__ as transformers_version

        number, length = max(count, self._number()), window_length(self.checkpoint.skeleton())

        def made() -> Tensor:
            key = self._digest(f"text {SEED}", str(number), str(length), transformers_version)
            path = cache_folder() / "texts" / f"{key}.safetensors"
            return kept(
                path, lambda: {"ids": self._sample_anew(number, length)}, "Text that a model samples"
            )["ids"]

        return self.once(("sampled", number), made)[:count]

    def _number(self) -> int:
        return max(COUNT, self.most or 0)

    def _sample_anew(self, number: int, length: int) -> Tensor:
        with out_of_memory("sampling text from the model", SPARING):
            model = stored_model(self.checkpoint, self.on_progress)
            with widened(model):
                return sample_windows(model, length, number, on_progress=self.on_progress)

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

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """See `kbitc.graph.context.Calibration`."""
        return self._memo.once(key, make)

    def remembered(
        self, measure: Callable[[], Mapping[str, Tensor]], options: str = ""
    ) -> Mapping[str, Tensor]:
        """What an earlier run measured on the same model and text, or what ``measure`` gives, kept.

        ``options`` names whatever else the result depends on.
        """
        path = cache_folder() / "moments" / f"{self._key(options)}.safetensors"
        return kept(path, measure, "What calibration measures")

    def _key(self, options: str) -> str:
        source = self._used
        if isinstance(source, Tensor):
            text = digest_of_tensors({"ids": source})
        elif source in {SELF, RANDOM}:
            text = f"{source} {SEED}"
            text += f" of {self._number()}" if source == SELF and self._number() != COUNT else ""
            text += "" if self.inputs is None else _digest_of_inputs(self.inputs)
        else:
            text = digest(read_text(Path(source)).encode())
        return self._digest(text, str(COUNT), str(LENGTH), options)

    def _digest(self, *parts: str) -> str:
        """Of the source, of parts, and of all that else makes numbers differ."""
        # Sums of float32 differ in their last bits between machines.
        machine = torch.backends.cpu.get_cpu_capability()
        known = [self.checkpoint.fingerprint(), *parts, str(FORMAT), VERSION, torch.__version__, machine]
        return digest("\0".join(known).encode())[:24]


def make_calibrator(
    checkpoint: Checkpoint,
    calibrate: Calibrate,
    on_progress: Progress,
    *,
    is_wanted: bool,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    most: int | None = None,
) -> Calibrator | None:
    """The calibrator that was asked for; None for none.

    Args:
        checkpoint: of the model.
        calibrate: the user's choice.
        on_progress: told of long work.
        is_wanted: what "auto" means: for a causal language model "self" (random inputs where that fails), for
            another model of transformers or one with example inputs "random"; or "none".
        example_inputs: the user's; where they are more than text, what random inputs are like.
        most: inputs that a pass will ask for at most; see `Calibrator`.

    Raises:
        UsageError: text for a model that takes none, random inputs for a module whose inputs nobody knows, or
            bad token ids.
    """
    model = checkpoint.skeleton()
    given = named_inputs(model, example_inputs)
    is_text = is_language_model(model) and (given is None or set(given) <= TEXT)
    is_default = isinstance(calibrate, str) and calibrate == AUTO
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
        _check_text(checkpoint, calibrate, given)
    if isinstance(calibrate, Tensor) and (calibrate.dim() != 2 or calibrate.dtype != torch.int64):
        raise UsageError(
            f"calibrate: expected int64 token ids of shape (windows, length), got {calibrate.dtype} of shape "
            f"{tuple(calibrate.shape)}"
        )
    return Calibrator(checkpoint, calibrate, on_progress, most=most, is_default=is_default)


def _check_text(checkpoint: Checkpoint, calibrate: Calibrate, given: Mapping[str, Any] | None) -> None:
    """That a model which is no causal language model, or has inputs of its own, can have this text."""
    is_self = isinstance(calibrate, str) and calibrate == SELF
    if not is_self and (given is None or set(given) <= TEXT) and takes_text(checkpoint.skeleton()):
        return
    if is_self:
        lacks, wants = "is no causal language model of transformers", "no other samples text"
    else:
        lacks, wants = "takes no token ids (input_ids, as models of transformers)", "text has nothing else"
    raise UsageError(
        f"--calibrate: {checkpoint.label} {lacks}, or is given other inputs than tokens, and {wants}; use "
        "--calibrate random"
    )


def _digest_of_inputs(inputs: Mapping[str, Any]) -> str:
    """In their order, in which noise is drawn for them."""
    forms = [f"{name} {getattr(v, 'shape', v)} {getattr(v, 'dtype', '')}" for name, v in inputs.items()]
    held = {name: v for name, v in inputs.items() if isinstance(v, Tensor) and not v.is_meta}
    return digest("\n".join([*forms, digest_of_tensors(held)]).encode())


def _is_constant(shape: Shape) -> bool:
    """Whether an input is one number for each token: a mask, or types."""
    return shape.fill is not None and len(shape.sizes) == 2


def _widened(feed: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Inputs for so many windows where some are for one."""
    if rows == 1:
        return dict(feed)
    return {name: v if len(v) == rows else v.expand(rows, *v.shape[1:]).clone() for name, v in feed.items()}


def window_length(model: nn.Module) -> int:
    """Tokens of a window of text: ``LENGTH``, or what the model can take if that is less."""
    longest = usable_positions(model)
    if longest is None:
        return LENGTH
    return min(LENGTH, max(1, longest - (tokens_before(model) if is_pretrained(model) else 0)))
