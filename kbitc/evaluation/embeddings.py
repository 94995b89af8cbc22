"""Embedding models, of texts or of images and texts, against the model that they were compiled from.

The one thing to know: an embedding means something only beside others of its model. So two things are
compared with the source: where each vector points (cosine), and which other vector is its nearest (top-1
retrieval), as share of the items for which both models agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.artifact.folders import is_artifact
from kbitc.checkpoint.dense import quiet_transformers, token_ids
from kbitc.errors import BackendUnavailable, SourceError, UsageError, foreign
from kbitc.evaluation.intervals import standard_error
from kbitc.graph.context import Progress, silent
from kbitc.graph.positions import usable_positions
from kbitc.system.json_file import read_json

POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda hidden: hidden.mean(0),
    "cls": lambda hidden: hidden[0],
    "max": lambda hidden: hidden.amax(0),
    "last": lambda hidden: hidden[-1],
}
"""From a text's vectors ``(tokens, width)`` to its own."""
_SWITCHES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
"""Of sentence-transformers."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Agreement:
    """How alike the embeddings of two models are.

    Attributes:
        cosines: of each item's two vectors.
        agreed: 1 for each item for which both models find the same nearest one.
    """

    cosines: tuple[float, ...]
    agreed: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """An entry of ``kbitc eval --json``."""
        return {
            "cosine": {
                "mean": sum(self.cosines) / len(self.cosines),
                "standard_error": standard_error(self.cosines),
                "least": min(self.cosines),
                "items": len(self.cosines),
            },
            "retrieval": {
                "agreement": sum(self.agreed) / len(self.agreed),
                "standard_error": standard_error(self.agreed),
                "items": len(self.agreed),
            },
        }


def pooling_of(folder: Path) -> str:
    """How a folder of sentence-transformers pools; "mean" where it does not say.

    Raises:
        UsageError: in a way that is not known here, or in several at once.
        SourceError: the file that says it is damaged.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return "mean"
    config = read_json(path)
    wanted = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    named = str(config.get("pooling_mode"))
    modes = [_SWITCHES.get(key) for key in wanted] or [{"lasttoken": "last"}.get(named, named)]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UsageError(
            f"{path}: pools by {', '.join(wanted) or named}, of which eval knows one of "
            f"{', '.join(POOLINGS)} at a time; use sentence-transformers, which loads the artifact"
        )
    return str(modes[0])


def read_lines(text: str, option: str, limit: int | None) -> list[str]:
    """Texts to embed: the lines that are not empty, each once.

    Raises:
        UsageError: fewer than two, among which nothing can be retrieved.
    """
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))[:limit]
    if len(lines) < 2:
        raise UsageError(f"{option}: has fewer than two different lines, and each line is a text to embed")
    return lines


@torch.inference_mode()
def text_agreement(
    model: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    lines: Sequence[str],
    *,
    pooling: str = "mean",
    on_progress: Progress = silent,
) -> Agreement:
    """Compare embeddings of texts; the nearest is looked for among the other texts.

    Args:
        model: gives hidden states of tokens.
        reference: what it was compiled from.
        tokenizer: of both.
        lines: texts, two or more; what is longer than the model's positions is cut, as such models do.
        pooling: of `POOLINGS`.
        on_progress: told of each text.
    """
    longest = usable_positions(model)
    items = [_short_ids(tokenizer, line, model, longest) for line in lines]

    def embed(embedder: nn.Module, ids: Tensor) -> Tensor:
        return POOLINGS[pooling](embedder(input_ids=ids[None]).last_hidden_state[0])

    ours, theirs = _both(embed, model, reference, items, "texts", on_progress)
    nearest = [(vectors @ vectors.T).fill_diagonal_(-torch.inf).argmax(1) for vectors in (ours, theirs)]
    return Agreement(_cosines(ours, theirs), _same(*nearest))


@dataclass(frozen=True)
class ImageTextAgreement:
    """How alike an image-text model is to its source, each way.

    Attributes:
        images: cosines of images; for each, which text is nearest.
        texts: cosines of texts; for each, which image is nearest.
    """

    images: Agreement
    texts: Agreement


