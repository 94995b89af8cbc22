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

import torch
from torch import Tensor, nn

from kbitc.errors import UsageError
from kbitc.graph.input_shapes import SHAPES, Asked, Shape
from kbitc.graph.media_tokens import TYPES, media_of, run_on_meta, special_ids, stand_ins, with_tokens

BATCH = 2
TOKENS = 8
INSTEAD = {"inputs": ("input_ids", "pixel_values")}  # names under which a main input may also come


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
        UsageError: not a transformers model, or one whose inputs are of a kind that cannot be made.
    """
    made = Recipe.of(model, tokens, batch).draw(torch.Generator().manual_seed(0))
    dtype = getattr(model, "dtype", torch.float32)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}


@dataclass(frozen=True)
class Recipe:
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
    def of(model: nn.Module, tokens: int, batch: int = 1) -> Recipe:
        """What a model is to be given; see :func:`example_inputs`."""
        asked = _asked(model, batch, tokens)
        shapes, before = _fitting(asked, _names(asked)), []
        for media in media_of(asked):
            found = with_tokens(asked, media)
            if found is not None:  # without it the text alone is an input of the model, too
                shapes |= found[0]
                before += found[1]
        return Recipe(asked, shapes, before)

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
        vocabulary = self.asked.model.config.get_text_config().vocab_size
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
    return len(Recipe.of(model, TOKENS).before)


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


def _names(asked: Asked) -> list[str]:
    """What the model is to be given beside images and sounds among its tokens, in the order of the table.

    Raises:
        UsageError: something among it cannot be made.
    """
    accepted, main = asked.accepted, _main(asked)
    wanted = {"input_ids", "pixel_values", main} & accepted | asked.required
    if "pixel_values" in wanted:
        wanted -= {"inputs"}
    wanted -= {media.values for media in media_of(asked)}
    if "input_ids" in wanted and not asked.model.can_generate():
        wanted |= {"attention_mask"} & accepted
    if getattr(asked.model.config, "is_encoder_decoder", False):
        wanted |= {"decoder_input_ids"} & accepted
    if "past_values" in wanted:
        wanted |= {name for name in SHAPES if name.startswith(("past_", "future_", "static_"))} & accepted
    lacking = sorted(wanted - set(SHAPES))
    if lacking or not wanted:
        raise UsageError(
            f"{type(asked.model).__name__} takes '{(lacking or [main])[0]}', which cannot be made from its "
            "config; pass example_inputs={'name': tensor, ...} (kbitc compile --example-inputs FILE) with "
            "everything that its forward needs"
        )
    return [name for name in SHAPES if name in wanted]


def _main(asked: Asked) -> str:
    main = str(getattr(asked.model, "main_input_name", "input_ids"))
    return next((other for other in INSTEAD.get(main, ()) if other in asked.accepted), main)


def _fitting(asked: Asked, names: list[str]) -> dict[str, Shape]:
    """The first shapes that the model runs on."""
    choices = {name: list(SHAPES[name](asked)) for name in names}
    choices = {name: own for name, own in choices.items() if own}
    combinations = [
        dict(zip(choices, combination, strict=True)) for combination in itertools.product(*choices.values())
    ]
    if len(combinations) == 1:
        return combinations[0]
    fitting = (shapes for shapes in combinations if run_on_meta(asked.model, shapes) is not None)
    return next(fitting, combinations[0])
