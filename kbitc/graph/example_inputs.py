"""Inputs to trace and measure a transformers model with: sizes from its config, values drawn.

The one thing to know: nothing here knows a model by its name. Forward's signature says what is asked for,
`kbitc.graph.input_shapes` what that may look like, and the model's own skeleton, run on the meta device,
which of several shapes fits and how many tokens an image or a sound takes among the text's.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.errors import UsageError
from kbitc.graph.documented_inputs import documented_inputs
from kbitc.graph.input_shapes import SHAPES, Asked, Shape
from kbitc.graph.media_tokens import (
    STOPPED,
    TYPES,
    media_of,
    run_on_meta,
    special_ids,
    stand_ins,
    towers,
    with_tokens,
)

BATCH = 2
TOKENS = 8
INSTEAD = {"inputs": ("input_ids", "pixel_values")}  # names under which a main input may also come


class UnknownInputError(UsageError):
    """An input that a transformers model takes cannot be made; ``name`` is the input's."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__(
            f"{type(model).__name__} takes '{name}', which cannot be made from its config; pass "
            "example_inputs={'name': tensor, ...} (kbitc compile --example-inputs FILE) with everything that "
            "its forward needs"
        )
        self.name = name


def is_pretrained(module: nn.Module) -> bool:
    """True for a transformers model; does not import transformers to find out."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def example_inputs(model: nn.Module, batch: int = BATCH, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Keyword inputs on the CPU for a transformers model, with values that it can run on.

    Args:
        model: of transformers, on any device; not changed.
        batch: sequences, images, sounds or series.
        tokens: of a sequence, at most as many as the model takes; a decoder gets one less. Tokens that stand
            for an image or a sound come before them.

    Raises:
        UnknownInputError: an input of it cannot be made.
        UsageError: not a transformers model.
    """
    made = InputMaker.of(model, tokens, batch).draw(torch.Generator().manual_seed(0))
    dtype = getattr(model, "dtype", torch.float32)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}


@dataclass(frozen=True)
class InputMaker:
    """Keyword inputs of a model, to be drawn any number of times.

    Attributes:
        asked: the model and sizes.
        shapes: of its inputs, by name.
        before: tokens before the text: those that stand for images and sounds, and those around them.
    """

    asked: Asked
    shapes: Mapping[str, Shape]
    before: Sequence[int] = ()

    @staticmethod
    def of(model: nn.Module, tokens: int, batch: int = 1) -> InputMaker:
        """What a model is to be given; see :func:`example_inputs`."""
        asked = _asked(model, batch, tokens)
        shapes, before = _fitting(asked, *_names(asked)), []
        for media in media_of(asked):
            found = with_tokens(asked, media)
            if found is not None:  # without it the text alone is an input of the model, too
                shapes |= found[0]
                before += found[1]
        return InputMaker(asked, shapes, before)

    def draw(self, generator: torch.Generator, text: Tensor | None = None) -> dict[str, Tensor]:
        """Inputs: token ids drawn evenly from the vocabulary, floats in float32 from a normal law.

        before:  input_ids (batch, 8) of text
        after:   input_ids (batch, 4 + 8) of 4 image tokens and the text; pixel_values; types, 1 for images

        Args:
            generator: draws.
            text: ``(batch, length)`` int64 token ids to take for the text.

        Raises:
            UsageError: a token of the text stands for an image or a sound, beside those that are given.
        """
        made = {name: self._drawn(shape, generator) for name, shape in self.shapes.items()}
        if text is not None:
            made["input_ids"] = text
            held = torch.isin(text, torch.tensor(stand_ins(self.asked), dtype=torch.int64))
            if self.before and bool(held.any()):
                raise UsageError(
                    f"the text holds token {int(text[held][0])}, which stands for a piece of an image or a "
                    "sound; give text without it"
                )
        if self.before:
            ids = made["input_ids"]
            made["input_ids"] = torch.cat([torch.tensor(self.before).expand(len(ids), -1), ids], dim=1)
            stand_in = torch.isin(made["input_ids"], torch.tensor(stand_ins(self.asked))).long()
            made |= {name: stand_in for name in TYPES if name in self.asked.accepted}
        return made

    def _drawn(self, shape: Shape, generator: torch.Generator) -> Tensor:
        if shape.fill is not None:
            return torch.tensor(shape.fill, dtype=shape.dtype).expand(shape.sizes).clone()
        if shape.dtype.is_floating_point:
            return torch.randn(shape.sizes, generator=generator)
        vocabulary = self.asked.vocabulary
        ids = torch.randint(vocabulary, shape.sizes, generator=generator)
        return as_text(ids, special_ids(self.asked), vocabulary)