@torch.inference_mode()
def image_text_agreement(
    model: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    processor: Any,
    lines: Sequence[str],
    images: Sequence[Any],
    on_progress: Progress = silent,
) -> ImageTextAgreement:
    """Compare embeddings of images and texts; the nearest is looked for on the other side.

    Args:
        model: with ``get_text_features`` and ``get_image_features``.
        reference: what it was compiled from.
        tokenizer: of both.
        processor: of images, of both.
        lines: texts, two or more.
        images: two or more, of Pillow.
        on_progress: told of each.

    Raises:
        SourceError: the processor cannot read an image, or the model wants more than that.
    """
    text_config = getattr(getattr(model, "config", None), "text_config", None)
    longest = getattr(text_config, "max_position_embeddings", None)
    ids = [_short_ids(tokenizer, line, model, longest) for line in lines]
    with foreign("its image processor cannot read the images"):
        pixels = [processor(images=image, return_tensors="pt")["pixel_values"][0] for image in images]

    def of_text(embedder: Any, item: Tensor) -> Tensor:
        with foreign("the model cannot be given a text by its token ids alone"):
            return _features(embedder.get_text_features(input_ids=item[None]))

    def of_image(embedder: Any, item: Tensor) -> Tensor:
        with foreign("the model cannot be given an image by its pixels alone"):
            return _features(embedder.get_image_features(pixel_values=item[None].to(embedder.dtype)))

    texts = _both(of_text, model, reference, ids, "texts", on_progress)
    pictures = _both(of_image, model, reference, pixels, "images", on_progress)
    closeness = [picture @ text.T for picture, text in zip(pictures, texts, strict=True)]
    return ImageTextAgreement(
        images=Agreement(_cosines(*pictures), _same(*(close.argmax(1) for close in closeness))),
        texts=Agreement(_cosines(*texts), _same(*(close.argmax(0) for close in closeness))),
    )


def _short_ids(tokenizer: Any, line: str, model: nn.Module, longest: int | None) -> Tensor:
    """Token ids of a text, cut to the model's positions with what the tokenizer puts at its end."""
    ids = token_ids(tokenizer, line, model)
    if longest is None or len(ids) <= longest:
        return ids
    with foreign("its tokenizer cannot cut the text"):
        made = tokenizer(line, truncation=True, max_length=longest, return_tensors="pt")
    cut: Tensor = made["input_ids"][0]
    return cut


def _features(given: Any) -> Tensor:
    """A vector; transformers 5 wraps it."""
    vector: Tensor = (given if isinstance(given, Tensor) else given.pooler_output)[0]
    return vector


def _both(
    embed: Callable[[Any, Tensor], Tensor],
    model: nn.Module,
    reference: nn.Module,
    items: Sequence[Tensor],
    what: str,
    on_progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Unit vectors ``(items, width)`` of both models, float32."""
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i, item in enumerate(items):
        for kept, embedder in zip(rows, (model, reference), strict=True):
            kept.append(nn.functional.normalize(embed(embedder, item).float(), dim=0))
        on_progress(f"embedding {what}", i + 1, len(items))
    ours, theirs = (torch.stack(kept) for kept in rows)
    if ours.shape != theirs.shape:
        raise UsageError(
            f"--against: its embeddings are {theirs.shape[1]} wide, this model's {ours.shape[1]}; compare a "
            "model with what it was compiled from"
        )
    return ours, theirs


def _cosines(ours: Tensor, theirs: Tensor) -> tuple[float, ...]:
    return tuple((ours * theirs).sum(1).clamp(-1, 1).tolist())


def _same(ours: Tensor, theirs: Tensor) -> tuple[int, ...]:
    return tuple((ours == theirs).long().tolist())


def read_images(folder: Path, limit: int | None) -> list[Any]:
    """Images of a folder in the order of their names, of Pillow, in RGB.

    Raises:
        UsageError: no folder, fewer than two images, or one that is none.
        BackendUnavailable: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise BackendUnavailable(
            "--images: needs Pillow; install it with: pip install 'kbitc[eval]'"
        ) from error
    if not folder.is_dir():
        raise UsageError(f"--images {folder}: is no folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)[:limit]
    if len(paths) < 2:
        raise UsageError(f"--images {folder}: has fewer than two images ({', '.join(IMAGES)})")
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # as Pillow's readers raise
            raise UsageError(f"--images: {path} is no image that Pillow reads ({error})") from error
    return images


def image_processor(folder: Path) -> Any:
    """The image processor that lies in a folder.

    Raises:
        SourceError: there is none, or transformers cannot read it.
    """
    from transformers import AutoImageProcessor

    if not (folder / "preprocessor_config.json").exists() and not (folder / "processor_config.json").exists():
        raise SourceError(
            f"{folder}: has no preprocessor_config.json, so images cannot be read; copy it there"
        )
    with quiet_transformers(), foreign(f"{folder}: its image processor cannot be read"):
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)


def companions_folder(source: str, into: Path) -> Path:
    """A folder with a model's small files: the artifact, or ``into``, where those of other sources are put.

    Raises:
        SourceError: the source cannot be read.
    """
    from kbitc.checkpoint import open_checkpoint

    if is_artifact(Path(source)):
        return Path(source)
    with open_checkpoint(source) as checkpoint:
        checkpoint.save_companions(into)
    return into