def as_text(ids: Tensor, special: Sequence[int], vocabulary: int) -> Tensor:
    """Token ids with the next id for each that stands for an image or a sound, or around one."""
    taken = torch.tensor(special, dtype=torch.int64)
    while bool((hits := torch.isin(ids, taken)).any()):
        ids = torch.where(hits, (ids + 1) % vocabulary, ids)
    return ids


def tokens_before(model: nn.Module) -> int:
    """How many tokens of example inputs stand for an image or a sound, before the text."""
    return len(InputMaker.of(model, TOKENS).before)


def tokens_of_media(model: nn.Module) -> list[int]:
    """Ids of the tokens that stand for images and sounds, or around them, and are no text."""
    return special_ids(_asked(model, 1, TOKENS))


def _asked(model: nn.Module, batch: int, tokens: int) -> Asked:
    if not is_pretrained(model):
        raise UsageError(
            f"{type(model).__name__} is not a transformers model, so its inputs cannot be guessed; pass "
            "example_inputs=(tensor, ...) or example_inputs={'name': tensor}; only shapes matter"
        )
    accepted = inspect.signature(model.forward).parameters
    required = [
        parameter.name
        for parameter in accepted.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    return Asked(model, frozenset(accepted), frozenset(required), batch, tokens)


def _names(asked: Asked) -> tuple[list[str], dict[str, Shape]]:
    """What the model is to be given beside images and sounds among its tokens, in the order of the table.

    The second value is what it can be given besides, as documented; it must be, where the first is empty.

    Raises:
        UnknownInputError: something among it cannot be made.
    """
    accepted, main = asked.accepted, _main(asked)
    wanted = {"input_ids", "pixel_values", main} & accepted | asked.required | towers(asked)
    if "pixel_values" in wanted:
        wanted -= {"inputs"}
    wanted -= {media.values for media in media_of(asked)}
    if "input_ids" in wanted and not asked.model.can_generate():
        wanted |= {"attention_mask"} & accepted
    if getattr(asked.model.config, "is_encoder_decoder", False):
        wanted |= {"decoder_input_ids"} & accepted
    if "past_values" in wanted:
        wanted |= {name for name in SHAPES if name.startswith(("past_", "future_", "static_"))} & accepted
    documented = documented_inputs(asked)
    lacking = sorted(wanted - set(SHAPES) - set(documented))
    if lacking or not wanted:
        raise UnknownInputError(asked.model, (lacking or [main])[0])
    return [name for name in SHAPES if name in wanted], dict(documented)


def _main(asked: Asked) -> str:
    main = str(getattr(asked.model, "main_input_name", "input_ids"))
    return next((other for other in INSTEAD.get(main, ()) if other in asked.accepted), main)


def _fitting(asked: Asked, names: list[str], documented: dict[str, Shape]) -> dict[str, Shape]:
    """The first shapes that the model runs on, with what is documented where it runs on none without.

    Of shapes that it does not run on, those come first that it only stops at for lack of values.
    """
    choices = {name: list(SHAPES[name](asked)) for name in names}
    choices = {name: own for name, own in choices.items() if own}
    products = [dict(zip(choices, each, strict=True)) for each in itertools.product(*choices.values())]
    least = {name: shape for name, shape in documented.items() if name in asked.required or not choices}
    combinations = [each | more for more in (least, documented) for each in products]
    if len(least) == len(documented):
        combinations = combinations[: len(products)]
    if len(combinations) == 1:
        return combinations[0]
    stopped = None
    for shapes in combinations:
        result = run_on_meta(asked.model, shapes)
        if result is not None and result is not STOPPED:
            return shapes
        if result is STOPPED and stopped is None:
            stopped = shapes
    return stopped or combinations[0]
